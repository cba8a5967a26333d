// SPDX-License-Identifier: Apache-2.0
#include "csystemd.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
// Where a line of ours stands in the source says nothing to an operator.
#define SD_JOURNAL_SUPPRESS_LOCATION
#include <systemd/sd-daemon.h>
#include <systemd/sd-journal.h>
#include <unistd.h>

static void *library;

static void open_library(void) { library = dlopen("libsystemd.so.0", RTLD_NOW | RTLD_LOCAL); }

static void *symbol(const char *name) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_library);
    return library ? dlsym(library, name) : 0;
}

// Kept for the life of the process: asked for once, at start.
static char **listen_names;

int nw_sd_listen_fds(void) {
    __typeof__(&sd_listen_fds_with_names) call = symbol("sd_listen_fds_with_names");
    return call ? call(1, &listen_names) : 0;
}

const char *nw_sd_listen_name(int index) { return listen_names ? listen_names[index] : "unknown"; }

int nw_sd_is_listening_unix_stream(int fd) {
    __typeof__(&sd_is_socket_unix) call = symbol("sd_is_socket_unix");
    return call ? call(fd, SOCK_STREAM, 1, 0, 0) : 0;
}

int nw_sd_notify(const char *state) {
    __typeof__(&sd_notify) call = symbol("sd_notify");
    return call ? call(0, state) : 0;
}

int nw_sd_notify_with_fds(const char *state, const int *fds, unsigned count) {
    __typeof__(&sd_pid_notify_with_fds) call = symbol("sd_pid_notify_with_fds");
    return call ? call(0, 0, state, fds, count) : 0;
}

int nw_sd_notify_barrier(uint64_t timeout_usec) {
    __typeof__(&sd_notify_barrier) call = symbol("sd_notify_barrier");
    return call ? call(0, timeout_usec) : 0;
}

uint64_t nw_sd_watchdog_usec(void) {
    __typeof__(&sd_watchdog_enabled) call = symbol("sd_watchdog_enabled");
    uint64_t usec = 0;
    return call && call(0, &usec) > 0 ? usec : 0;
}

// libdispatch gives its threads a niceness by the class of their work, and complains on standard error each time that
// it may not: always, in a unit that is confined. This one takes libc's place in the daemon, and says nothing of such a
// refusal, which changes nothing that is written.
int setpriority(__priority_which_t which, id_t who, int priority) {
    int result = (int)syscall(SYS_setpriority, which, who, priority);
    return result < 0 && (errno == EPERM || errno == EACCES) ? 0 : result;
}

int nw_sd_journal_send(const char *const *fields, const size_t *lengths, int count) {
    __typeof__(&sd_journal_sendv) call = symbol("sd_journal_sendv");
    struct iovec parts[NW_JOURNAL_FIELDS];
    if (!call || count > NW_JOURNAL_FIELDS) return -1;
    for (int i = 0; i < count; i++) parts[i] = (struct iovec){(void *)fields[i], lengths[i]};
    return call(parts, count);
}
