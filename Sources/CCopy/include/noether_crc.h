// SPDX-License-Identifier: Apache-2.0
// The CRC-32 of zip files and zlib, at the speed of memory.
#pragma once
#include <stdint.h>

// The checksum of what `crc` is the checksum of, followed by this memory; `crc` is 0 at the beginning.
uint32_t nw_crc32(uint32_t crc, const void *memory, uint64_t length);

// The checksum of two pieces, one after the other, from the checksum of each and the length of the second one.
uint32_t nw_crc32_combine(uint32_t first, uint32_t second, uint64_t second_length);
