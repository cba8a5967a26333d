// libsystemd, opened when the daemon starts and only if it is there: a daemon shipped in a wheel must start on
// machines without it. The prototypes come from the real header, so a change of theirs fails the build.
#ifndef NW_CSYSTEMD_H
#define NW_CSYSTEMD_H

// sd_listen_fds(3), with unset_environment. 0 where libsystemd is absent.
int nw_sd_listen_fds(void);
// sd_is_socket_unix(3) for a listening stream socket.
int nw_sd_is_listening_unix_stream(int fd);
// sd_notify(3). 0 where libsystemd or NOTIFY_SOCKET is absent.
int nw_sd_notify(const char *state);

#endif
