// SPDX-License-Identifier: Apache-2.0
/* The wall clock jumps a day ahead, in a process that loads this with LD_PRELOAD, as soon as the file that JUMPED names
 * is there. The clock for intervals goes on as it does when somebody sets the time. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = (int)syscall(SYS_clock_gettime, clock, time);
    const char *jumped = getenv("JUMPED");
    if (result == 0 && clock == CLOCK_REALTIME && jumped && access(jumped, F_OK) == 0) time->tv_sec += 86400;
    return result;
}
