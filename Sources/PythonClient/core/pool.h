// SPDX-License-Identifier: Apache-2.0
// The pool of shared buffers: sealed memfds, kept mapped and used again, since fresh shared memory costs several times
// a warm copy.
//
// A buffer belongs to whoever counts a reference: the trainer that fills it, the session until the daemon has released
// it. It comes back to the pool with the last one, so that nothing that raises in between can give it back too early,
// or twice.
#pragma once
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct nw_pool;

struct nw_buffer {
    struct nw_pool *pool;
    struct nw_buffer *next;
    unsigned references;
    uint32_t number;
    int fd;
    unsigned char *address;
    size_t capacity;
    // Nothing was ever written to it.
    bool is_fresh;
    // Known to CUDA: only the trainer's Python can end that, before the memory goes.
    bool is_pinned;
    // Something may still read it after it was released: it is never written to again.
    bool is_spoilt;
    double free_since;
};

enum nw_take { NW_TAKEN, NW_POOL_FULL, NW_NO_MEMORY };

// Bounded by `limit` bytes in all, and by a quarter of the descriptors that this process may have; one buffer is always
// allowed.
struct nw_pool *nw_pool_new(size_t limit);
void nw_pool_free(struct nw_pool *pool);
// A buffer with one reference. NW_NO_MEMORY: errno says why, and `wanted` holds its capacity.
enum nw_take nw_pool_take(struct nw_pool *pool, size_t needed, struct nw_buffer **found, size_t *wanted);
// From the next buffer on; what is out stays out.
void nw_pool_set_limit(struct nw_pool *pool, size_t limit);
// Waits until something has come back since `seen`, or until `seconds` have passed. Returns the count of what has come
// back.
uint64_t nw_pool_wait(struct nw_pool *pool, uint64_t seen, double seconds);
uint64_t nw_pool_returns(struct nw_pool *pool);
// Lets go of what was not used for `idle` seconds. Returns in how many seconds there is more to do; below 0: nothing is
// free.
double nw_pool_shrink(struct nw_pool *pool, double idle);
// A buffer whose memory can go when CUDA does not know it any more, with one reference; NULL: there is none.
struct nw_buffer *nw_pool_retired(struct nw_pool *pool);
struct nw_pool_sizes { size_t limit, held, all, out; } nw_pool_sizes(struct nw_pool *pool);
// A forked child: the buffers are the parent's, and every pool that exists is of no use.
void nw_pools_forget(void);
bool nw_pool_is_forked(const struct nw_pool *pool);

void nw_buffer_keep(struct nw_buffer *buffer);
void nw_buffer_drop(struct nw_buffer *buffer);
// The one reference that is left gives it back to the system, and not to the pool.
void nw_buffer_destroy(struct nw_buffer *buffer);

// CLOCK_MONOTONIC, in seconds.
double nw_now(void);
void nw_condition_init(pthread_cond_t *condition);
// At most so long; false: the time is over.
bool nw_condition_wait(pthread_cond_t *condition, pthread_mutex_t *mutex, double until);
