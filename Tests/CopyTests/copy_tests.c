// SPDX-License-Identifier: Apache-2.0
// Sources/CCopy with a sanitizer around it (`make test-copy`): each piece is an allocation of its own, so that a byte
// too many is seen, and a thread that goes on too long writes into memory that is gone.
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "check.h"
#include "noether_copy.h"
#include "noether_tensors.h"

static _Atomic int threads_to_refuse;

// By the linker's --wrap.
int __real_pthread_create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument) {
    if (threads_to_refuse > 0) {
        threads_to_refuse--;
        return EAGAIN;
    }
    return __real_pthread_create(thread, attributes, start, argument);
}

// A copy, and the memory that it is about.
struct example {
    struct nw_copy copy;
    uint64_t *targets, *sources, *ends;
    unsigned char **allocations, *mapping;
    uint64_t mapped;
};

static uint64_t total_of(const struct example *example) {
    return example->copy.count ? example->ends[example->copy.count - 1] : 0;
}

static uint64_t length_of(const struct example *example, uint64_t piece) {
    return example->ends[piece] - (piece ? example->ends[piece - 1] : 0);
}

// `count` pieces of these lengths, one after the other and from the beginning again. Piece i begins i bytes (modulo 67)
// behind an address that malloc gives; a piece without bytes is at address 0.
static struct example make(uint64_t count, const uint64_t *lengths, uint64_t lengths_count, bool is_fresh) {
    struct example example = {.copy = {.count = count, .fresh = is_fresh}};
    uint64_t total = 0;
    example.targets = malloc(count * sizeof(uint64_t));
    example.sources = malloc(count * sizeof(uint64_t));
    example.ends = malloc(count * sizeof(uint64_t));
    example.allocations = calloc(2 * count, sizeof(unsigned char *));
    for (uint64_t i = 0; i < count; i++) total += lengths[i % lengths_count];
    if (is_fresh) {
        example.mapped = total + 4096;
        example.mapping = mmap(0, example.mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(example.mapping != MAP_FAILED);
    }
    uint64_t end = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t length = lengths[i % lengths_count], shift = i % 67;
        example.targets[i] = example.sources[i] = 0;
        if (length) {
            unsigned char *source = example.allocations[2 * i] = malloc(shift + length);
            CHECK(source);
            for (uint64_t j = 0; j < length; j++)
                source[shift + j] = (unsigned char)(1 + (j * 31 + (j >> 8) + i * 7) % 255);
            example.sources[i] = (uintptr_t)(source + shift);
            if (is_fresh) {
                example.targets[i] = (uintptr_t)(example.mapping + 3 + end);
            } else {
                // Another alignment than the source's.
                unsigned char *target = example.allocations[2 * i + 1] = calloc(1, 2 * shift + length);
                CHECK(target);
                example.targets[i] = (uintptr_t)(target + 2 * shift);
            }
        }
        example.ends[i] = end += length;
    }
    example.copy.targets = example.targets;
    example.copy.sources = example.sources;
    example.copy.ends = example.ends;
    return example;
}

static void discard(struct example *example) {
    for (uint64_t i = 0; i < 2 * example->copy.count; i++) free(example->allocations[i]);
    if (example->mapped) munmap(example->mapping, example->mapped);
    free(example->allocations);
    free(example->targets);
    free(example->sources);
    free(example->ends);
}

// Whether the first `bytes` of the whole are there.
static bool is_copied(const struct example *example, uint64_t bytes) {
    for (uint64_t i = 0; i < example->copy.count && bytes; i++) {
        uint64_t length = length_of(example, i);
        if (length > bytes) length = bytes;
        bytes -= length;
        if (length &&
            memcmp((void *)(uintptr_t)example->targets[i], (void *)(uintptr_t)example->sources[i], length) != 0)
            return false;
    }
    return true;
}

static bool is_untouched(const struct example *example) {
    for (uint64_t i = 0; i < example->copy.count; i++)
        for (uint64_t j = 0; j < length_of(example, i); j++)
            if (((unsigned char *)(uintptr_t)example->targets[i])[j]) return false;
    return true;
}

static void copies_all(uint64_t count, const uint64_t *lengths, uint64_t lengths_count, int helpers, bool takes_part,
                       bool is_fresh) {
    struct example example = make(count, lengths, lengths_count, is_fresh);
    for (int i = 0; i < helpers; i++) nw_copy_start(&example.copy);
    if (takes_part) nw_copy_run(&example.copy, UINT64_MAX);
    nw_copy_wait(&example.copy);
    CHECK(example.copy.helpers == 0 && example.copy.done == total_of(&example));
    CHECK(is_copied(&example, UINT64_MAX));
    discard(&example);
}

// Around the units that are handed out, and around the lanes of a streamed copy.
static const uint64_t ODD[] = {0,   1,   2,   3, 7, 63,   64,   65,    127,   129,
                               511, 512, 513, 0, 0, 4095, 4097, 16383, 16385, 65537};
static const uint64_t UNITS[] = {1 << 20, (1 << 20) - 1, 0, (1 << 20) + 1, 5, (3 << 20) + 77};
static const uint64_t LARGE[] = {(9 << 20) + 13, 1, 0, (8 << 20) + 4097, 131};
#define LENGTHS(NAME) NAME, sizeof NAME / sizeof *NAME

static void test_threads(void) {
    for (int fresh = 0; fresh < 2; fresh++)
        for (int helpers = 0; helpers <= 8; helpers = 2 * helpers + !helpers) {
            copies_all(200, LENGTHS(ODD), helpers, true, fresh);
            copies_all(6, LENGTHS(UNITS), helpers, true, fresh);
            // Streamed: 17 MiB.
            copies_all(5, LENGTHS(LARGE), helpers, true, fresh);
            if (helpers) copies_all(5, LENGTHS(LARGE), helpers, false, fresh);
        }
}

static void test_nothing_to_copy(void) {
    copies_all(0, LENGTHS(ODD), 2, true, false);
    const uint64_t none[] = {0};
    copies_all(100, LENGTHS(none), 2, true, false);
    struct nw_copy nothing = {0};
    nw_copy_start(&nothing);
    nw_copy_run(&nothing, UINT64_MAX);
    nw_copy_stop(&nothing);
    nw_copy_wait(&nothing);
}

static void test_no_thread_can_be_started(void) {
    threads_to_refuse = 3;
    copies_all(6, LENGTHS(UNITS), 3, true, false);
    CHECK(threads_to_refuse == 0);
    threads_to_refuse = 1;
    copies_all(6, LENGTHS(UNITS), 2, true, false);
}

static void test_the_first_bytes_first(void) {
    struct example example = make(6, LENGTHS(UNITS), false);
    nw_copy_run(&example.copy, (1 << 20) + 100);
    nw_copy_wait(&example.copy);
    CHECK(is_copied(&example, (1 << 20) + 100));
    CHECK(example.copy.next < total_of(&example));
    nw_copy_start(&example.copy);
    nw_copy_run(&example.copy, UINT64_MAX);
    nw_copy_wait(&example.copy);
    CHECK(is_copied(&example, UINT64_MAX));
    discard(&example);
}

// Memory that is gone does not end the process, and is told.
static void test_sources_that_may_be_gone(void) {
    CHECK(nw_copy_can_guard());
    enum { BYTES = 3 << 20 };
    unsigned char *source = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *target = malloc(BYTES);
    CHECK(source != MAP_FAILED && target);
    for (size_t i = 0; i < BYTES; i++) source[i] = (unsigned char)(i * 7);
    uint64_t targets = (uintptr_t)target, sources = (uintptr_t)source, ends = BYTES;
    struct nw_copy copy = {.targets = &targets, .sources = &sources, .ends = &ends, .count = 1, .guarded = 1};
    nw_copy_run(&copy, UINT64_MAX);
    nw_copy_wait(&copy);
    CHECK(!copy.failed && memcmp(source, target, BYTES) == 0 && nw_copy_is_same(&copy));
    source[BYTES - 1]++;
    CHECK(!nw_copy_is_same(&copy));
    CHECK(munmap(source + (1 << 20), 1 << 20) == 0);
    CHECK(!nw_copy_is_same(&copy));
    copy.next = copy.done = 0;
    nw_copy_start(&copy);
    nw_copy_run(&copy, UINT64_MAX);
    nw_copy_wait(&copy);
    CHECK(copy.failed && copy.done == BYTES);
    munmap(source, 1 << 20);
    munmap(source + (2 << 20), 1 << 20);
    free(target);
}

static void test_sums(void) {
    unsigned char *bytes = malloc(1003);
    CHECK(bytes);
    for (size_t i = 0; i < 1003; i++) bytes[i] = (unsigned char)(i * 31);
    for (uint64_t start = 0; start < 3; start++)
        for (uint64_t length = 0; start + length <= 1003; length++) {
            uint64_t sum = 0, whole = length / 8 * 8;
            for (uint64_t i = 0; i < length; i++) sum += (uint64_t)bytes[start + i] << (i < whole ? i % 8 * 8 : 0);
            CHECK(nw_sum(bytes + start, length) == sum);
        }
    free(bytes);
}

// The sanitizers see a thread that goes on after nw_copy_wait: what it writes to is then written by others, and freed.
static void test_stop(void) {
    for (int helpers = 0; helpers <= 4; helpers++) {
        struct example example = make(5, LENGTHS(LARGE), false);
        for (int i = 0; i < helpers; i++) nw_copy_start(&example.copy);
        nw_copy_stop(&example.copy);
        nw_copy_wait(&example.copy);
        if (helpers == 0) CHECK(is_untouched(&example));
        for (uint64_t i = 0; i < example.copy.count; i++)
            for (uint64_t j = 0; j < length_of(&example, i); j += 64)
                ((unsigned char *)(uintptr_t)example.targets[i])[j] = 0;
        nw_copy_run(&example.copy, UINT64_MAX);
        if (helpers == 0) CHECK(is_untouched(&example));
        discard(&example);
    }
}

// As in dlpack.h, 1.x.
struct dl_tensor {
    void *data;
    int32_t device_type, device_id, dimensions;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *sizes, *strides;
    uint64_t byte_offset;
};

struct exchange {
    uint32_t major, minor;
    const struct exchange *previous;
    void *allocate, *take, *give;
    int (*describe)(void *, struct dl_tensor *);
    void *stream;
};

// An object is its own description; one at address 0 has none.
static int describe(void *object, struct dl_tensor *out) {
    if (!object) return -1;
    memcpy(out, object, sizeof(struct dl_tensor));
    return 0;
}

static const struct exchange ONE = {.major = 1, .describe = describe};

// Reads descriptions into columns that end where their room does.
static int read_all(const void *api, struct dl_tensor **objects, uint64_t count, uint64_t room, int64_t *sizes,
                    int64_t *strides) {
    uint64_t *addresses = malloc(count * sizeof *addresses), *data = malloc(count * sizeof *data);
    uint32_t *dtypes = malloc(count * sizeof *dtypes);
    int32_t *devices = malloc(count * sizeof *devices), *dimensions = malloc(count * sizeof *dimensions);
    for (uint64_t i = 0; i < count; i++) addresses[i] = (uintptr_t)objects[i];
    struct nw_tensors tensors = {addresses, count, data, dtypes, devices, dimensions, sizes, strides, room};
    int result = nw_tensors_read(api, &tensors);
    for (uint64_t i = 0; result == 0 && i < count; i++) {
        const struct dl_tensor *object = objects[i];
        CHECK(data[i] == (object->data ? (uintptr_t)object->data + object->byte_offset : 0));
        CHECK(dtypes[i] == (object->code | (uint32_t)object->bits << 8 | (uint32_t)object->lanes << 16));
        CHECK(devices[i] == object->device_type && dimensions[i] == object->dimensions);
    }
    free(addresses), free(data), free(dtypes), free(devices), free(dimensions);
    return result;
}

static void test_tensors(void) {
    int64_t shape[] = {2, 3, 5}, steps[] = {15, 5, 1}, sizes[4], strides[4];
    char memory[64];
    struct dl_tensor scalar = {.data = memory, .device_type = 1, .code = 2, .bits = 32, .lanes = 1, .byte_offset = 12};
    struct dl_tensor empty = {
        .code = 255, .bits = 255, .lanes = 65535, .dimensions = 1, .sizes = shape, .strides = steps, .byte_offset = 8};
    struct dl_tensor cube = {.data = memory, .device_type = 2, .dimensions = 3, .sizes = shape, .strides = steps};

    CHECK(read_all(&ONE, 0, 0, 0, 0, 0) == 0);
    CHECK(read_all(&ONE, (struct dl_tensor *[]){&scalar, &scalar}, 2, 0, 0, 0) == 0);
    CHECK(read_all(&ONE, (struct dl_tensor *[]){&empty, &scalar, &cube}, 3, 4, sizes, strides) == 0);
    CHECK(sizes[0] == 2 && strides[0] == 15);
    CHECK(memcmp(sizes + 1, shape, sizeof shape) == 0 && memcmp(strides + 1, steps, sizeof steps) == 0);
    // Room for three numbers, and for no more.
    CHECK(read_all(&ONE, (struct dl_tensor *[]){&cube, &empty}, 2, 3, sizes, strides) == 1);
    CHECK(read_all(&ONE, (struct dl_tensor *[]){&cube, &scalar}, 2, 3, sizes, strides) == 0);
    CHECK(read_all(&ONE, (struct dl_tensor *[]){&scalar, 0}, 2, 3, sizes, strides) == -1);
    struct dl_tensor negative = {.dimensions = -1}, sizeless = {.dimensions = 1, .strides = steps},
                       strideless = {.dimensions = 1, .sizes = shape};
    struct dl_tensor *bad[] = {&negative, &sizeless, &strideless};
    for (int i = 0; i < 3; i++) CHECK(read_all(&ONE, &bad[i], 1, 4, sizes, strides) == 1);

    // The version that is known may be an earlier one.
    struct exchange two = {.major = 2, .previous = &ONE}, only_two = {.major = 2, .describe = describe},
                    mute = {.major = 1};
    CHECK(read_all(&two, (struct dl_tensor *[]){&scalar}, 1, 0, 0, 0) == 0);
    CHECK(read_all(&only_two, (struct dl_tensor *[]){&scalar}, 1, 0, 0, 0) == 1);
    CHECK(read_all(&mute, (struct dl_tensor *[]){&scalar}, 1, 0, 0, 0) == 1);
    CHECK(read_all(0, (struct dl_tensor *[]){&scalar}, 1, 0, 0, 0) == 1);
}

int main(void) {
    test_threads();
    test_nothing_to_copy();
    test_sources_that_may_be_gone();
    test_sums();
    test_no_thread_can_be_started();
    test_the_first_bytes_first();
    test_stop();
    test_tensors();
    test_crc();
    test_pages();
    test_session();
    puts("The client's C: all as promised");
}
