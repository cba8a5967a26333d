// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "clinux.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <linux/fs.h>
#include <malloc.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/xattr.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/vfs.h>
#include <termios.h>
#include <unistd.h>

const int nw_seal_shrink = F_SEAL_SHRINK, nw_seal_grow = F_SEAL_GROW, nw_seal_write = F_SEAL_WRITE;
const int nw_o_direct = O_DIRECT, nw_o_path = O_PATH, nw_o_directory = O_DIRECTORY, nw_o_cloexec = O_CLOEXEC,
          nw_o_nofollow = O_NOFOLLOW;
const int nw_spawn_setsid = POSIX_SPAWN_SETSID;

ssize_t nw_receive(int socket, void *buffer, size_t length, int fds[NW_MAX_RECEIVED_FDS], int *fd_count,
                   int *flags) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * NW_MAX_RECEIVED_FDS) + CMSG_SPACE(sizeof(struct ucred))];
    } control;
    struct iovec iov = {.iov_base = buffer, .iov_len = length};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    *fd_count = 0;
    *flags = 0;
    ssize_t received = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (received < 0) return received;
    *flags = message.msg_flags;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
        int count = (int)((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        for (int i = 0; i < count; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(part) + sizeof(int) * i, sizeof fd);
            if (*fd_count < NW_MAX_RECEIVED_FDS) fds[(*fd_count)++] = fd;
            else close(fd);  // guard: surplus-fds-closed (skip: close(fd);)
        }
    }
    return received;
}

ssize_t nw_send(int socket, const void *buffer, size_t length, int fd) {
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec iov = {.iov_base = (void *)buffer, .iov_len = length};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        struct cmsghdr *part = CMSG_FIRSTHDR(&message);
        part->cmsg_level = SOL_SOCKET;
        part->cmsg_type = SCM_RIGHTS;
        part->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(part), &fd, sizeof fd);
    }
    return sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);  // guard: no-sigpipe (= 0 for MSG_NOSIGNAL)
}

int nw_peer_credentials(int socket, pid_t *pid, uid_t *uid) {
    struct ucred credentials;
    socklen_t length = sizeof credentials;
    int result = getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length);
    if (result == 0) {
        *pid = credentials.pid;  // guard: pid-of-the-peer (= 1)
        *uid = credentials.uid;
    }
    return result;
}

// <asm-generic/socket.h> and <linux/magic.h> of newer kernels than the headers may be.
enum { PEER_PIDFD = 77, PID_FS_MAGIC_NUMBER = 0x50494446 };

int nw_peer_pidfd(int socket, pid_t pid) {
    int pidfd = -1;
    socklen_t length = sizeof pidfd;
    if (getsockopt(socket, SOL_SOCKET, PEER_PIDFD, &pidfd, &length) == 0) return pidfd;
    if (errno != ENOPROTOOPT || pid <= 0) return -1;
    return (int)syscall(SYS_pidfd_open, pid, 0);
}

int nw_pidfd_has_ended(int pidfd) {
    struct pollfd found = {.fd = pidfd, .events = POLLIN};
    return poll(&found, 1, 0) > 0 && (found.revents & POLLIN) != 0;
}

int nw_pidfd_inode(int pidfd, uint64_t *inode) {
    struct statfs system;
    struct stat status;
    if (fstatfs(pidfd, &system) < 0 || (uint32_t)system.f_type != PID_FS_MAGIC_NUMBER) return -1;
    if (fstat(pidfd, &status) < 0) return -1;
    *inode = status.st_ino;
    return 0;
}

static int address_of(const char *path, struct sockaddr_un *address) {
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    if (strlen(path) >= sizeof address->sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address->sun_path, path);
    return 0;
}

int nw_unix_connect(int socket, const char *path) {
    struct sockaddr_un address;
    if (address_of(path, &address) < 0) return -1;
    return connect(socket, (struct sockaddr *)&address, sizeof address);
}

int nw_unix_bind(int socket, const char *path) {
    struct sockaddr_un address;
    if (address_of(path, &address) < 0) return -1;
    return bind(socket, (struct sockaddr *)&address, sizeof address);
}

int nw_unix_path(int socket, char *path, size_t size) {
    struct sockaddr_un address;
    socklen_t length = sizeof address;
    if (getsockname(socket, (struct sockaddr *)&address, &length) < 0) return -1;
    const size_t before = offsetof(struct sockaddr_un, sun_path);
    size_t count = length > before ? length - before : 0;
    // No name, or an abstract one, which begins with a NUL: nothing in the file system.
    if (address.sun_family != AF_UNIX || count == 0 || address.sun_path[0] == 0 || count >= size) count = 0;
    memcpy(path, address.sun_path, count);
    path[count] = 0;
    return 0;
}

int nw_open_beneath(int directory, const char *path, uint64_t flags, uint64_t mode) {
    struct open_how how = {.flags = flags,
                           .mode = mode,
                           // guard: resolved-beneath (= 0)
                           .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    int fd = (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
    if (fd >= 0 || (errno != ENOSYS && errno != EPERM)) return fd;
    // systemd's RestrictSUIDSGID= and older container filters refuse openat2 (ENOSYS, or EPERM), since they can't look
    // into its struct. For one component O_NOFOLLOW says the same: nothing else of the path can lead away.
    if (strchr(path, '/') || strcmp(path, "..") == 0) {
        errno = ENOSYS;
        return -1;
    }
    return openat(directory, path, (int)flags | O_NOFOLLOW, (mode_t)mode);  // guard: no-follow (= 0 for O_NOFOLLOW)
}

int nw_accept(int listener) { return accept4(listener, 0, 0, SOCK_CLOEXEC | SOCK_NONBLOCK); }
int nw_allocate(int fd, off_t length) { return fallocate(fd, 0, 0, length); }
int nw_clone_range(int source, uint64_t from, uint64_t count, int target, uint64_t to) {
    struct file_clone_range range = {.src_fd = source, .src_offset = from, .src_length = count, .dest_offset = to};
    return ioctl(target, FICLONERANGE, &range);
}
ssize_t nw_get_attribute(const char *path, const char *name, void *value, size_t count) {
    return getxattr(path, name, value, count);
}

ssize_t nw_get_attribute_of(int fd, const char *name, void *value, size_t count) {
    return fgetxattr(fd, name, value, count);
}

int nw_flush_output(void) { return fflush(stdout) || ferror(stdout) ? -1 : 0; }

int nw_rename_new(int directory, const char *name, const char *new_name) {
    return renameat2(directory, name, directory, new_name, RENAME_NOREPLACE);
}

int nw_birth(int fd, int64_t *seconds, uint32_t *nanoseconds) {
    struct statx found;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_BTIME, &found) != 0) return -1;
    if (!(found.stx_mask & STATX_BTIME)) {
        errno = ENOTSUP;
        return -1;
    }
    *seconds = found.stx_btime.tv_sec;
    *nanoseconds = found.stx_btime.tv_nsec;
    return 0;
}

int nw_rename_to(int directory, const char *name, int other, const char *new_name, int exchanges) {
    return renameat2(directory, name, other, new_name, exchanges ? RENAME_EXCHANGE : RENAME_NOREPLACE);
}

int nw_set_attribute(int fd, const char *name, const void *value, size_t count) {
    return fsetxattr(fd, name, value, count, 0);
}
int nw_open(const char *path, int flags, mode_t mode) { return open(path, flags, mode); }
int nw_memfd_create(const char *name) { return memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING); }
int nw_memfd_seal(int fd) { return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW); }
int nw_memfd_seals(int fd) { return fcntl(fd, F_GET_SEALS); }
int nw_lock_exclusive(int fd) { return flock(fd, LOCK_EX | LOCK_NB); }
int nw_unlock(int fd) { return flock(fd, LOCK_UN); }
int nw_lock_shared(int fd) { return flock(fd, LOCK_SH | LOCK_NB); }
int nw_set_nonblocking(int fd) { return fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK); }

void nw_malloc_trim(void) { malloc_trim(0); }
int nw_malloc_one_arena(void) { return mallopt(M_ARENA_MAX, 1); }
uint64_t nw_malloc_free_bytes(void) { return mallinfo2().fordblks; }
int nw_stay_on_one_processor(void) {
    cpu_set_t processors;
    CPU_ZERO(&processors);
    CPU_SET(sched_getcpu(), &processors);
    return sched_setaffinity(0, sizeof processors, &processors);
}

int nw_eventfd(void) { return eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }

static struct termios fault_settings;
static char fault_text[64];

// Async-signal-safe (signal-safety(7)); the signal comes again with its default effect.
static void restore_terminal(int number) {
    ssize_t ignored = write(1, fault_text, strlen(fault_text));
    (void)ignored;
    tcsetattr(0, TCSANOW, &fault_settings);
    raise(number);
}

void nw_terminal_restore_at_fault(const struct termios *settings, const char *text) {
    fault_settings = *settings;
    strncpy(fault_text, text, sizeof fault_text - 1);
    struct sigaction action = {.sa_handler = restore_terminal, .sa_flags = (int)SA_RESETHAND};
    const int faults[] = {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGSYS};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigaction(faults[i], &action, 0);
}

int nw_poller_create(void) { return epoll_create1(EPOLL_CLOEXEC); }

static int poller_control(int poller, int operation, int fd, uint64_t token, uint32_t events) {
    struct epoll_event event = {.events = events, .data.u64 = token};
    return epoll_ctl(poller, operation, fd, &event);
}

int nw_poller_add(int poller, int fd, uint64_t token) {
    return poller_control(poller, EPOLL_CTL_ADD, fd, token, EPOLLONESHOT | EPOLLIN);
}

int nw_poller_arm(int poller, int fd, uint64_t token, int writing) {
    return poller_control(poller, EPOLL_CTL_MOD, fd, token, EPOLLONESHOT | EPOLLIN | (writing ? EPOLLOUT : 0));
}

int nw_poller_remove(int poller, int fd) { return poller_control(poller, EPOLL_CTL_DEL, fd, 0, 0); }

int nw_poller_wait(int poller, struct nw_event *events, int count) {
    struct epoll_event found[64];
    int ready = epoll_wait(poller, found, count < 64 ? count : 64, -1);
    for (int i = 0; i < ready; i++) {
        events[i].token = found[i].data.u64;
        events[i].is_readable = (found[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0;
        events[i].is_writable = (found[i].events & EPOLLOUT) != 0;
    }
    return ready;
}

int nw_memfd_seal_all(int fd) {
    return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL);
}

int nw_terminal_size(int fd, int *columns, int *rows) {
    struct winsize size;
    if (ioctl(fd, TIOCGWINSZ, &size) < 0) return -1;
    *columns = size.ws_col;
    *rows = size.ws_row;
    return 0;
}
