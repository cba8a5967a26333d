// SPDX-License-Identifier: Apache-2.0
// As much of JSON as the daemon's events need: the members of one object, found by their name.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct nw_text_range {
    const char *start;
    size_t length;
};

// The value of a member, as it stands there; false: there is none, it is null, or this is no object.
bool nw_json_member(struct nw_text_range object, const char *name, struct nw_text_range *value);
bool nw_json_number(struct nw_text_range object, const char *name, uint64_t *number);
// Whether a member is this string.
bool nw_json_is(struct nw_text_range object, const char *name, const char *text);
