// SPDX-License-Identifier: Apache-2.0
/* Makes the n-th call of one libc function fail, in a process that loads this with LD_PRELOAD.
 *
 *   FAILING=function:how:n[:times]   how: the number of an errno, or `short` (half of what was asked for)
 *   FAILING_REPORT=path              made when the call was reached: where it is not, n was past the last one
 *
 * Counted are calls on storage and sockets: of the functions that take a descriptor of anything (read, write, mmap)
 * only those on regular files, so that the event descriptors of Dispatch and standard error stay out of it. openat2 has
 * no libc function: it goes by syscall(2), and counts as `openat2`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char function[32];
static int error_number, is_short;
static long first, times = 1;
static atomic_long calls;

__attribute__((constructor)) static void start(void) {
    const char *text = getenv("FAILING");
    if (!text) return;
    char copy[96], *rest = copy;
    strncpy(copy, text, sizeof copy - 1);
    copy[sizeof copy - 1] = 0;
    char *name = strsep(&rest, ":"), *how = strsep(&rest, ":"), *number = strsep(&rest, ":");
    if (!name || !how || !number) abort();
    strncpy(function, name, sizeof function - 1);
    is_short = strcmp(how, "short") == 0;
    error_number = atoi(how);
    first = atol(number);
    if (rest) times = atol(rest);
}

/* Whether this call is the one. */
static int fails(const char *name) {
    if (strcmp(function, name) != 0) return 0;
    long call = atomic_fetch_add(&calls, 1) + 1;
    if (call < first || call >= first + times) return 0;
    const char *report = getenv("FAILING_REPORT");
    if (report) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, report, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
        if (fd >= 0) syscall(SYS_close, fd);
    }
    if (!is_short) errno = error_number;
    return 1;
}

static int is_regular(int fd) {
    struct stat status;
    int saved = errno;
    int result = fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
    errno = saved;
    return result;
}

#define REAL(type, name, ...)                                                                                          \
    static type (*real)(__VA_ARGS__);                                                                                  \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define FAILING_CALL(type, name, parameters, ...)                                                                      \
    type name parameters {                                                                                             \
        static type(*real) parameters;                                                                                 \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);                                                 \
        if (fails(#name)) return -1;                                                                                   \
        return real(__VA_ARGS__);                                                                                      \
    }

FAILING_CALL(int, fdatasync, (int fd), fd)
FAILING_CALL(int, fsync, (int fd), fd)
FAILING_CALL(int, fallocate, (int fd, int mode, off_t offset, off_t length), fd, mode, offset, length)
FAILING_CALL(int, ftruncate, (int fd, off_t length), fd, length)
FAILING_CALL(int, renameat, (int a, const char *b, int c, const char *d), a, b, c, d)
FAILING_CALL(int, unlinkat, (int a, const char *b, int c), a, b, c)
FAILING_CALL(int, mkdirat, (int a, const char *b, mode_t c), a, b, c)
FAILING_CALL(int, mkdir, (const char *b, mode_t c), b, c)
FAILING_CALL(int, memfd_create, (const char *name, unsigned flags), name, flags)
FAILING_CALL(ssize_t, recvmsg, (int fd, struct msghdr * message, int flags), fd, message, flags)
FAILING_CALL(int, accept4, (int fd, struct sockaddr *address, socklen_t *length, int flags), fd, address, length, flags)
FAILING_CALL(int, flock, (int fd, int operation), fd, operation)

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    REAL(ssize_t, sendmsg, int, const struct msghdr *, int);
    int type = SOCK_STREAM;
    socklen_t length = sizeof type;
    // A datagram is sent whole or not at all.
    if (is_short && getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) == 0 && type != SOCK_STREAM)
        return real(fd, message, flags);
    if (!fails("sendmsg")) return real(fd, message, flags);
    if (!is_short) return -1;
    struct msghdr part = *message;
    struct iovec half = message->msg_iov[0];
    half.iov_len = (half.iov_len + 1) / 2;
    part.msg_iov = &half;
    part.msg_iovlen = 1;
    return real(fd, &part, flags);
}

/* Never of O_DIRECT memory that a short count would leave misaligned: the kernel's own short writes are of whole blocks
 * too. */
static size_t half_of(size_t count) {
    size_t half = count / 2;
    return half > 4096 ? half / 4096 * 4096 : half ? half : count;
}

#define FAILING_TRANSFER(name, buffer_type, parameters, count, ...)                                                    \
    ssize_t name parameters {                                                                                          \
        static ssize_t(*real) parameters;                                                                              \
        if (!real) real = (ssize_t(*) parameters)dlsym(RTLD_NEXT, #name);                                              \
        if (is_regular(fd) && fails(#name)) {                                                                          \
            if (!is_short) return -1;                                                                                  \
            count = half_of(count);                                                                                    \
        }                                                                                                              \
        return real(__VA_ARGS__);                                                                                      \
    }

FAILING_TRANSFER(pwrite, const void *, (int fd, const void *buffer, size_t count, off_t offset), count, fd, buffer,
                 count, offset)
FAILING_TRANSFER(write, const void *, (int fd, const void *buffer, size_t count), count, fd, buffer, count)
FAILING_TRANSFER(pread, void *, (int fd, void *buffer, size_t count, off_t offset), count, fd, buffer, count, offset)

void *mmap(void *address, size_t length, int protection, int flags, int fd, off_t offset) {
    REAL(void *, mmap, void *, size_t, int, int, int, off_t);
    if (fd >= 0 && fails("mmap")) return MAP_FAILED;
    return real(address, length, protection, flags, fd, offset);
}

int open(const char *path, int flags, ...) {
    REAL(int, open, const char *, int, ...);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return fails("open") ? -1 : real(path, flags, mode);
}

int openat(int directory, const char *path, int flags, ...) {
    REAL(int, openat, int, const char *, int, ...);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return fails("openat") ? -1 : real(directory, path, flags, mode);
}

long syscall(long number, ...) {
    REAL(long, syscall, long, ...);
    va_list rest;
    va_start(rest, number);
    long a = va_arg(rest, long), b = va_arg(rest, long), c = va_arg(rest, long), d = va_arg(rest, long),
         e = va_arg(rest, long), f = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_openat2 && fails("openat2")) return -1;
    return real(number, a, b, c, d, e, f);
}
