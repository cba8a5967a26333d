// SPDX-License-Identifier: Apache-2.0
// What Swift's importer drops: CMSG macros, variadic calls, and constants behind casts.
// Nothing here decides anything. Every function returns what the syscall does, with errno set.
#ifndef NW_CLINUX_H
#define NW_CLINUX_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { NW_MAX_RECEIVED_FDS = 16 };

// recvmsg(2) with MSG_CMSG_CLOEXEC | MSG_DONTWAIT. Every descriptor that came is in `fds` (the caller closes
// them all, wanted or not); `flags` gets msg_flags (MSG_CTRUNC: the kernel dropped some).
ssize_t nw_receive(int socket, void *buffer, size_t length, int fds[NW_MAX_RECEIVED_FDS], int *fd_count,
                   int *flags);

// sendmsg(2) with MSG_NOSIGNAL | MSG_DONTWAIT; `fd` < 0 sends none.
ssize_t nw_send(int socket, const void *buffer, size_t length, int fd);

// SO_PEERCRED (unix(7)).
int nw_peer_credentials(int socket, pid_t *pid, uid_t *uid);

// SO_PEERPIDFD (Linux 6.5), else pidfd_open(2) of `pid`: names the process for good, whoever gets its number later.
int nw_peer_pidfd(int socket, pid_t pid);
int nw_pidfd_has_ended(int pidfd);                    // poll(2)
int nw_pidfd_inode(int pidfd, uint64_t *inode);       // of pidfs (Linux 6.9), where each process has its own; else -1

int nw_unix_connect(int socket, const char *path);
int nw_unix_bind(int socket, const char *path);
// The name of a Unix socket in the file system; empty if it has none.
int nw_unix_path(int socket, char *path, size_t size);

// openat2(2), which glibc 2.36 does not wrap, with RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS.
int nw_open_beneath(int directory, const char *path, uint64_t flags, uint64_t mode);

int nw_accept(int listener);  // accept4(2), close-on-exec and non-blocking
int nw_allocate(int fd, off_t length);  // fallocate(2), mode 0
// ioctl_ficlonerange(2): both files have the same blocks then; offsets and count are whole blocks.
int nw_clone_range(int source, uint64_t from, uint64_t count, int target, uint64_t to);
int nw_set_attribute(int fd, const char *name, const void *value, size_t count);  // fsetxattr(2)
ssize_t nw_get_attribute(const char *path, const char *name, void *value, size_t count);  // getxattr(2)
ssize_t nw_get_attribute_of(int fd, const char *name, void *value, size_t count);  // fgetxattr(2)
int nw_rename_new(int directory, const char *name, const char *new_name);  // renameat2(2), RENAME_NOREPLACE
int nw_birth(int fd, int64_t *seconds, uint32_t *nanoseconds);  // statx(2), stx_btime
// renameat2(2), RENAME_EXCHANGE or RENAME_NOREPLACE
int nw_rename_to(int directory, const char *name, int other, const char *new_name, int exchanges);
int nw_open(const char *path, int flags, mode_t mode);
int nw_memfd_create(const char *name);
int nw_memfd_seal(int fd);       // F_SEAL_SHRINK | F_SEAL_GROW
int nw_memfd_seal_all(int fd);   // F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL
int nw_memfd_seals(int fd);      // F_GET_SEALS
int nw_lock_exclusive(int fd);   // flock LOCK_EX | LOCK_NB
int nw_lock_shared(int fd);      // flock LOCK_SH | LOCK_NB
int nw_unlock(int fd);           // flock LOCK_UN
int nw_set_nonblocking(int fd);
int nw_terminal_size(int fd, int *columns, int *rows);  // TIOCGWINSZ
int nw_flush_output(void);       // fflush(3) of stdout; also -1 where it has failed before
void nw_malloc_trim(void);       // malloc_trim(3)
int nw_malloc_one_arena(void);   // mallopt(3), M_ARENA_MAX
uint64_t nw_malloc_free_bytes(void);  // mallinfo2(3), fordblks
// The terminal of standard input and output gets these settings and this text back where the process dies by a fault of
// its own.
struct termios;
void nw_terminal_restore_at_fault(const struct termios *settings, const char *text);
int nw_hard_limit(pid_t pid, int resource, uint64_t *limit);  // prlimit(2); RLIM_INFINITY is the largest number
// Starts `program` as nobody's child: in a session of its own, in `/`, with the umask 077, without limits as far as
// this user may,
// with the usual scheduling, memory policy and signals, and with no descriptors but standard ones and number 3. Exits,
// with status 0
// when it writes to number 3, or as it ends; returns -1 where it could not be started.
int nw_detach(const char *program, char *const arguments[], char *const environment[]);
// All threads that this process will have run on the processor that it is on (sched_setaffinity(2)).
int nw_stay_on_one_processor(void);
int nw_eventfd(void);            // eventfd(2), close-on-exec and non-blocking

// epoll(7), one-shot: told once, then silent until armed again. A hang-up or an error counts as readable.
struct nw_event {
    uint64_t token;
    int is_readable, is_writable;
};
int nw_poller_create(void);
int nw_poller_add(int poller, int fd, uint64_t token);
int nw_poller_arm(int poller, int fd, uint64_t token, int writing);
int nw_poller_remove(int poller, int fd);
int nw_poller_wait(int poller, struct nw_event *events, int count);  // at most 64 at once

extern const int nw_seal_shrink, nw_seal_grow, nw_seal_write;
extern const int nw_o_direct, nw_o_path, nw_o_directory, nw_o_cloexec, nw_o_nofollow;
extern const int nw_spawn_setsid;

#endif
