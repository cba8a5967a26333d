// SPDX-License-Identifier: Apache-2.0
// Starting a program anew, as nobody's child and with nothing of who starts it.
#define _GNU_SOURCE
#include "clinux.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { READY_DESCRIPTOR = 3, IO_OF_PROCESS = 1, MEMORY_POLICY_DEFAULT = 0, CPU_MASK_BYTES = 8192 };

// As high as this user may go: without a limit, else up to the hard one.
static void reset_limits(void) {
    const __rlimit_resource_t unlimited[] = {RLIMIT_CPU,  RLIMIT_FSIZE, RLIMIT_DATA,  RLIMIT_RSS,     RLIMIT_NPROC,
                                             RLIMIT_AS,   RLIMIT_LOCKS, RLIMIT_MEMLOCK, RLIMIT_SIGPENDING};
    for (size_t i = 0; i < sizeof unlimited / sizeof *unlimited; i++) {
        struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};
        if (setrlimit(unlimited[i], &limit) == 0 || getrlimit(unlimited[i], &limit) < 0) continue;
        limit.rlim_cur = limit.rlim_max;
        setrlimit(unlimited[i], &limit);
    }
    // The kernel knows no infinity here (proc(5), nr_open). The daemon itself takes what the hard limit gives.
    struct rlimit files;
    const rlim_t wanted = 1 << 20;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_max < wanted) {
        files.rlim_max = wanted;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    struct rlimit stack;
    const rlim_t usual = 8 << 20;
    if (getrlimit(RLIMIT_STACK, &stack) == 0) {
        stack.rlim_cur = stack.rlim_max < usual ? stack.rlim_max : usual;
        setrlimit(RLIMIT_STACK, &stack);
    }
}

static void reset_signals(void) {
    for (int number = 1; number < NSIG; number++) signal(number, SIG_DFL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, 0);
}

// What can't be had stays as it is: a user may lower some of these, and not raise them again.
static void reset_scheduling(void) {
    struct sched_param parameters = {0};
    sched_setscheduler(0, SCHED_OTHER, &parameters);
    setpriority(PRIO_PROCESS, 0, 0);
    syscall(SYS_ioprio_set, IO_OF_PROCESS, 0, 0);
    syscall(SYS_set_mempolicy, MEMORY_POLICY_DEFAULT, 0, 0);
    // All that there are: the kernel takes those that the cgroup allows.
    static unsigned char all[CPU_MASK_BYTES];
    memset(all, 0xFF, sizeof all);
    syscall(SYS_sched_setaffinity, 0, sizeof all, all);
}

static void become_anew(const char *program, char *const arguments[], char *const environment[], int ready) {
    setsid();
    umask(077);
    if (chdir("/") < 0) return;
    reset_limits();
    reset_scheduling();
    reset_signals();
    if (ready == READY_DESCRIPTOR) fcntl(ready, F_SETFD, 0);
    else if (dup2(ready, READY_DESCRIPTOR) < 0) return;
    syscall(SYS_close_range, READY_DESCRIPTOR + 1, ~0U, 0);
    execve(program, arguments, environment);
}

int nw_hard_limit(pid_t pid, int resource, uint64_t *limit) {
    struct rlimit found;
    if (prlimit(pid, (__rlimit_resource_t)resource, 0, &found) < 0) return -1;
    *limit = found.rlim_max;
    return 0;
}

int nw_detach(const char *program, char *const arguments[], char *const environment[]) {
    // One that is ignored is inherited, and waitpid would find nobody.
    signal(SIGCHLD, SIG_DFL);
    int ready[2];
    if (pipe2(ready, O_CLOEXEC) < 0) return -1;
    pid_t child = fork();
    if (child < 0) return -1;
    if (child == 0) {
        become_anew(program, arguments, environment, ready[1]);
        int reason = errno;
        ssize_t ignored = write(2, "noether-writerd: it can't be started anew: ", 43);
        ignored = write(2, strerror(reason), strlen(strerror(reason)));
        ignored = write(2, "\n", 1);
        (void)ignored;
        _exit(1);
    }
    close(ready[1]);
    char byte;
    ssize_t count;
    do count = read(ready[0], &byte, 1);
    while (count < 0 && errno == EINTR);
    if (count > 0) _exit(0);
    int status;
    while (waitpid(child, &status, 0) < 0)
        if (errno != EINTR) return -1;
    if (WIFEXITED(status)) _exit(WEXITSTATUS(status));
    // As it died, for who asks why.
    signal(WTERMSIG(status), SIG_DFL);
    raise(WTERMSIG(status));
    _exit(128 + WTERMSIG(status));
}
