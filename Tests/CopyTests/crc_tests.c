// SPDX-License-Identifier: Apache-2.0
// The checksums are compared with one that is made bit by bit.
#include "check.h"
#include "noether_crc.h"

static uint32_t bit_by_bit(uint32_t crc, const unsigned char *at, uint64_t length) {
    crc = ~crc;
    for (; length; at++, length--) {
        crc ^= *at;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
    }
    return ~crc;
}

void test_crc(void) {
    static unsigned char memory[5000];
    uint32_t random = 7;
    for (size_t i = 0; i < sizeof memory; i++) {
        random = random * 1664525 + 1013904223;
        memory[i] = (unsigned char)(random >> 24);
    }
    CHECK(nw_crc32(0, "123456789", 9) == 0xCBF43926u);
    CHECK(nw_crc32(0, memory, 0) == 0 && nw_crc32(5, memory, 0) == 5);
    for (uint64_t length = 0; length < 700; length++)
        for (uint64_t start = 0; start < 3; start++)
            CHECK(nw_crc32(length, memory + start, length) == bit_by_bit(length, memory + start, length));
    CHECK(nw_crc32(0, memory, sizeof memory) == bit_by_bit(0, memory, sizeof memory));
    for (uint64_t middle = 0; middle <= sizeof memory; middle += 61) {
        uint32_t first = nw_crc32(0, memory, middle), second = nw_crc32(0, memory + middle, sizeof memory - middle);
        CHECK(nw_crc32(first, memory + middle, sizeof memory - middle) == nw_crc32(0, memory, sizeof memory));
        CHECK(nw_crc32_combine(first, second, sizeof memory - middle) == nw_crc32(0, memory, sizeof memory));
    }
}
