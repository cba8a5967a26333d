// SPDX-License-Identifier: Apache-2.0
// libsystemd, opened when the daemon starts and only if it is there: a daemon shipped in a wheel must start on
// machines without it. The prototypes come from the real headers, so a change of theirs fails the build.
#ifndef NW_CSYSTEMD_H
#define NW_CSYSTEMD_H

#include <stddef.h>
#include <stdint.h>

enum { NW_JOURNAL_FIELDS = 16 };

// sd_listen_fds_with_names(3), with unset_environment: how many, from 3 on. 0 where libsystemd is absent. Once only.
int nw_sd_listen_fds(void);
const char *nw_sd_listen_name(int index);
// sd_is_socket_unix(3) for a listening stream socket.
int nw_sd_is_listening_unix_stream(int fd);
// sd_notify(3). 0 where libsystemd or NOTIFY_SOCKET is absent.
int nw_sd_notify(const char *state);
int nw_sd_notify_with_fds(const char *state, const int *fds, unsigned count);
// sd_notify_barrier(3): returns when the manager has read all that was sent before.
int nw_sd_notify_barrier(uint64_t timeout_usec);
// sd_watchdog_enabled(3): the interval, or 0.
uint64_t nw_sd_watchdog_usec(void);
// sd_journal_sendv(3) of "NAME=value" fields.
int nw_sd_journal_send(const char *const *fields, const size_t *lengths, int count);

#endif
