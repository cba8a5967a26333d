// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "noether_pages.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

// From Linux 6.7's linux/userfaultfd.h and linux/fs.h; the headers may be older than the kernel that this runs on.
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
static const uint64_t WP_UNPOPULATED = 1 << 13, WP_ASYNC = 1 << 15;

struct page_region_6_7 {
    uint64_t start, end, categories;
};
struct pm_scan_arg_6_7 {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define PAGEMAP_SCAN_6_7 _IOWR('f', 16, struct pm_scan_arg_6_7)
enum { SCAN_WP_MATCHING = 1 << 0 };
enum { IS_WPALLOWED = 1 << 0, IS_WRITTEN = 1 << 1, IS_PRESENT = 1 << 3, IS_SWAPPED = 1 << 4 };

// Ranges so near to each other are watched together with what lies between: two pages where mappings of malloc's meet,
// or small tensors. Each one more would be another mapping of the process's for the time, and two more calls; a write
// between costs a fault.
enum { GAP_PAGES = 16 };
// Unregistering stops every thread that maps memory: a millisecond or two at a time. Ends at a huge page's border,
// which would otherwise be split.
enum { PIECE_BYTES = 32 << 20, HUGE_BYTES = 2 << 20 };

struct span {
    uint64_t start, end;
};

struct nw_pages {
    struct nw_pages *next;
    uint64_t generation;
    // The caller's ranges, without what shares its page with others; empty if not watched.
    struct span *ranges;
    uint64_t count;
    // What is registered for them: in order, and apart.
    struct span *regions;
    uint64_t regions_count;
    // A bit for each page of the regions, one region after the other: written before another watch protected it anew.
    uint64_t *written;
    bool has_written;
};

// Memory belongs to one userfaultfd only, so that there is one a process for all watches: open as long as there are
// some.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static struct nw_pages *watches;
// Those in `watches`, and those that are about to end.
static uint64_t users;
static int faults = -1, pagemap = -1;
// Of a process: a child has another than its parent.
static uint64_t generation;

static uint64_t page_bytes(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

// ---- The kernel.

static void close_all(void) {
    if (faults >= 0) close(faults);
    if (pagemap >= 0) close(pagemap);
    faults = pagemap = -1;
}

// A child has the descriptors, which are about the parent's memory, and none of the protection.
static void before_fork(void) { pthread_mutex_lock(&lock); }
static void after_fork(void) { pthread_mutex_unlock(&lock); }
static void after_fork_in_child(void) {
    close_all();
    watches = NULL, users = 0, generation++;
    pthread_mutex_unlock(&lock);
}
static void at_first(void) { pthread_atfork(before_fork, after_fork, after_fork_in_child); }

// Pages between `start` and `end` as they are told, a stretch at a time. Protects them in the same step, if asked to,
// so that no write falls between.
static int scan(uint64_t start, uint64_t end, struct pm_scan_arg_6_7 about,
                void (*tell)(struct span, uint64_t categories, void *argument), void *argument) {
    struct page_region_6_7 found[256];
    while (start < end) {
        struct pm_scan_arg_6_7 request = about;
        request.size = sizeof request, request.start = start, request.end = end;
        request.vec = (uintptr_t)found, request.vec_len = sizeof found / sizeof *found;
        int count = ioctl(pagemap, PAGEMAP_SCAN_6_7, &request);
        if (count < 0) return -1;
        for (int i = 0; i < count; i++)
            tell((struct span){found[i].start, found[i].end}, found[i].categories, argument);
        // Not to be relied on without end.
        if (request.walk_end <= start) return errno = EIO, -1;
        start = request.walk_end;
    }
    return 0;
}

static void tell_nobody(struct span found, uint64_t categories, void *argument) {
    (void)found, (void)categories, (void)argument;
}

static int open_all(void) {
    if (faults >= 0) return 0;
    faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (faults < 0) return -1;
    struct uffdio_api api = {.api = UFFD_API, .features = WP_ASYNC | WP_UNPOPULATED};
    // A page, to see that it may be asked: a watch that can't tell in the end would fail every save.
    uint64_t start = (uintptr_t)&watches & -page_bytes();
    struct pm_scan_arg_6_7 any = {.category_mask = IS_PRESENT, .return_mask = IS_PRESENT};
    if (ioctl(faults, UFFDIO_API, &api) == 0 && (pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) >= 0 &&
        scan(start, start + page_bytes(), any, tell_nobody, NULL) == 0)
        return 0;
    int error = errno;
    close_all();
    errno = error;
    return -1;
}

// ---- Which memory.

// The stretches of private anonymous memory. By their mappings, since asynchronous protection takes memory of any kind.
static struct span *private_memory(uint64_t *count) {
    int file = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    if (file < 0) return NULL;
    size_t room = 1 << 18, length = 0, spans_room = 1024;
    char *text = malloc(room);
    struct span *spans = malloc(spans_room * sizeof *spans);
    ssize_t got = -1;
    while (text && (got = read(file, text + length, room - length - 1)) != 0) {
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) break;
        length += (size_t)got;
        if (room - length > 8192) continue;
        char *larger = realloc(text, room *= 2);
        if (!larger) free(text);
        text = larger;
    }
    close(file);
    *count = 0;
    if (text) text[length] = 0;
    // start-end perms offset device inode path
    for (char *line = text; got == 0 && spans && line && *line;) {
        char *at, *end_of_line = strchrnul(line, '\n');
        uint64_t start = strtoull(line, &at, 16), end = strtoull(at + 1, &at, 16);
        bool is_private = at[4] == 'p';
        strtoull(at + 5, &at, 16);
        at = strchrnul(at + 1, ' ');
        bool has_file = strtoull(at, NULL, 10) != 0;
        line = *end_of_line ? end_of_line + 1 : end_of_line;
        if (!is_private || has_file) continue;
        if (*count && spans[*count - 1].end == start) {
            spans[*count - 1].end = end;
            continue;
        }
        if (*count == spans_room) {
            struct span *larger = realloc(spans, (spans_room *= 2) * sizeof *spans);
            if (!larger) free(spans);
            if (!(spans = larger)) break;
        }
        spans[(*count)++] = (struct span){start, end};
    }
    free(text);
    if (got == 0) return spans;
    free(spans);
    return NULL;
}

static int by_start(const void *a, const void *b) {
    uint64_t one = ((const struct span *)a)->start, other = ((const struct span *)b)->start;
    return (one > other) - (one < other);
}

// The last span that begins at `at` or before; spans in order.
static const struct span *span_at(const struct span *spans, uint64_t count, uint64_t at) {
    uint64_t low = 0, high = count;
    while (low < high) {
        uint64_t middle = (low + high) / 2;
        if (spans[middle].start <= at) low = middle + 1; else high = middle;
    }
    return low ? &spans[low - 1] : NULL;
}

static bool is_inside(struct span inner, const struct span *outer) { return outer && inner.end <= outer->end; }

uint64_t nw_pages_inner(uint64_t start, uint64_t length, uint64_t *inner_length) {
    uint64_t page = page_bytes(), first = (start + page - 1) & -page, end = (start + length) & -page;
    *inner_length = end > first ? end - first : 0;
    return first;
}

// ---- Watches.

// The bit of the page at `address`, which is in a region.
static uint64_t bit_of(const struct nw_pages *pages, uint64_t address) {
    uint64_t before = 0;
    const struct span *region = span_at(pages->regions, pages->regions_count, address);
    for (const struct span *other = pages->regions; other < region; other++) before += other->end - other->start;
    return (before + address - region->start) / page_bytes();
}

static bool bit(const struct nw_pages *pages, uint64_t at) { return pages->written[at / 64] >> at % 64 & 1; }

// For a new watch that protects pages anew: those that were written are so for the others.
static void tell_others(struct span found, uint64_t categories, void *argument) {
    (void)argument;
    if (!(categories & IS_WRITTEN) && categories & (IS_PRESENT | IS_SWAPPED)) return;
    for (struct nw_pages *other = watches; other; other = other->next)
        for (uint64_t i = 0; i < other->regions_count; i++) {
            struct span region = other->regions[i];
            uint64_t start = found.start > region.start ? found.start : region.start;
            uint64_t end = found.end < region.end ? found.end : region.end;
            if (start >= end) continue;
            uint64_t first = bit_of(other, start), pages = (end - start) / page_bytes();
            for (uint64_t at = first; at < first + pages; at++) other->written[at / 64] |= (uint64_t)1 << at % 64;
            other->has_written = true;
        }
}

static int protect(struct span region) {
    struct uffdio_register request = {
        .range = {region.start, region.end - region.start}, .mode = UFFDIO_REGISTER_MODE_WP};
    if (ioctl(faults, UFFDIO_REGISTER, &request) != 0) return -1;
    // In one step, so that the others miss no write.
    struct pm_scan_arg_6_7 all = {
        .flags = SCAN_WP_MATCHING, .category_mask = IS_WPALLOWED, .return_mask = IS_WRITTEN | IS_PRESENT | IS_SWAPPED};
    if (watches && scan(region.start, region.end, all, tell_others, NULL) != 0) return -1;
    // The scan alone is not enough: a page that the kernel is moving meanwhile (compaction) loses the protection when
    // it arrives, if it could be written before, and would count as changed (seen with Linux 6.18; the others have been
    // told of such a page). This call protects it for good.
    struct uffdio_writeprotect now = {.range = request.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    return ioctl(faults, UFFDIO_WRITEPROTECT, &now);
}

// What none of these watches has.
static void unprotect(struct span region, const struct nw_pages *others) {
    for (; others; others = others->next)
        for (uint64_t i = 0; i < others->regions_count; i++) {
            struct span kept = others->regions[i];
            if (kept.end <= region.start) continue;
            if (kept.start >= region.end) break;
            if (region.start < kept.start) unprotect((struct span){region.start, kept.start}, others->next);
            region.start = kept.end;
            if (region.start >= region.end) return;
        }
    // Refused where the memory is gone, and its protection with it.
    struct uffdio_range range = {region.start, region.end - region.start};
    ioctl(faults, UFFDIO_UNREGISTER, &range);
}

static void release(void) {
    if (--users == 0) close_all();
}

static void discard(struct nw_pages *pages) {
    int error = errno;
    if (pages) free(pages->ranges), free(pages->regions), free(pages->written);
    free(pages);
    errno = error;
}

// The caller's ranges as far as they can be watched, and the regions that they are in.
static struct nw_pages *plan(const uint64_t *starts, const uint64_t *lengths, uint64_t count) {
    struct nw_pages *pages = calloc(1, sizeof *pages);
    uint64_t memory_count;
    struct span *memory = private_memory(&memory_count);
    if (pages && memory) {
        pages->count = count;
        pages->ranges = calloc(count + 1, sizeof *pages->ranges);
        pages->regions = calloc(count + 1, sizeof *pages->regions);
    }
    if (!pages || !memory || !pages->ranges || !pages->regions) {
        int error = errno;
        free(memory);
        errno = error;
        return discard(pages), NULL;
    }
    uint64_t found = 0, total = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t length, start = nw_pages_inner(starts[i], lengths[i], &length);
        struct span range = {start, start + length};
        if (length == 0 || !is_inside(range, span_at(memory, memory_count, start))) continue;
        pages->ranges[i] = pages->regions[found++] = range;
    }
    qsort(pages->regions, found, sizeof *pages->regions, by_start);
    for (uint64_t i = 0; i < found; i++) {
        struct span next = pages->regions[i],
                    *last = pages->regions_count ? &pages->regions[pages->regions_count - 1] : NULL;
        bool is_near = last && (next.start <= last->end || next.start - last->end <= GAP_PAGES * page_bytes());
        if (!is_near || !is_inside(next, span_at(memory, memory_count, last->start)))
            pages->regions[pages->regions_count++] = next;
        else if (last->end < next.end)
            last->end = next.end;
    }
    free(memory);
    for (uint64_t i = 0; i < pages->regions_count; i++) total += pages->regions[i].end - pages->regions[i].start;
    pages->written = calloc(total / page_bytes() / 64 + 1, sizeof *pages->written);
    if (pages->written && pages->regions_count) return pages;
    if (pages->written) errno = ENOTSUP;
    return discard(pages), NULL;
}

struct nw_pages *nw_pages_watch(const uint64_t *starts, const uint64_t *lengths, uint64_t count,
                                unsigned char *watched) {
    if (count) memset(watched, 0, count);
    pthread_once(&once, at_first);
    struct nw_pages *pages = plan(starts, lengths, count);
    if (!pages) return NULL;
    pthread_mutex_lock(&lock);
    int error = 0;
    uint64_t kept = 0;
    if (open_all() != 0) {
        error = errno;
    } else {
        pages->generation = generation;
        users++;
        for (uint64_t i = 0; i < pages->regions_count; i++) {
            struct span region = pages->regions[i];
            if (protect(region) == 0) {
                pages->regions[kept++] = region;
            } else {
                error = errno;
                unprotect(region, watches);
            }
        }
        pages->regions_count = kept;
        if (kept) {
            pages->next = watches;
            watches = pages;
        } else {
            release();
        }
    }
    pthread_mutex_unlock(&lock);
    if (!kept) {
        discard(pages);
        errno = error;
        return NULL;
    }
    for (uint64_t i = 0; i < count; i++) {
        struct span *range = &pages->ranges[i];
        watched[i] = range->end && is_inside(*range, span_at(pages->regions, pages->regions_count, range->start));
        if (!watched[i]) *range = (struct span){0, 0};
    }
    return pages;
}

// Under the lock; whether `pages` are of this process.
static bool is_ours(const struct nw_pages *pages) { return pages->generation == generation; }

struct unchanged {
    const struct nw_pages *pages;
    uint64_t count;
};

static void count_unchanged(struct span found, uint64_t categories, void *argument) {
    (void)categories;
    struct unchanged *unchanged = argument;
    uint64_t count = (found.end - found.start) / page_bytes();
    unchanged->count += count;
    if (!unchanged->pages->has_written) return;
    uint64_t first = bit_of(unchanged->pages, found.start);
    for (uint64_t at = first; at < first + count; at++) unchanged->count -= bit(unchanged->pages, at);
}

int64_t nw_pages_changed(struct nw_pages *pages, uint64_t *changed) {
    // Those that are there and protected are as they were. What isn't mapped, or not by the mapping of then, isn't
    // among them, whatever a kernel says of pages that it doesn't have.
    struct pm_scan_arg_6_7 protected = {.category_mask = IS_WPALLOWED | IS_WRITTEN,
                                        .category_inverted = IS_WRITTEN,
                                        .category_anyof_mask = IS_PRESENT | IS_SWAPPED,
                                        .return_mask = IS_WPALLOWED};
    int64_t total = 0;
    pthread_mutex_lock(&lock);
    if (!is_ours(pages)) total = -1, errno = ECHILD;
    for (uint64_t i = 0; i < pages->count && total >= 0; i++) {
        struct span range = pages->ranges[i];
        struct unchanged unchanged = {pages, 0};
        if (scan(range.start, range.end, protected, count_unchanged, &unchanged) != 0) {
            total = -1;
            break;
        }
        uint64_t count = (range.end - range.start) / page_bytes() - unchanged.count;
        if (changed) changed[i] = count;
        total += (int64_t)count;
    }
    int error = errno;
    pthread_mutex_unlock(&lock);
    errno = error;
    return total;
}

void nw_pages_end(struct nw_pages *pages) {
    if (!pages) return;
    pthread_mutex_lock(&lock);
    for (struct nw_pages **at = &watches; *at; at = &(*at)->next)
        if (*at == pages) {
            *at = pages->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    for (uint64_t i = 0; i < pages->regions_count; i++) {
        struct span left = pages->regions[i];
        while (left.start < left.end) {
            struct span piece = left;
            if (left.end - left.start > 2 * PIECE_BYTES) piece.end = (left.start + PIECE_BYTES) & -(uint64_t)HUGE_BYTES;
            // Anew each time: another watch may have begun since, of the same memory.
            pthread_mutex_lock(&lock);
            if (is_ours(pages)) unprotect(piece, watches);
            pthread_mutex_unlock(&lock);
            left.start = piece.end;
        }
    }
    pthread_mutex_lock(&lock);
    if (is_ours(pages)) release();
    pthread_mutex_unlock(&lock);
    discard(pages);
}
