// SPDX-License-Identifier: Apache-2.0
// Connects and disconnects, as fast as it can: flood SOCKET COUNT MODE.
// Modes: bare (close at once), hello (a handshake, then close), half (half of a frame, then close), reset (answers left
// unread). Prints how many were made; what the daemon refuses (a full backlog) is tried again.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static const char hello[] = "NW\1\1\1\0\0\0\x20\0\0\0\0\0\0\0{\"versions\": [1], \"client\": \"f\"}";

int main(int count_of_arguments, char **arguments) {
    if (count_of_arguments != 4) return 2;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, arguments[1], sizeof address.sun_path - 1);
    long count = atol(arguments[2]), made = 0;
    const char *mode = arguments[3];
    while (made < count) {
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0) return perror("socket"), 1;
        if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) {
            if (errno != EAGAIN && errno != EINTR) return perror("connect"), 1;
            close(fd);
            continue;
        }
        size_t length = strcmp(mode, "bare") == 0 ? 0 : strcmp(mode, "half") == 0 ? 20 : sizeof hello - 1;
        if (length && send(fd, hello, length, MSG_NOSIGNAL) < 0) return perror("send"), 1;
        char answer[4096];
        if (strcmp(mode, "hello") == 0 && recv(fd, answer, sizeof answer, 0) <= 0) return perror("recv"), 1;
        close(fd);
        made++;
    }
    printf("%ld\n", made);
    return 0;
}
