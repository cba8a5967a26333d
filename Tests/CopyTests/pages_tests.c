// SPDX-License-Identifier: Apache-2.0
// Sources/CCopy/pages.c on the kernel that is there: what is written in any way is told, and nothing stays behind.
#define _GNU_SOURCE
#include "noether_pages.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

enum { HUGE_BYTES = 2 << 20 };
// Linux 6.1's, which glibc may not know.
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
static uint64_t page;

static unsigned char *map(uint64_t pages, int flags, int file) {
    unsigned char *memory = mmap(0, pages * page, PROT_READ | PROT_WRITE, flags, file, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

// Private memory with a value in each page. PROT_NONE before and behind it, so that it is a mapping of its own.
static unsigned char *fresh(uint64_t pages) {
    unsigned char *memory = map(pages + 2, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    CHECK(mprotect(memory, page, PROT_NONE) == 0 && mprotect(memory + (pages + 1) * page, page, PROT_NONE) == 0);
    memory += page;
    for (uint64_t i = 0; i < pages; i++) memory[i * page] = (unsigned char)(i + 1);
    return memory;
}

static void drop(unsigned char *memory, uint64_t pages) { munmap(memory - page, (pages + 2) * page); }

static struct nw_pages *watch(const void *memory, uint64_t length) {
    unsigned char watched;
    struct nw_pages *pages = nw_pages_watch(&(uint64_t){(uintptr_t)memory}, &length, 1, &watched);
    CHECK(watched == (pages != NULL));
    return pages;
}

static int64_t changed(struct nw_pages *pages) { return nw_pages_changed(pages, NULL); }

// How many mappings are under anyone's write protection, and how many descriptors are open.
static int protected_mappings(void) {
    FILE *file = fopen("/proc/self/smaps", "re");
    char line[512];
    int count = 0;
    while (fgets(line, sizeof line, file)) count += strncmp(line, "VmFlags:", 8) == 0 && strstr(line, " uw");
    fclose(file);
    return count;
}

static int descriptors(void) {
    int count = 0;
    for (int i = 0; i < 256; i++) count += fcntl(i, F_GETFD) >= 0;
    return count;
}

// Runs it in a child, which ends with 0 if all is as promised.
static void in_child(void (*test)(void *), void *argument) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        test(argument);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static void test_inner(void) {
    uint64_t length;
    CHECK(nw_pages_inner(7 * page, 2 * page, &length) == 7 * page && length == 2 * page);
    CHECK(nw_pages_inner(7 * page + 1, 2 * page, &length) == 8 * page && length == page);
    CHECK(nw_pages_inner(7 * page - 1, 2 * page + 2, &length) == 7 * page && length == 2 * page);
    nw_pages_inner(7 * page + 1, 2 * page - 2, &length);
    CHECK(length == 0);
    nw_pages_inner(7 * page + 5, 9, &length);
    CHECK(length == 0);
    nw_pages_inner(0, 0, &length);
    CHECK(length == 0);
}

static void test_each_page(void) {
    unsigned char *memory = fresh(64);
    for (uint64_t i = 0; i < 64; i++) {
        struct nw_pages *pages = watch(memory, 64 * page);
        CHECK(pages && changed(pages) == 0);
        memory[i * page + i * 63] ^= 1;
        CHECK(changed(pages) == 1 && changed(pages) == 1);
        memory[(i + 7) % 64 * page] ^= 1;
        CHECK(changed(pages) == 2);
        nw_pages_end(pages);
    }
    // Reading changes nothing, and neither does a mapping's protection.
    struct nw_pages *pages = watch(memory, 64 * page);
    unsigned sum = 0;
    for (uint64_t i = 0; i < 64; i++) sum += *(volatile unsigned char *)(memory + i * page);
    CHECK(sum && mprotect(memory, 64 * page, PROT_READ) == 0 &&
          mprotect(memory, 64 * page, PROT_READ | PROT_WRITE) == 0);
    CHECK(changed(pages) == 0);
    memset(memory, 5, 64 * page);
    CHECK(changed(pages) == 64);
    nw_pages_end(pages);
    drop(memory, 64);
}

// Each range by itself, whatever lies between; a first and a last page that are others' as well are not watched.
static void test_ranges(void) {
    unsigned char *memory = fresh(200);
    uint64_t base = (uintptr_t)memory;
    uint64_t starts[] = {base + 150 * page, base + 100, base + 5 * page, base + 4 * page + 1,
                         base + 60 * page,  base + 9,   base + 7 * page};
    uint64_t lengths[] = {50 * page, 4 * page, 3 * page, 10 * page, 0, 100, 2 * page};
    unsigned char watched[7];
    struct nw_pages *pages = nw_pages_watch(starts, lengths, 7, watched);
    CHECK(pages && memcmp(watched, "\1\1\1\1\0\0\1", 7) == 0);
    uint64_t counts[7];
    memory[50] = memory[4 * page + 50] = memory[8 * page - 1] = memory[14 * page] = memory[16 * page] =
        memory[149 * page] = 9;
    CHECK(nw_pages_changed(pages, counts) == 3);
    CHECK(counts[0] == 0 && counts[1] == 0 && counts[2] == 1 && counts[3] == 1 && counts[4] == 0 && counts[5] == 0 &&
          counts[6] == 1);
    memory[page] = memory[3 * page] = memory[6 * page] = memory[13 * page] = memory[199 * page] = 9;
    CHECK(nw_pages_changed(pages, counts) == 9);
    CHECK(counts[0] == 1 && counts[1] == 2 && counts[2] == 2 && counts[3] == 3);
    nw_pages_end(pages);
    CHECK(protected_mappings() == 0);
    drop(memory, 200);
}

static void test_nothing_to_watch(void) {
    unsigned char watched = 7;
    errno = 0;
    CHECK(!nw_pages_watch(NULL, NULL, 0, NULL) && errno == ENOTSUP);
    CHECK(!nw_pages_watch(&(uint64_t){4}, &(uint64_t){8}, 1, &watched) && watched == 0 && errno == ENOTSUP);
    nw_pages_end(NULL);
}

// Never touched: nothing is there that could be protected, and reading makes pages of zeros.
static void test_untouched_memory(void) {
    unsigned char *memory = map(3 * HUGE_BYTES / page, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    struct nw_pages *pages = watch(memory, 3 * HUGE_BYTES);
    CHECK(changed(pages) == 0);
    CHECK(*(volatile unsigned char *)memory == 0 && changed(pages) == 0);
    memory[0] = memory[HUGE_BYTES + 5 * page] = 1;
    CHECK(changed(pages) == 2);
    nw_pages_end(pages);
    munmap(memory, 3 * HUGE_BYTES);
}

static void test_huge_pages(void) {
    unsigned char *mapping = map(4 * HUGE_BYTES / page, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    unsigned char *memory = (unsigned char *)(((uintptr_t)mapping + HUGE_BYTES - 1) & -(uintptr_t)HUGE_BYTES);
    madvise(memory, 3 * HUGE_BYTES, MADV_HUGEPAGE);
    memset(memory, 1, 3 * HUGE_BYTES);
    struct nw_pages *pages = watch(memory + page, 3 * HUGE_BYTES - 2 * page);
    CHECK(changed(pages) == 0);
    memory[0] = memory[3 * HUGE_BYTES - 1] = 2;
    CHECK(changed(pages) == 0);
    memory[page] = memory[HUGE_BYTES + 100 * page] = memory[2 * HUGE_BYTES] = 2;
    CHECK(changed(pages) == 3);
    nw_pages_end(pages);
    // Given back whole: no page is left that could say so.
    memset(memory, 1, 3 * HUGE_BYTES);
    madvise(memory, 3 * HUGE_BYTES, MADV_COLLAPSE);
    pages = watch(memory, 3 * HUGE_BYTES);
    CHECK(changed(pages) == 0);
    CHECK(madvise(memory + HUGE_BYTES, HUGE_BYTES, MADV_DONTNEED) == 0);
    CHECK(changed(pages) == (int64_t)(HUGE_BYTES / page));
    // Nor does it make a huge page, unseen, of those that are watched.
    madvise(memory, 3 * HUGE_BYTES, MADV_COLLAPSE);
    CHECK(changed(pages) == (int64_t)(HUGE_BYTES / page));
    nw_pages_end(pages);
    munmap(mapping, 4 * HUGE_BYTES);
}

static void test_the_kernel_writes(void) {
    unsigned char *memory = fresh(16), bytes[16] = {1, 2, 3};
    int ends[2];
    struct nw_pages *pages = watch(memory, 16 * page);
    CHECK(pipe2(ends, O_CLOEXEC) == 0 && write(ends[1], bytes, 16) == 16);
    CHECK(read(ends[0], memory + 3 * page - 8, 16) == 16);
    CHECK(changed(pages) == 2 && memory[3 * page - 8] == 1);
    struct iovec from = {bytes, 16}, to = {memory + 9 * page, 16};
    CHECK(process_vm_writev(getpid(), &from, 1, &to, 1, 0) == 16);
    CHECK(changed(pages) == 3);
    close(ends[0]), close(ends[1]);
    nw_pages_end(pages);
    drop(memory, 16);
}

// What another mapping, a file or a process could change is not taken, and those beside it are.
static void test_kinds_of_memory(void) {
    FILE *named = tmpfile();
    CHECK(named && ftruncate(fileno(named), 8 * (off_t)page) == 0);
    int sealed = memfd_create("pages", MFD_CLOEXEC);
    CHECK(sealed >= 0 && ftruncate(sealed, 8 * (off_t)page) == 0);
    unsigned char *private = fresh(8);
    int segment = shmget(IPC_PRIVATE, 8 * page, 0600);
    CHECK(segment >= 0);
    // In the list of mappings a segment's number is where others have their file's: 0 for a machine's first.
    unsigned char *attached = shmat(segment, NULL, 0);
    CHECK(attached != (void *)-1 && shmctl(segment, IPC_RMID, NULL) == 0);
    unsigned char *others[] = {attached,
                               map(8, MAP_SHARED | MAP_ANONYMOUS, -1),
                               map(8, MAP_SHARED, fileno(named)),
                               map(8, MAP_PRIVATE, fileno(named)),
                               map(8, MAP_SHARED, sealed),
                               map(8, MAP_PRIVATE, sealed)};
    for (int i = 0; i < 6; i++) {
        errno = 0;
        CHECK(!watch(others[i], 8 * page) && errno == ENOTSUP);
        uint64_t starts[] = {(uintptr_t)others[i], (uintptr_t)private};
        unsigned char watched[2];
        struct nw_pages *pages = nw_pages_watch(starts, (uint64_t[]){8 * page, 8 * page}, 2, watched);
        CHECK(pages && !watched[0] && watched[1]);
        private[0]++, others[i][0]++;
        uint64_t counts[2];
        CHECK(nw_pages_changed(pages, counts) == 1 && counts[0] == 0 && counts[1] == 1);
        nw_pages_end(pages);
        if (i == 0) shmdt(attached); else munmap(others[i], 8 * page);
    }
    // A range that ends where nothing is mapped, or in memory of another kind.
    CHECK(munmap(private + 8 * page, page) == 0);
    CHECK(!watch(private, 9 * page) && errno == ENOTSUP);
    CHECK(mmap(private + 8 * page, page, PROT_READ, MAP_SHARED | MAP_FIXED, sealed, 0) != MAP_FAILED);
    CHECK(!watch(private, 9 * page) && errno == ENOTSUP);
    // Two mappings of the right kind beside each other are one range.
    CHECK(mprotect(private + 4 * page, page, PROT_READ) == 0);
    struct nw_pages *pages = watch(private, 8 * page);
    CHECK(pages && changed(pages) == 0);
    private[3 * page] = private[5 * page] = 1;
    CHECK(changed(pages) == 2);
    nw_pages_end(pages);
    drop(private, 8);
    fclose(named), close(sealed);
}

static void test_memory_of_another_userfaultfd(void) {
    // Far enough from each other not to be watched as one.
    unsigned char *memory = fresh(64), *free_memory = memory + 50 * page;
    int other = (int)syscall(SYS_userfaultfd, O_CLOEXEC | 1);
    CHECK(ioctl(other, UFFDIO_API, &(struct uffdio_api){.api = UFFD_API}) == 0);
    struct uffdio_register theirs = {.range = {(uintptr_t)memory, 8 * page}, .mode = UFFDIO_REGISTER_MODE_WP};
    CHECK(ioctl(other, UFFDIO_REGISTER, &theirs) == 0);
    int open = descriptors();
    CHECK(!watch(memory, 8 * page) && errno == EBUSY && descriptors() == open);
    uint64_t starts[] = {(uintptr_t)memory, (uintptr_t)free_memory};
    unsigned char watched[2];
    struct nw_pages *pages = nw_pages_watch(starts, (uint64_t[]){8 * page, 8 * page}, 2, watched);
    CHECK(pages && !watched[0] && watched[1]);
    memory[0]++, free_memory[0]++;
    CHECK(changed(pages) == 1);
    nw_pages_end(pages);
    CHECK(protected_mappings() == 1);
    close(other);
    drop(memory, 64);
}

// Freed, given to another, moved: no page of it can be vouched for.
static void test_memory_that_is_gone(void) {
    unsigned char *memory = fresh(16);
    struct nw_pages *pages = watch(memory, 16 * page);
    CHECK(madvise(memory, page, MADV_DONTNEED) == 0 && changed(pages) == 1);
    CHECK(munmap(memory + 4 * page, 4 * page) == 0 && changed(pages) == 5);
    CHECK(mmap(memory + 4 * page, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
          MAP_FAILED);
    CHECK(changed(pages) == 5);
    memory[4 * page] = 1;
    CHECK(changed(pages) == 5);
    unsigned char *elsewhere = map(2, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    unsigned char *moved = mremap(memory + 12 * page, 2 * page, 2 * page, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere);
    CHECK(moved != MAP_FAILED && moved[0] == 13 && changed(pages) == 7);
    moved[0] = 1;
    CHECK(changed(pages) == 7);
    drop(memory, 16);
    CHECK(changed(pages) == 16);
    nw_pages_end(pages);
    munmap(moved, 2 * page);
    CHECK(protected_mappings() == 0);
}

static void test_watches_that_overlap(void) {
    for (int order = 0; order < 2; order++) {
        unsigned char *memory = fresh(300);
        struct nw_pages *early = watch(memory, 200 * page);
        memory[0] = memory[120 * page] = 7;
        struct nw_pages *late = watch(memory + 100 * page, 200 * page);
        // The second doesn't make the first forget, and doesn't see what came before it.
        CHECK(changed(early) == 2 && changed(late) == 0);
        memory[50 * page] = memory[120 * page] = memory[150 * page] = memory[250 * page] = 8;
        CHECK(changed(early) == 4 && changed(late) == 3);
        struct nw_pages *third = watch(memory + 149 * page, 2 * page);
        CHECK(changed(early) == 4 && changed(late) == 3 && changed(third) == 0);
        CHECK(madvise(memory + 160 * page, page, MADV_DONTNEED) == 0);
        struct nw_pages *fourth = watch(memory + 150 * page, 20 * page);
        CHECK(changed(early) == 5 && changed(late) == 4 && changed(third) == 0 && changed(fourth) == 0);
        nw_pages_end(fourth);
        // One that ends takes nothing from the others.
        struct nw_pages *first = order ? early : late, *last = order ? late : early;
        nw_pages_end(first);
        int64_t before = changed(last);
        memory[110 * page] = memory[150 * page + 1] = memory[199 * page] = 9;
        CHECK(changed(last) == before + 2 && changed(third) == 1);
        nw_pages_end(third);
        memory[149 * page] = 9;
        CHECK(changed(last) == before + 3);
        nw_pages_end(last);
        CHECK(protected_mappings() == 0);
        drop(memory, 300);
    }
}

// Unregistered in pieces.
static void test_large_memory(void) {
    uint64_t count = (200 << 20) / page;
    unsigned char *memory = fresh(count);
    struct nw_pages *pages = watch(memory + 5 * page + 3, (count - 11) * page),
                    *middle = watch(memory + count / 2 * page, 4 * page);
    for (uint64_t i = 0; i < count; i += 2) memory[i * page] = 7;
    CHECK(changed(pages) == (int64_t)(count - 12) / 2 && changed(middle) == 2);
    nw_pages_end(pages);
    CHECK(protected_mappings() == 1);
    memory[(count / 2 + 1) * page] = 7;
    CHECK(changed(middle) == 3);
    nw_pages_end(middle);
    CHECK(protected_mappings() == 0);
    drop(memory, count);
}

struct family {
    unsigned char *memory;
    struct nw_pages *pages;
    int descriptors;
};

static void child_of_a_fork(void *argument) {
    struct family *family = argument;
    CHECK(descriptors() == family->descriptors && protected_mappings() == 0);
    family->memory[3 * page] = family->memory[5 * page] = 1;
    CHECK(changed(family->pages) == -1 && errno == ECHILD);
    struct nw_pages *own = watch(family->memory, 8 * page);
    CHECK(own && changed(own) == 0);
    family->memory[0] = 1;
    CHECK(changed(own) == 1);
    nw_pages_end(family->pages);
    CHECK(changed(own) == 1);
    nw_pages_end(own);
    CHECK(descriptors() == family->descriptors);
}

static void test_fork(void) {
    struct family family = {.memory = fresh(8), .descriptors = descriptors()};
    family.pages = watch(family.memory, 8 * page);
    family.memory[2 * page] = 1;
    in_child(child_of_a_fork, &family);
    CHECK(changed(family.pages) == 1);
    pid_t child = fork();
    if (child == 0) pause(), _exit(0);
    // Of pages that a child has a part in.
    family.memory[2 * page] = family.memory[4 * page] = family.memory[5 * page] = 2;
    CHECK(changed(family.pages) == 3);
    nw_pages_end(family.pages);
    // Over, although the child lives.
    CHECK(protected_mappings() == 0);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    drop(family.memory, 8);
}

// As a container's seccomp profile does: EPERM where the number at `offset` of a system call's description is this one.
static void refuse(uint32_t offset, uint32_t number) {
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offset), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {sizeof rules / sizeof *rules, rules};
    CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

static void refuse_userfaultfd(void *memory) {
    refuse(offsetof(struct seccomp_data, nr), SYS_userfaultfd);
    CHECK(!watch(memory, 8 * page) && errno == EPERM && protected_mappings() == 0);
}

// PAGEMAP_SCAN alone: what was registered before it is given back, and a watch of before can't say that nothing
// changed.
static void refuse_to_scan(void *memory) {
    unsigned char *before = fresh(8);
    struct nw_pages *pages = watch(before, 8 * page);
    CHECK(pages && protected_mappings() == 1);
    refuse(offsetof(struct seccomp_data, args) + 8, 0xc0606610);
    CHECK(!watch(memory, 8 * page) && errno == EPERM && protected_mappings() == 1);
    CHECK(changed(pages) == -1 && errno == EPERM);
    nw_pages_end(pages);
    CHECK(protected_mappings() == 0);
    // Also if it is the first watch, which has nobody to tell of what was written before.
    CHECK(!watch(memory, 8 * page) && errno == EPERM && protected_mappings() == 0);
}

static void run_out_of_descriptors(void *memory) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    int file, last = -1;
    // None is left, one, two: each time a later step is the one that fails.
    limit.rlim_cur = 64;
    CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    while ((file = dup(0)) >= 0) last = file;
    int all = descriptors();
    for (int left = 0; left < 2; left++) {
        CHECK(!watch(memory, 8 * page) && errno == EMFILE);
        close(last - left);
    }
    struct nw_pages *pages = watch(memory, 8 * page);
    CHECK(pages && changed(pages) == 0);
    nw_pages_end(pages);
    CHECK(descriptors() == all - 2);
}

static void test_refusals(void) {
    unsigned char *memory = fresh(8);
    in_child(refuse_userfaultfd, memory);
    in_child(refuse_to_scan, memory);
    in_child(run_out_of_descriptors, memory);
    drop(memory, 8);
}

// Threads write all the time. Two copies, one after the other: a page of which they differ was written between, so that
// it is told.
struct shared {
    _Atomic unsigned *memory, *copies[2];
    uint64_t pages, words;
    atomic_bool stop;
};

static void *write_on(void *argument) {
    struct shared *shared = argument;
    unsigned value = (unsigned)(uintptr_t)&value;
    while (!atomic_load_explicit(&shared->stop, memory_order_relaxed)) {
        value = value * 1664525 + 1013904223;
        atomic_fetch_add_explicit(&shared->memory[(value >> 8) % shared->pages * shared->words], 1,
                                  memory_order_relaxed);
    }
    return NULL;
}

static void *watch_on(void *argument) {
    struct shared *shared = argument;
    struct nw_pages *earlier = NULL;
    while (!atomic_load_explicit(&shared->stop, memory_order_relaxed)) {
        struct nw_pages *pages =
            watch((void *)(shared->memory + shared->pages / 3 * shared->words), shared->pages / 2 * page);
        CHECK(pages && changed(pages) >= 0);
        nw_pages_end(earlier);
        earlier = pages;
    }
    nw_pages_end(earlier);
    return NULL;
}

static void test_threads_that_write(void) {
    struct shared shared = {.pages = 256, .words = page / sizeof(unsigned)};
    shared.memory = (void *)fresh(shared.pages);
    for (int i = 0; i < 2; i++) shared.copies[i] = calloc(shared.pages, sizeof(unsigned));
    uint64_t *starts = calloc(shared.pages, sizeof *starts), *lengths = calloc(shared.pages, sizeof *lengths);
    uint64_t *counts = calloc(shared.pages, sizeof *counts), differed = 0, same = 0;
    unsigned char *watched = calloc(shared.pages, 1);
    for (uint64_t i = 0; i < shared.pages; i++)
        starts[i] = (uintptr_t)(shared.memory + i * shared.words), lengths[i] = page;
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) CHECK(pthread_create(&threads[i], NULL, i < 2 ? write_on : watch_on, &shared) == 0);
    // Both must happen: that a page was written, and that one was not.
    for (int round = 0; round < 50 || differed < 100 || same < 100; round++) {
        struct nw_pages *pages = nw_pages_watch(starts, lengths, shared.pages, watched);
        CHECK(pages);
        for (int copy = 0; copy < 2; copy++)
            for (uint64_t i = 0; i < shared.pages; i++)
                shared.copies[copy][i] = atomic_load_explicit(&shared.memory[i * shared.words], memory_order_relaxed);
        CHECK(nw_pages_changed(pages, counts) >= 0);
        for (uint64_t i = 0; i < shared.pages; i++) {
            bool differs = shared.copies[0][i] != shared.copies[1][i];
            CHECK(!differs || counts[i] == 1);
            differed += differs, same += counts[i] == 0;
        }
        nw_pages_end(pages);
    }
    shared.stop = true;
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    CHECK(protected_mappings() == 0);
    for (int i = 0; i < 2; i++) free((void *)shared.copies[i]);
    free(starts), free(lengths), free(counts), free(watched);
    drop((void *)shared.memory, shared.pages);
}

// Memory with holes all over, so that there is something to move.
static void make_holes(void) {
    enum { BYTES = 512 << 20 };
    for (;;) {
        unsigned char *memory = mmap(0, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) _exit(1);
        for (uint64_t at = 0; at < BYTES; at += page) memory[at] = 1;
        for (uint64_t at = 0; at < BYTES; at += 2 * page) madvise(memory + at, page, MADV_DONTNEED);
        munmap(memory, BYTES);
    }
}

static void compact(int file) {
    while (pwrite(file, "1", 1, 0) == 1) continue;
    _exit(1);
}

// The kernel moves pages to make room for huge ones: nobody has written to them.
static void test_pages_that_the_kernel_moves(void) {
    int file = open("/proc/sys/vm/compact_memory", O_WRONLY | O_CLOEXEC);
    if (file < 0 || pwrite(file, "1", 1, 0) != 1) {
        printf("no test of pages that the kernel moves: it can't be asked to (%s)\n", strerror(errno));
        if (file >= 0) close(file);
        return;
    }
    pid_t children[2];
    for (int i = 0; i < 2; i++) {
        children[i] = fork();
        CHECK(children[i] >= 0);
        if (children[i] == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            i == 0 ? make_holes() : compact(file);
        }
    }
    close(file);
    uint64_t count = (64 << 20) / page;
    for (int round = 0; round < 60; round++) {
        // New ones each time: those that were moved once lie where they stay.
        unsigned char *memory = fresh(count);
        struct nw_pages *pages = watch(memory, count * page);
        usleep(1000);
        CHECK(pages && changed(pages) == 0);
        nw_pages_end(pages);
        drop(memory, count);
    }
    for (int i = 0; i < 2; i++) {
        kill(children[i], SIGKILL);
        int status;
        CHECK(waitpid(children[i], &status, 0) == children[i] && WIFSIGNALED(status));
    }
}

void test_pages(void) {
    page = (uint64_t)sysconf(_SC_PAGESIZE);
    unsigned char *memory = fresh(1);
    struct nw_pages *pages = watch(memory, page);
    test_inner();
    if (!pages) {
        printf("no test of watched pages: this kernel refuses (%s)\n", strerror(errno));
        return drop(memory, 1);
    }
    nw_pages_end(pages);
    drop(memory, 1);
    int open = descriptors();
    test_each_page();
    test_ranges();
    test_nothing_to_watch();
    test_untouched_memory();
    test_huge_pages();
    test_the_kernel_writes();
    test_kinds_of_memory();
    test_memory_of_another_userfaultfd();
    test_memory_that_is_gone();
    test_watches_that_overlap();
    test_large_memory();
    test_fork();
    test_refusals();
    test_threads_that_write();
    test_pages_that_the_kernel_moves();
    CHECK(descriptors() == open);
}
