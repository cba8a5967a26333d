// SPDX-License-Identifier: Apache-2.0
#include "noether_crc.h"

#include <pthread.h>
#include <stddef.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The polynomial, its bits in reverse: bit 31 is the coefficient of x^0.
#define POLYNOMIAL 0xEDB88320u

static uint32_t tables[8][256];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill_tables(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ POLYNOMIAL : value >> 1;
        tables[0][i] = value;
    }
    for (int table = 1; table < 8; table++)
        for (int i = 0; i < 256; i++) {
            uint32_t before = tables[table - 1][i];
            tables[table][i] = before >> 8 ^ tables[0][before & 255];
        }
}

// Eight bytes a step. The value is the inverse of a checksum.
static uint32_t by_tables(uint32_t value, const unsigned char *at, uint64_t length) {
    for (; length >= 8; at += 8, length -= 8) {
        uint32_t low = (uint32_t)at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
        low ^= value;
        value = tables[7][low & 255] ^ tables[6][low >> 8 & 255] ^ tables[5][low >> 16 & 255] ^ tables[4][low >> 24] ^
                tables[3][at[4]] ^ tables[2][at[5]] ^ tables[1][at[6]] ^ tables[0][at[7]];
    }
    for (; length; at++, length--) value = value >> 8 ^ tables[0][(value ^ *at) & 255];
    return value;
}

#if defined(__x86_64__)
// Multiplication without carries: a piece of 16 bytes is replaced by what it is worth 16 or 64 bytes later, as often as
// there are bytes; the tables do the last 16. Each pair is x^(distance + 32) and x^(distance - 32) modulo the
// polynomial, for distances of 512 and 128 bits.
static const uint64_t over_64[2] = {0x154442BD4, 0x1C6E41596}, over_16[2] = {0x1751997D0, 0x0CCAA009E};

__attribute__((target("pclmul,sse4.1"))) static inline __m128i folded(__m128i value, __m128i by, __m128i next) {
    return _mm_xor_si128(
        next, _mm_xor_si128(_mm_clmulepi64_si128(value, by, 0x00), _mm_clmulepi64_si128(value, by, 0x11)));
}

// At least 64 bytes.
__attribute__((target("pclmul,sse4.1"))) static uint32_t by_folding(
    uint32_t value, const unsigned char *at, uint64_t length) {
    __m128i lanes[4], by = _mm_loadu_si128((const void *)over_64);
    for (int i = 0; i < 4; i++) lanes[i] = _mm_loadu_si128((const void *)(at + 16 * i));
    lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128((int)value));
    for (at += 64, length -= 64; length >= 64; at += 64, length -= 64)
        for (int i = 0; i < 4; i++) lanes[i] = folded(lanes[i], by, _mm_loadu_si128((const void *)(at + 16 * i)));
    by = _mm_loadu_si128((const void *)over_16);
    __m128i all = lanes[0];
    for (int i = 1; i < 4; i++) all = folded(all, by, lanes[i]);
    for (; length >= 16; at += 16, length -= 16) all = folded(all, by, _mm_loadu_si128((const void *)at));
    unsigned char last[16];
    _mm_storeu_si128((void *)last, all);
    return by_tables(by_tables(0, last, sizeof last), at, length);
}
#endif

uint32_t nw_crc32(uint32_t crc, const void *memory, uint64_t length) {
    pthread_once(&once, fill_tables);
#if defined(__x86_64__)
    if (length >= 64 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"))
        return ~by_folding(~crc, memory, length);
#endif
    return ~by_tables(~crc, memory, length);
}

// The product of two polynomials, modulo the polynomial.
static uint32_t product(uint32_t a, uint32_t b) {
    uint32_t result = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) result ^= b;
        b = b & 1 ? b >> 1 ^ POLYNOMIAL : b >> 1;
    }
    return result;
}

uint32_t nw_crc32_combine(uint32_t first, uint32_t second, uint64_t second_length) {
    // The first one moves on by 8 times so many bits: it is multiplied by x^(8 * length).
    uint32_t power = 1u << 23;
    for (; second_length; second_length >>= 1) {
        if (second_length & 1) first = product(power, first);
        power = product(power, power);
    }
    return first ^ second;
}
