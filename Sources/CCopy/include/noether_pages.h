// SPDX-License-Identifier: Apache-2.0
// Tells which pages of memory were written since a moment, whatever wrote them: what a copy that runs beside a trainer
// needs to know. By userfaultfd's asynchronous write protection and the PAGEMAP_SCAN ioctl of Linux 6.7; nobody has to
// serve a fault, and a write to a page that is watched costs one fault of the kernel's.
//
// The order: watch, then read, then ask what changed. A page that was written between the first and the last is told,
// so that what was read of every other page is what was there when nw_pages_watch returned. A write is told too if it
// came after that page was read: nobody knows when that was.
//
// Seen are stores of any thread, and what the kernel writes for a system call (read(2), recv(2), process_vm_writev(2)
// of another process). Memory that is gone, moved or given back to the kernel since (munmap, mremap, MADV_DONTNEED)
// counts as changed. Not seen is what a device writes into memory that was pinned for it before (RDMA, io_uring's fixed
// buffers, cudaHostRegister).
#pragma once
#include <stdint.h>

struct nw_pages;

// The whole pages of a range: returns where they begin, and says how many bytes they are, perhaps 0. What lies before
// and behind them shares its page with others, and cannot be watched.
uint64_t nw_pages_inner(uint64_t start, uint64_t length, uint64_t *inner_length);

// Watches the whole pages of each range, and sets watched[i] to whether range i is watched; a range without whole pages
// is not. Only private anonymous memory is: what other processes, a file or another mapping can change isn't seen here.
// Ranges may overlap, and may be watched by others at the same time.
// Returns NULL if nothing is watched, with errno: ENOSYS, EPERM (seccomp) or EINVAL by a kernel that can't, ENOTSUP for
// memory of another kind, EBUSY for memory that another userfaultfd has, EMFILE, ENOMEM and so on. Nothing is left
// behind then.
struct nw_pages *nw_pages_watch(const uint64_t *starts, const uint64_t *lengths, uint64_t count,
                                unsigned char *watched);

// How many pages changed since, of all ranges and, unless `changed` is NULL, of each; 0 for a range that isn't watched.
// Returns -1 with errno if that can't be told: ECHILD after a fork, in the child.
int64_t nw_pages_changed(struct nw_pages *pages, uint64_t *changed);

// Watches no more, and frees. NULL is taken. Any thread may call it, and other threads may write meanwhile; the memory
// may be gone.
void nw_pages_end(struct nw_pages *pages);
