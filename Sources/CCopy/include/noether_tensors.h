// SPDX-License-Identifier: Apache-2.0
// What a pickle says of a tensor, for many tensors at once: from torch's own table of C functions (DLPack's exchange
// API), at a tenth of what the properties cost in Python.
#pragma once
#include <stdint.h>

// Columns of the caller's, `count` long each. The sizes and strides of tensor i are `dimensions[i]` numbers each, at
// the place where those of tensor i - 1 end; `room` numbers fit.
struct nw_tensors {
    const uint64_t *objects;  // PyObject *: torch.Tensor or a subclass; alive
    uint64_t count;
    uint64_t *data;        // where the first element is; 0 for a tensor without elements
    uint32_t *dtypes;      // DLDataType: code, bits << 8, lanes << 16
    int32_t *devices;      // DLDeviceType
    int32_t *dimensions;
    int64_t *sizes;
    int64_t *strides;      // in elements
    uint64_t room;
};

// `api` is the pointer in the capsule torch.Tensor.__dlpack_c_exchange_api__. The caller holds the GIL.
// Returns 0; 1: not known here, a tensor that has no such description, or more dimensions than there is room for; -1:
// that too, and Python's exception is set.
int nw_tensors_read(const void *api, struct nw_tensors *tensors);
