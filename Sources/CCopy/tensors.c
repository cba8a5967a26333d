// SPDX-License-Identifier: Apache-2.0
#include "noether_tensors.h"

#include <stddef.h>
#include <string.h>

// DLPack 1.x, github.com/dmlc/dlpack, include/dlpack/dlpack.h: layouts that stay the same within a major version.
struct dl_tensor {
    void *data;
    struct { int32_t type, id; } device;
    int32_t dimensions;
    struct { uint8_t code, bits; uint16_t lanes; } dtype;
    int64_t *sizes;
    int64_t *strides;
    uint64_t byte_offset;
};
_Static_assert(sizeof(struct dl_tensor) == 48, "DLTensor");

struct dl_exchange {
    struct { uint32_t major, minor; } version;
    const struct dl_exchange *previous;
    void *allocate, *take, *give;
    // Fills in what the tensor itself goes on to own; nothing is to be freed. May be NULL.
    int (*describe)(void *object, struct dl_tensor *out);
    void *stream;
};

int nw_tensors_read(const void *api, struct nw_tensors *tensors) {
    const struct dl_exchange *exchange = api;
    while (exchange && exchange->version.major != 1) exchange = exchange->previous;
    if (!exchange || !exchange->describe) return 1;
    uint64_t used = 0;
    for (uint64_t i = 0; i < tensors->count; i++) {
        struct dl_tensor found = {0};
        if (exchange->describe((void *)(uintptr_t)tensors->objects[i], &found) != 0) return -1;
        if (found.dimensions < 0 || (uint64_t)found.dimensions > tensors->room - used) return 1;
        if (found.dimensions && !(found.sizes && found.strides)) return 1;
        tensors->data[i] = (uint64_t)(uintptr_t)found.data + (found.data ? found.byte_offset : 0);
        tensors->dtypes[i] = found.dtype.code | (uint32_t)found.dtype.bits << 8 | (uint32_t)found.dtype.lanes << 16;
        tensors->devices[i] = found.device.type;
        tensors->dimensions[i] = found.dimensions;
        // Of a scalar there may be none to copy from, nor to.
        if (!found.dimensions) continue;
        memcpy(tensors->sizes + used, found.sizes, (size_t)found.dimensions * sizeof(int64_t));
        memcpy(tensors->strides + used, found.strides, (size_t)found.dimensions * sizeof(int64_t));
        used += (uint64_t)found.dimensions;
    }
    return 0;
}
