#include "csystemd.h"

#include <dlfcn.h>
#include <sys/socket.h>
#include <systemd/sd-daemon.h>

static void *symbol(const char *name) {
    static void *library;
    if (!library) library = dlopen("libsystemd.so.0", RTLD_NOW | RTLD_LOCAL);
    return library ? dlsym(library, name) : 0;
}

int nw_sd_listen_fds(void) {
    __typeof__(&sd_listen_fds) call = symbol("sd_listen_fds");
    return call ? call(1) : 0;
}

int nw_sd_is_listening_unix_stream(int fd) {
    __typeof__(&sd_is_socket_unix) call = symbol("sd_is_socket_unix");
    return call ? call(fd, SOCK_STREAM, 1, 0, 0) : 0;
}

int nw_sd_notify(const char *state) {
    __typeof__(&sd_notify) call = symbol("sd_notify");
    return call ? call(0, state) : 0;
}
