// SPDX-License-Identifier: Apache-2.0
// The client's core without Python: a session on a socket pair, whose other end reads as a daemon does, ends the
// connection again and again, and forgets what it has not acknowledged. Several threads log, save, serve and look at
// the same time.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../Sources/PythonClient/core/json.h"
#include "../../Sources/PythonClient/core/session.h"
#include "check.h"

enum { LOG = 4, SAVE = 5, DEFINE_KEYS = 3, LOG_ACK = 67, CHECKPOINT_EVENT = 68, ROWS = 3000, SAVES = 200, KEYS = 7 };

static int descriptors(void) {
    int count = 0;
    for (int fd = 0; fd < 1024; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

// What the other end has taken: the value of each row, and which saves.
static struct {
    double rows[2 * ROWS + 1];
    uint64_t last_sequence;
    int saves[SAVES];
    atomic_int save_count;
    char keys[64][32];
    int key_count;
} daemon_has;

static bool read_all(int fd, void *to, size_t count, int *with) {
    for (size_t at = 0; at < count;) {
        struct iovec piece = {(char *)to + at, count - at};
        union {
            struct cmsghdr header;
            char room[CMSG_SPACE(sizeof(int))];
        } control;
        struct msghdr message = {
            .msg_iov = &piece, .msg_iovlen = 1, .msg_control = control.room, .msg_controllen = sizeof control.room};
        ssize_t got = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
        if (got <= 0) return false;
        struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
        if (rights) {
            CHECK(with && *with < 0);
            memcpy(with, CMSG_DATA(rights), sizeof *with);
        }
        at += (size_t)got;
    }
    return true;
}

static void send_frame(int fd, uint8_t type, const void *payload, uint32_t length) {
    unsigned char frame[16 + 256] = {0x4E, 0x57, 1, type};
    memcpy(frame + 8, &length, 4);
    memcpy(frame + 16, payload, length);
    // In two pieces: a reader must not count on whole frames.
    send(fd, frame, 7, MSG_NOSIGNAL);
    send(fd, frame + 7, 9 + length, MSG_NOSIGNAL);
}

static void acknowledge(int fd) {
    unsigned char payload[24] = {0};
    memcpy(payload, &daemon_has.last_sequence, 8);
    send_frame(fd, LOG_ACK, payload, sizeof payload);
}

static void event(int fd, uint64_t sequence, const char *what) {
    char text[160];
    int length = snprintf(
        text, sizeof text, "{\"sequence\": %llu, \"event\":\"%s\",\"path\":\"/a \\\"b\\\\\",\"buffer\":1,\"bytes\":7}",
        (unsigned long long)sequence, what);
    send_frame(fd, CHECKPOINT_EVENT, text, (uint32_t)length);
}

// Serves one connection for so many frames, and ends it.
static void serve_one(int fd, int frames) {
    daemon_has.key_count = 0;
    for (int i = 0; i < frames; i++) {
        unsigned char header[16];
        int with = -1;
        if (!read_all(fd, header, sizeof header, &with)) {
            if (with >= 0) close(with);
            return;
        }
        CHECK(header[0] == 0x4E && header[1] == 0x57);
        uint32_t length;
        memcpy(&length, header + 8, 4);
        unsigned char *payload = malloc(length + 1);
        CHECK(payload);
        bool is_whole = read_all(fd, payload, length, NULL);
        uint64_t sequence = 0;
        if (is_whole && length >= 8) memcpy(&sequence, payload, 8);
        if (is_whole && header[3] == DEFINE_KEYS) {
            uint32_t first, count;
            memcpy(&first, payload, 4);
            memcpy(&count, payload + 4, 4);
            CHECK((int)first == daemon_has.key_count);
            unsigned char *at = payload + 8;
            for (uint32_t key = 0; key < count; key++) {
                uint16_t size;
                memcpy(&size, at, 2);
                CHECK(size < 32);
                memcpy(daemon_has.keys[first + key], at + 2, size);
                daemon_has.keys[first + key][size] = 0;
                at += 2 + size;
            }
            daemon_has.key_count += (int)count;
        } else if (is_whole && header[3] == LOG && sequence > daemon_has.last_sequence) {
            int64_t update;
            uint32_t id;
            double value;
            memcpy(&update, payload + 8, 8);
            memcpy(&value, payload + 32, 8);
            memcpy(&id, payload + 40, 4);
            CHECK((int)id < daemon_has.key_count);
            char wanted[32];
            snprintf(wanted, sizeof wanted, "key%d", (int)(update % KEYS));
            CHECK(strcmp(daemon_has.keys[id], wanted) == 0);
            daemon_has.rows[update] = value;
            daemon_has.last_sequence = sequence;
            if (i % 3 == 0) acknowledge(fd);
        } else if (is_whole && header[3] == SAVE) {
            CHECK(with >= 0);
            unsigned char first;
            CHECK(pread(with, &first, 1, 0) == 1);
            // Its index is in the frame, and its pickle's first byte in the buffer: never another save's.
            uint32_t index;
            memcpy(&index, payload + 8, 4);
            CHECK(index < SAVES && first == (unsigned char)(index * 37 + 1));
            if (!daemon_has.saves[index]++) daemon_has.save_count++;
            event(fd, sequence, "accepted");
            event(fd, sequence, "durable");
            event(fd, sequence, "released");
        }
        free(payload);
        if (with >= 0) close(with);
        if (!is_whole) return;
    }
}

static struct nw_session *shared;
static struct nw_pool *pool;
static atomic_bool is_over;

static void *log_rows(void *unused) {
    for (int i = 0; i < ROWS; i++) {
        char name[32];
        struct nw_status status;
        // As the binding does it with the interpreter's lock: nobody adds keys between the look and the log.
        static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
        pthread_mutex_lock(&lock);
        nw_session_status(shared, &status);
        int64_t update = status.has_update ? status.last_update + 1 : 1;
        snprintf(name, sizeof name, "key%d", (int)(update % KEYS));
        struct nw_key key = {name, strlen(name)};
        uint32_t first_new = nw_session_key_count(shared);
        int64_t id = nw_session_key(shared, name, key.length);
        double number = (double)update * 0.5;
        struct nw_value value = {.key = id < 0 ? first_new : (uint32_t)id, .tag = NW_FLOAT};
        memcpy(&value.bits, &number, 8);
        CHECK(nw_session_log(shared, NULL, 0, &value, 1, first_new, &key, id < 0) == NW_LOGGED);
        pthread_mutex_unlock(&lock);
    }
    return unused;
}

static void *save_all(void *unused) {
    for (uint32_t index = 0; index < SAVES; index++) {
        struct nw_buffer *buffer;
        size_t wanted;
        uint64_t seen = nw_pool_returns(pool);
        while (nw_pool_take(pool, 4096, &buffer, &wanted) != NW_TAKEN) seen = nw_pool_wait(pool, seen, 0.05);
        struct nw_save *save = nw_save_new(nw_session_number(shared), 1, false, NULL);
        CHECK(nw_session_hand_over(shared, &save, 1));
        unsigned char payload[16] = {0}, pickle[64];
        memset(pickle, (int)(index * 37 + 1), sizeof pickle);
        memcpy(payload + 8, &index, 4);
        const unsigned char *pickles[] = {pickle};
        size_t length = sizeof pickle;
        // Twice: the second one finds that it is sent.
        for (int i = 0; i < 2; i++)
            CHECK(nw_session_send(shared, save, 5, buffer, payload, sizeof payload, 0, pickles, &length, 1));
        nw_buffer_drop(buffer);
        nw_save_drop(shared, save);
    }
    return unused;
}

static void *serve(void *unused) {
    while (!is_over) {
        struct nw_status status;
        nw_session_status(shared, &status);
        nw_session_serve(shared, &status.generation, false, 0.01);
        struct nw_save *save;
        while ((save = nw_session_reap(shared, false))) nw_save_drop(shared, save);
    }
    return unused;
}

static void *daemon_of(void *pair) {
    serve_one(*(int *)pair, 1 + rand() % 400);
    close(*(int *)pair);
    return NULL;
}

static void test_a_session_among_threads(void) {
    int before = descriptors();
    struct nw_options options = {.queue_bytes = 64 << 20, .busy_seconds = 1};
    shared = nw_session_new(&options);
    pool = nw_pool_new(8 << 20);
    pthread_t threads[5];
    void *(*work[])(void *) = {log_rows, log_rows, save_all, serve, serve};
    for (int i = 0; i < 5; i++) CHECK(pthread_create(&threads[i], NULL, work[i], NULL) == 0);
    for (int connection = 0;; connection++) {
        CHECK(connection < 100000);
        int pair[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
        CHECK(nw_session_attach(shared, pair[0]));
        close(pair[0]);
        nw_session_opened(shared, daemon_has.last_sequence, true);
        pthread_t other;
        bool is_done;
        CHECK(pthread_create(&other, NULL, daemon_of, &pair[1]) == 0);
        struct nw_status status;
        do {
            nw_session_status(shared, &status);
            nw_session_serve(shared, &status.generation, false, 0.01);
            nw_session_status(shared, &status);
            is_done = status.rows == 2 * ROWS && daemon_has.save_count == SAVES && !status.has_work;
            if (is_done) nw_session_detach(shared);
        } while (status.state == NW_OPEN);
        pthread_join(other, NULL);
        if (is_done) break;
    }
    is_over = true;
    for (int i = 0; i < 5; i++) pthread_join(threads[i], NULL);
    for (int update = 1; update <= 2 * ROWS; update++) CHECK(daemon_has.rows[update] == update * 0.5);
    for (int index = 0; index < SAVES; index++) CHECK(daemon_has.saves[index] > 0);
    struct nw_save *save;
    while ((save = nw_session_reap(shared, true))) nw_save_drop(shared, save);
    nw_session_free(shared);
    CHECK(nw_pool_sizes(pool).held == 0);
    nw_pool_free(pool);
    CHECK(descriptors() == before);
}

static void test_an_update_happens_whole_or_not_at_all(void) {
    struct nw_options options = {.queue_bytes = 200};
    struct nw_session *s = nw_session_new(&options);
    struct nw_key key = {"a", 1};
    struct nw_value value = {.tag = NW_INT, .bits = 1}, text = {.tag = NW_STR, .bits = 2 << 20, .tail = ""};
    int64_t two = 2, one = 1;
    CHECK(nw_session_log(s, &two, 0, &text, 1, 0, &key, 1) == NW_TOO_LARGE);
    CHECK(nw_session_key_count(s) == 0);
    CHECK(nw_session_log(s, &two, 0, &value, 1, 0, &key, 1) == NW_LOGGED);
    CHECK(nw_session_log(s, &one, 0, &value, 1, 1, NULL, 0) == NW_IN_DISORDER);
    // Without a daemon that adds to rows the same update is refused.
    CHECK(nw_session_log(s, &two, 0, &value, 1, 1, NULL, 0) == NW_IN_DISORDER);
    nw_session_opened(s, 0, true);
    CHECK(nw_session_log(s, &two, 0, &value, 1, 1, NULL, 0) == NW_LOGGED_TWICE);
    // The queue is full: what is not kept has its number all the same, and changes nothing else.
    CHECK(nw_session_log(s, NULL, 0, &value, 1, 1, NULL, 0) == NW_LOGGED);
    CHECK(nw_session_log(s, NULL, 0, &value, 1, 1, &key, 1) == NW_NOT_KEPT);
    struct nw_status status;
    nw_session_status(s, &status);
    CHECK(status.sequence == 3 && status.rows == 2 && status.last_update == 4 && status.kept_rows == 3 &&
          status.not_kept == 1);
    nw_session_close(s);
    CHECK(nw_session_log(s, NULL, 0, &value, 1, 1, NULL, 0) == NW_CLOSED);
    CHECK(nw_session_number(s) == 0);
    // What it was given is still owed, so a connection is welcome; when it has ended none is.
    nw_session_status(s, &status);
    CHECK(status.is_closed && !status.is_over && status.has_work);
    nw_session_end(s);
    nw_session_status(s, &status);
    CHECK(status.is_over && !nw_session_attach(s, 0));
    nw_session_free(s);
}

static void test_json(void) {
    const char *words =
        " { \"a\" : {\"b\": [1, \"}\\\"\", {}]}, \"event\":\"x\\\"y\",\"n\": 18446744073709551600 , \"z\":null, "
        "\"t\":true}";
    struct nw_text_range object = {words, strlen(words)}, found;
    uint64_t number;
    CHECK(nw_json_member(object, "a", &found) && found.length == strlen("{\"b\": [1, \"}\\\"\", {}]}"));
    CHECK(nw_json_member(object, "event", &found) && found.start[0] == '"' && found.length == 6);
    CHECK(nw_json_number(object, "n", &number) && number == 18446744073709551600u);
    CHECK(!nw_json_member(object, "z", &found) && !nw_json_member(object, "b", &found) &&
          !nw_json_number(object, "t", &number));
    // What is cut anywhere ends, and reads nothing beyond (as AddressSanitizer sees it).
    for (size_t length = 0; length < object.length; length++) {
        char *copy = malloc(length ? length : 1);
        memcpy(copy, words, length);
        nw_json_member((struct nw_text_range){copy, length}, "t", &found);
        free(copy);
    }
}

static void test_a_child_holds_nothing(void) {
    struct nw_options options = {.queue_bytes = 1 << 20};
    struct nw_session *s = nw_session_new(&options);
    int pair[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0 && nw_session_attach(s, pair[0]));
    close(pair[0]);
    nw_session_opened(s, 0, true);
    pid_t child = fork();
    if (child == 0) {
        nw_sessions_forget();
        struct nw_value value = {.tag = NW_NONE};
        struct nw_key key = {"a", 1};
        bool is_refused = nw_session_log(s, NULL, 0, &value, 1, 0, &key, 1) == NW_FORKED;
        nw_session_free(s);
        _exit(is_refused ? 0 : 1);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    // The parent's connection is as it was, and ends when the parent lets go: the child has no copy of it.
    char byte;
    CHECK(recv(pair[1], &byte, 1, MSG_DONTWAIT) < 0);
    nw_session_free(s);
    CHECK(recv(pair[1], &byte, 1, 0) == 0);
    close(pair[1]);
}

void test_session(void) {
    test_json();
    test_an_update_happens_whole_or_not_at_all();
    test_a_child_holds_nothing();
    test_a_session_among_threads();
}
