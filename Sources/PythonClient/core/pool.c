// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { ROUND_BYTES = 2 << 20, SLACK_BYTES = 64 << 10, LONGEST_SECONDS = 1000000, SHARE_OF_DESCRIPTORS = 4 };

struct nw_pool {
    struct nw_pool *previous, *next;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    size_t limit;
    // Of buffers that somebody has, and their number.
    size_t held;
    size_t out;
    uint64_t returns;
    uint32_t next_number;
    // The one that was used last comes first.
    struct nw_buffer *free;
    struct nw_buffer *retired;
    // Buffers that exist, and whether the pool itself is still wanted.
    size_t buffers;
    bool is_wanted;
    bool is_forked;
};

// Every pool of this process, for the child of a fork.
static pthread_mutex_t pools_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct nw_pool *pools;

double nw_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void nw_condition_init(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
}

bool nw_condition_wait(pthread_cond_t *condition, pthread_mutex_t *mutex, double until) {
    // Infinity is no number of seconds for a clock.
    double longest = nw_now() + LONGEST_SECONDS;
    if (!(until < longest)) until = longest;
    struct timespec time = {.tv_sec = (time_t)until};
    time.tv_nsec = (long)((until - (double)time.tv_sec) * 1e9);
    return pthread_cond_timedwait(condition, mutex, &time) == 0;
}

struct nw_pool *nw_pool_new(size_t limit) {
    struct nw_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->mutex, NULL);
    nw_condition_init(&pool->changed);
    pool->limit = limit;
    pool->next_number = 1;
    pool->is_wanted = true;
    pthread_mutex_lock(&pools_mutex);
    pool->next = pools;
    if (pools) pools->previous = pool;
    pools = pool;
    pthread_mutex_unlock(&pools_mutex);
    return pool;
}

static void give_to_system(struct nw_buffer *buffer) {
    munmap(buffer->address, buffer->capacity);
    close(buffer->fd);
    free(buffer);
}

// Buffers that were taken out of the pool, without its mutex: the system takes its time over gigabytes.
static void give_all_to_system(struct nw_buffer *first) {
    while (first) {
        struct nw_buffer *next = first->next;
        give_to_system(first);
        first = next;
    }
}

static void end_if_unwanted(struct nw_pool *pool) {
    bool is_over = !pool->is_wanted && pool->buffers == 0;
    pthread_mutex_unlock(&pool->mutex);
    if (!is_over) return;
    pthread_mutex_lock(&pools_mutex);
    if (pool->previous) pool->previous->next = pool->next; else pools = pool->next;
    if (pool->next) pool->next->previous = pool->previous;
    pthread_mutex_unlock(&pools_mutex);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->changed);
    free(pool);
}

// Takes a free buffer out of the list that `place` points to; one that CUDA knows is left to `retired`.
static void let_go(struct nw_pool *pool, struct nw_buffer **place, struct nw_buffer **gone) {
    struct nw_buffer *buffer = *place, **list = buffer->is_pinned ? &pool->retired : gone;
    *place = buffer->next;
    buffer->next = *list;
    *list = buffer;
    if (list == gone) pool->buffers--;
}

void nw_pool_free(struct nw_pool *pool) {
    if (pool->is_forked) return;
    struct nw_buffer *gone = NULL;
    pthread_mutex_lock(&pool->mutex);
    pool->is_wanted = false;
    while (pool->free) {
        // The process ends, or nothing of CUDA is left to ask: the driver lets go of it with the mapping.
        pool->free->is_pinned = false;
        let_go(pool, &pool->free, &gone);
    }
    end_if_unwanted(pool);
    give_all_to_system(gone);
}

// A buffer is a descriptor, and the trainer needs descriptors for its own files.
static size_t most_buffers(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return SIZE_MAX;
    return (size_t)(limit.rlim_cur / SHARE_OF_DESCRIPTORS) + 1;
}

static struct nw_buffer *new_buffer(size_t capacity) {
    struct nw_buffer *buffer = calloc(1, sizeof *buffer);
    if (!buffer) return NULL;
    buffer->capacity = capacity;
    buffer->is_fresh = true;
    buffer->references = 1;
    buffer->fd = memfd_create("noether-writer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (buffer->fd >= 0) {
        if (ftruncate(buffer->fd, (off_t)capacity) == 0 &&
            fcntl(buffer->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0) {
            buffer->address = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_SHARED, buffer->fd, 0);
            if (buffer->address != MAP_FAILED) return buffer;
        }
        int error = errno;
        close(buffer->fd);
        errno = error;
    }
    int error = errno;
    free(buffer);
    errno = error;
    return NULL;
}

enum nw_take nw_pool_take(struct nw_pool *pool, size_t needed, struct nw_buffer **found, size_t *wanted) {
    struct nw_buffer *gone = NULL;
    enum nw_take result = NW_TAKEN;
    pthread_mutex_lock(&pool->mutex);
    struct nw_buffer **best = NULL;
    size_t free_bytes = 0, free_count = 0;
    for (struct nw_buffer **place = &pool->free; *place; place = &(*place)->next) {
        size_t capacity = (*place)->capacity;
        free_bytes += capacity;
        free_count++;
        if (needed <= capacity && capacity <= 2 * needed + ROUND_BYTES && (!best || capacity < (*best)->capacity))
            best = place;
    }
    if (best) {
        *found = *best;
        *best = (*best)->next;
        (*found)->next = NULL;
        (*found)->references = 1;
    } else {
        size_t most = most_buffers();
        while (pool->free && (pool->held + free_bytes + needed > pool->limit || pool->out + free_count >= most)) {
            struct nw_buffer **last = &pool->free;
            while ((*last)->next) last = &(*last)->next;
            free_bytes -= (*last)->capacity;
            free_count--;
            let_go(pool, last, &gone);
        }
        size_t capacity = needed + needed / 64 + SLACK_BYTES;
        *wanted = capacity = (capacity + ROUND_BYTES - 1) / ROUND_BYTES * ROUND_BYTES;
        // guard: pool-bounded (never)
        if (pool->out && (needed > pool->limit || pool->held > pool->limit - needed || pool->out >= most)) {
            result = NW_POOL_FULL;
        } else if ((*found = new_buffer(capacity))) {
            (*found)->pool = pool;
            (*found)->number = pool->next_number++;
            pool->buffers++;
        } else {
            result = NW_NO_MEMORY;
        }
    }
    int error = errno;
    if (result == NW_TAKEN) {
        pool->out++;
        pool->held += (*found)->capacity;
    }
    pthread_mutex_unlock(&pool->mutex);
    give_all_to_system(gone);
    errno = error;
    return result;
}

void nw_pool_set_limit(struct nw_pool *pool, size_t limit) {
    pthread_mutex_lock(&pool->mutex);
    pool->limit = limit;
    pthread_mutex_unlock(&pool->mutex);
}

uint64_t nw_pool_returns(struct nw_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    uint64_t returns = pool->returns;
    pthread_mutex_unlock(&pool->mutex);
    return returns;
}

uint64_t nw_pool_wait(struct nw_pool *pool, uint64_t seen, double seconds) {
    double until = nw_now() + seconds;
    pthread_mutex_lock(&pool->mutex);
    while (pool->returns == seen && nw_condition_wait(&pool->changed, &pool->mutex, until)) {}
    uint64_t returns = pool->returns;
    pthread_mutex_unlock(&pool->mutex);
    return returns;
}

double nw_pool_shrink(struct nw_pool *pool, double idle) {
    struct nw_buffer *gone = NULL;
    double now = nw_now(), next = -1;
    pthread_mutex_lock(&pool->mutex);
    for (struct nw_buffer **place = &pool->free; *place;) {
        double left = (*place)->free_since + idle - now;
        if (left <= 0) {
            let_go(pool, place, &gone);
        } else {
            if (next < 0 || left < next) next = left;
            place = &(*place)->next;
        }
    }
    pthread_mutex_unlock(&pool->mutex);
    give_all_to_system(gone);
    return next;
}

struct nw_buffer *nw_pool_retired(struct nw_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    struct nw_buffer *buffer = pool->retired;
    if (buffer) {
        pool->retired = buffer->next;
        buffer->next = NULL;
        buffer->references = 1;
        pool->out++;
        pool->held += buffer->capacity;
    }
    pthread_mutex_unlock(&pool->mutex);
    return buffer;
}

struct nw_pool_sizes nw_pool_sizes(struct nw_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    struct nw_pool_sizes sizes = {pool->limit, pool->held, pool->held, pool->out};
    for (struct nw_buffer *buffer = pool->free; buffer; buffer = buffer->next) sizes.all += buffer->capacity;
    for (struct nw_buffer *buffer = pool->retired; buffer; buffer = buffer->next) sizes.all += buffer->capacity;
    pthread_mutex_unlock(&pool->mutex);
    return sizes;
}

void nw_pools_forget(void) {
    // Whoever held a mutex is not in this process.
    pthread_mutex_init(&pools_mutex, NULL);
    for (struct nw_pool *pool = pools; pool; pool = pool->next) {
        pthread_mutex_init(&pool->mutex, NULL);
        nw_condition_init(&pool->changed);
        pool->is_forked = true;
    }
    pools = NULL;
}

bool nw_pool_is_forked(const struct nw_pool *pool) { return pool->is_forked; }

void nw_buffer_keep(struct nw_buffer *buffer) {
    if (buffer->pool->is_forked) return;
    pthread_mutex_lock(&buffer->pool->mutex);
    buffer->references++;
    pthread_mutex_unlock(&buffer->pool->mutex);
}

static void drop(struct nw_buffer *buffer, bool reuse) {
    struct nw_pool *pool = buffer->pool;
    // Of the parent: its lists are as they happened to be when it forked.
    if (pool->is_forked) return;
    pthread_mutex_lock(&pool->mutex);
    if (--buffer->references) {
        pthread_mutex_unlock(&pool->mutex);
        return;
    }
    struct nw_buffer *gone = NULL;
    pool->out--;
    pool->held -= buffer->capacity;
    buffer->free_since = nw_now();
    buffer->next = pool->free;
    pool->free = buffer;
    if (!reuse || buffer->is_spoilt || !pool->is_wanted) let_go(pool, &pool->free, &gone);
    pool->returns++;
    pthread_cond_broadcast(&pool->changed);
    end_if_unwanted(pool);
    give_all_to_system(gone);
}

void nw_buffer_drop(struct nw_buffer *buffer) { drop(buffer, true); }

void nw_buffer_destroy(struct nw_buffer *buffer) {
    buffer->is_pinned = false;
    drop(buffer, false);
}
