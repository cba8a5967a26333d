// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <stdio.h>
#include <stdlib.h>

#define CHECK(CONDITION) \
    do if (!(CONDITION)) fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #CONDITION), exit(1); while (0)

void test_crc(void);
void test_pages(void);
void test_session(void);
