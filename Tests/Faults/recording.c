// SPDX-License-Identifier: Apache-2.0
/* Notes down, in order, what a process that loads this with LD_PRELOAD does to files and sends to sockets: a line each
 * in the file that RECORDING names. With it a test knows what a power loss at each moment would have left
 * (Tests/EndToEnd/test_power_loss.py).
 *
 *   create INODE DIRECTORY NAME      a new file or directory
 *   write INODE OFFSET HEX           truncate INODE LENGTH       allocate INODE LENGTH
 *   syncing INODE                    synced INODE or unsynced INODE, when it returns
 *   renaming DIRECTORY NAME NAME     renamed DIRECTORY NAME NAME, when it returns
 *   unlink DIRECTORY NAME
 *   send FD HEX                      before it goes out
 *
 * What makes something safe is noted when it has returned, what is promised before it is sent. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int recording = -1;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("RECORDING");
    if (path) recording = (int)syscall(SYS_openat, AT_FDCWD, path, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
}

/* One write(2) to a file with O_APPEND: lines of several threads follow one another whole. */
static void put(const char *line, size_t length) {
    if (recording >= 0 && syscall(SYS_write, recording, line, length) != (long)length) abort();
}

__attribute__((format(printf, 1, 2))) static void note(const char *format, ...) {
    int saved = errno;
    char line[1024];
    va_list rest;
    va_start(rest, format);
    int length = vsnprintf(line, sizeof line, format, rest);
    va_end(rest);
    put(line, (size_t)length);
    errno = saved;
}

static void note_bytes(const char *head, const unsigned char *bytes, size_t count) {
    int saved = errno;
    size_t start = strlen(head);
    char *line = malloc(start + 2 * count + 1);
    memcpy(line, head, start);
    for (size_t i = 0; i < count; i++) {
        line[start + 2 * i] = "0123456789abcdef"[bytes[i] >> 4];
        line[start + 2 * i + 1] = "0123456789abcdef"[bytes[i] & 15];
    }
    line[start + 2 * count] = '\n';
    put(line, start + 2 * count + 1);
    free(line);
    errno = saved;
}

static unsigned long inode(int fd) {
    struct stat status;
    int saved = errno;
    unsigned long found = fstat(fd, &status) == 0 ? status.st_ino : 0;
    errno = saved;
    return found;
}

#define REAL(type, name, ...)                                                                                          \
    static type (*real)(__VA_ARGS__);                                                                                  \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define RECORDED_SYNC(name)                                                                                            \
    int name(int fd) {                                                                                                 \
        REAL(int, name, int);                                                                                          \
        note("syncing %lu\n", inode(fd));                                                                              \
        int result = real(fd);                                                                                         \
        note("%s %lu\n", result == 0 ? "synced" : "unsynced", inode(fd));                                              \
        return result;                                                                                                 \
    }

RECORDED_SYNC(fdatasync)
RECORDED_SYNC(fsync)

ssize_t pwrite(int fd, const void *buffer, size_t count, off_t offset) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t);
    ssize_t result = real(fd, buffer, count, offset);
    if (result > 0) {
        char head[64];
        snprintf(head, sizeof head, "write %lu %lld ", inode(fd), (long long)offset);
        note_bytes(head, buffer, (size_t)result);
    }
    return result;
}

int ftruncate(int fd, off_t length) {
    REAL(int, ftruncate, int, off_t);
    int result = real(fd, length);
    if (result == 0) note("truncate %lu %lld\n", inode(fd), (long long)length);
    return result;
}

int fallocate(int fd, int mode, off_t offset, off_t length) {
    REAL(int, fallocate, int, int, off_t, off_t);
    int result = real(fd, mode, offset, length);
    note("allocate %lu %lld\n", inode(fd), (long long)length);
    return result;
}

int renameat(int from, const char *old, int to, const char *new) {
    REAL(int, renameat, int, const char *, int, const char *);
    note("renaming %lu %s %s\n", inode(to), old, new);
    int result = real(from, old, to, new);
    if (result == 0) note("renamed %lu %s %s\n", inode(to), old, new);
    return result;
}

int unlinkat(int directory, const char *name, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    int result = real(directory, name, flags);
    if (result == 0) note("unlink %lu %s\n", inode(directory), name);
    return result;
}

int mkdirat(int directory, const char *name, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    int result = real(directory, name, mode);
    struct stat status;
    if (result == 0 && fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW) == 0)
        note("create %lu %lu %s\n", status.st_ino, inode(directory), name);
    return result;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    REAL(ssize_t, sendmsg, int, const struct msghdr *, int);
    char head[32];
    snprintf(head, sizeof head, "send %d ", fd);
    note_bytes(head, message->msg_iov[0].iov_base, message->msg_iov[0].iov_len);
    return real(fd, message, flags);
}

/* openat2 has no function in libc: it goes by syscall(2). */
long syscall(long number, ...) {
    REAL(long, syscall, long, ...);
    va_list rest;
    va_start(rest, number);
    long a = va_arg(rest, long), b = va_arg(rest, long), c = va_arg(rest, long), d = va_arg(rest, long),
         e = va_arg(rest, long), f = va_arg(rest, long);
    va_end(rest);
    long result = real(number, a, b, c, d, e, f);
    if (number == SYS_openat2 && result >= 0 && ((const struct open_how *)c)->flags & O_EXCL)
        note("create %lu %lu %s\n", inode((int)result), inode((int)a), (const char *)b);
    return result;
}
