// SPDX-License-Identifier: Apache-2.0
// Copies many pieces of memory on more than one thread, without any lock of the caller's: what a trainer waits for.
#pragma once
#include <stdint.h>

// One snapshot's copy. The three arrays and this struct belong to the caller, and stay until nw_copy_wait has returned;
// `ends` holds the running sum of the pieces' lengths. The rest starts as 0.
struct nw_copy {
    const uint64_t *targets;
    const uint64_t *sources;
    const uint64_t *ends;
    uint64_t count;
    // 1: nothing was ever written to the targets, which follow one another in one mapping.
    uint64_t fresh;
    // Bytes handed out to threads, bytes copied, and threads of nw_copy_start that are not done.
    uint64_t next;
    uint64_t done;
    uint64_t helpers;
    // 1: the sources may be gone by now, since somebody else may free them. The kernel reads them then
    // (process_vm_readv), at twice the time of small pages, and `failed` is 1 if it could not.
    uint64_t guarded;
    uint64_t failed;
};

// Whether this process may have the kernel read its memory: some sandboxes refuse.
int nw_copy_can_guard(void);

// Starts a thread that copies until nothing is left. Where none can be started the others copy it all.
void nw_copy_start(struct nw_copy *copy);
// Copies in turn with the other threads until `stop` bytes of the whole, or all, are handed out.
void nw_copy_run(struct nw_copy *copy, uint64_t stop);
// Returns when all that was handed out is copied and no thread of nw_copy_start uses the struct any more.
void nw_copy_wait(struct nw_copy *copy);
// Hands out no more.
void nw_copy_stop(struct nw_copy *copy);
// Whether the memory of each piece still is what the copy of it is; 0 too if it can't be read.
int nw_copy_is_same(const struct nw_copy *copy);

// The sum of the 64-bit words of a piece of memory, and of each byte after them, as far as 64 bits hold it.
uint64_t nw_sum(const void *memory, uint64_t length);
