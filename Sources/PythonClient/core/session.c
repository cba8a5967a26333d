// SPDX-License-Identifier: Apache-2.0
#define _GNU_SOURCE
#include "session.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "json.h"

// Types of frames (docs/PROTOCOL.md, section 4).
enum { DEFINE_KEYS = 3, LOG = 4, SAVE = 5, CLOSE = 11, ERROR = 65, LOG_ACK = 67, CHECKPOINT_EVENT = 68 };
enum {
    MAGIC = 0x574E,
    FRAMING_VERSION = 1,
    KEYS_PER_FRAME = 256,
    FRAMES_PER_SEND = 64,
    READ_BYTES = 64 << 10,
    // Closed while somebody polls them.
    DEAD_SOCKETS = 16,
    NEWS = 256,
};
static const double BUSY_SECONDS = 1.0;
// A daemon that has taken nothing for so long is not merely slower than the trainer.
static const double SLOW_SECONDS = 1.0;

struct nw_frame {
    unsigned references;
    struct nw_frame *next;
    uint64_t sequence;
    size_t length;
    // Goes with it, and is closed with it; -1: none.
    int directory;
    unsigned char bytes[];
};

// On its way to the socket; `buffer`: its descriptor goes with the first byte.
struct out {
    struct out *next;
    struct nw_frame *frame;
    struct nw_buffer *buffer;
    size_t sent;
};

struct answer {
    struct answer *next;
    uint32_t number;
    uint8_t type;
    size_t length;
    unsigned char payload[];
};

struct news {
    struct news *next;
    uint64_t number;
    bool is_event;
    char *text;
    size_t length;
};

struct key {
    char *name;
    size_t length;
    // The row that had it last, counted from 1.
    uint64_t row;
    // Said again and again by those who log (epoch, sample).
    bool is_repeated;
};

struct nw_session {
    struct nw_session *previous, *next;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct nw_options options;
    struct nw_status status;

    int fd;
    int wake;
    int dead[DEAD_SOCKETS];
    int dead_count;
    bool is_serving;
    // Nothing more is to come, and the daemon was told.
    bool has_ended;
    bool is_dismissed;
    // The last update was not kept: the same one again makes a row.
    bool is_gap;
    // When the daemon has last taken updates, or the first of those that it has not taken came.
    double moved_at;
    // An open connection has ended, and whoever keeps the session has not heard of it.
    bool is_loss_news;
    struct out *first_out, *last_out;
    unsigned char *in;
    size_t in_length, in_capacity;

    bool merges_rows;
    struct key *keys;
    uint32_t key_count, key_capacity;
    // Places in `keys` counted from 1, by hash; 0 is free.
    uint32_t *index;
    uint32_t index_capacity;
    struct nw_frame *first_row, *last_row;

    struct nw_save *saves;
    struct answer *answers;
    int answer_count;
    uint32_t next_question;
    struct news *first_news, *last_news;
    int news_count;
    uint64_t last_news_number;
    char *last_words;
    bool last_words_are_json;
};

// Every session of this process, for the child of a fork.
static pthread_mutex_t sessions_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct nw_session *sessions;

static void put16(unsigned char *to, uint16_t value) { memcpy(to, &value, sizeof value); }
static void put32(unsigned char *to, uint32_t value) { memcpy(to, &value, sizeof value); }
static void put64(unsigned char *to, uint64_t value) { memcpy(to, &value, sizeof value); }

static uint16_t get16(const unsigned char *from) {
    uint16_t value;
    memcpy(&value, from, sizeof value);
    return value;
}
static uint32_t get32(const unsigned char *from) {
    uint32_t value;
    memcpy(&value, from, sizeof value);
    return value;
}
static uint64_t get64(const unsigned char *from) {
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the protocol is little-endian, and so is every machine that this was built for"
#endif

static char *copied(const char *start, size_t length) {
    char *copy = malloc(length + 1);
    if (!copy) return NULL;
    memcpy(copy, start, length);
    copy[length] = 0;
    return copy;
}

static char *copied_range(struct nw_text_range range) { return copied(range.start, range.length); }

static void has_changed(struct nw_session *s) {
    s->status.generation++;
    pthread_cond_broadcast(&s->changed);
}

static void wake(struct nw_session *s) {
    if (s->wake < 0) return;
    uint64_t one = 1;
    // A full counter wakes just as well.
    ssize_t ignored = write(s->wake, &one, sizeof one);
    (void)ignored;
}

// MARK: Frames

static struct nw_frame *new_frame(uint8_t type, uint32_t request, size_t payload, uint16_t fds) {
    struct nw_frame *frame = malloc(sizeof *frame + NW_HEADER_BYTES + payload);
    if (!frame) return NULL;
    *frame = (struct nw_frame){.references = 1, .length = NW_HEADER_BYTES + payload, .directory = -1};
    put16(frame->bytes, MAGIC);
    frame->bytes[2] = FRAMING_VERSION;
    frame->bytes[3] = type;
    put32(frame->bytes + 4, request);
    put32(frame->bytes + 8, (uint32_t)payload);
    put16(frame->bytes + 12, fds);
    put16(frame->bytes + 14, 0);
    return frame;
}

static void drop_frame(struct nw_frame *frame) {
    if (!frame || --frame->references) return;
    if (frame->directory >= 0) close(frame->directory);
    free(frame);
}

// The descriptor that goes with the first byte of a frame; NULL: none.
static const int *descriptor_of(const struct nw_frame *frame, const struct nw_buffer *buffer) {
    return buffer ? &buffer->fd : frame->directory >= 0 ? &frame->directory : NULL;
}

// Returns how many bytes the socket has taken.
static size_t try_send(struct nw_session *s, struct iovec *pieces, size_t count, const int *fd) {
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count};
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    if (fd) {
        message.msg_control = control.room;
        message.msg_controllen = sizeof control.room;
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&control.header), fd, sizeof(int));
    }
    ssize_t sent = sendmsg(s->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    // A connection that is lost is found out by whoever reads, once.
    return sent < 0 ? 0 : (size_t)sent;
}

// Hands a frame to the socket, or to whoever serves the session. Without memory for that the connection is lost: the
// next one gets everything that counts.
static void drop_connection(struct nw_session *s);

static void send_frame(struct nw_session *s, struct nw_frame *frame, struct nw_buffer *buffer) {
    if (s->fd < 0) return;
    size_t sent = 0;
    bool is_first = !s->first_out;
    if (is_first) {
        struct iovec piece = {frame->bytes, frame->length};
        sent = try_send(s, &piece, 1, descriptor_of(frame, buffer));
        if (sent == frame->length) return;
    }
    struct out *out = malloc(sizeof *out);
    if (!out) return drop_connection(s);
    frame->references++;
    if (buffer) nw_buffer_keep(buffer);
    *out = (struct out){NULL, frame, buffer, sent};
    if (s->last_out) s->last_out->next = out; else s->first_out = out;
    s->last_out = out;
    // Whoever serves waits for room in the socket already if there was something to send.
    if (is_first) wake(s);
}

static void drop_out(struct nw_session *s) {
    struct out *out = s->first_out;
    s->first_out = out->next;
    if (!s->first_out) s->last_out = NULL;
    drop_frame(out->frame);
    if (out->buffer) nw_buffer_drop(out->buffer);
    free(out);
}

static void flush(struct nw_session *s) {
    while (s->fd >= 0 && s->first_out) {
        struct iovec pieces[FRAMES_PER_SEND];
        size_t count = 0, wanted = 0;
        const int *fd = NULL;
        for (struct out *out = s->first_out; out && count < FRAMES_PER_SEND && !fd; out = out->next) {
            if (!out->sent && descriptor_of(out->frame, out->buffer)) {
                // A frame with a descriptor goes alone.
                if (count) break;
                fd = descriptor_of(out->frame, out->buffer);
            }
            pieces[count++] = (struct iovec){out->frame->bytes + out->sent, out->frame->length - out->sent};
            wanted += out->frame->length - out->sent;
        }
        size_t sent = try_send(s, pieces, count, fd), left = sent;
        while (left) {
            struct out *out = s->first_out;
            size_t rest = out->frame->length - out->sent;
            if (left < rest) {
                out->sent += left;
                break;
            }
            left -= rest;
            drop_out(s);
        }
        if (sent < wanted) return;
    }
}

// MARK: Connections

static void close_socket(struct nw_session *s) {
    if (s->fd < 0) return;
    if (s->is_serving && s->dead_count < DEAD_SOCKETS) {
        // Somebody polls it: a number that is used again at once would be polled in its place.
        shutdown(s->fd, SHUT_RDWR);
        s->dead[s->dead_count++] = s->fd;
        wake(s);
    } else {
        close(s->fd);
    }
    s->fd = -1;
}

static void drop_connection(struct nw_session *s) {
    close_socket(s);
    while (s->first_out) drop_out(s);
    s->in_length = 0;
    if (s->status.state == NW_OPEN) {
        s->status.away_since = nw_now();
        s->is_loss_news = true;
    }
    s->status.state = NW_AWAY;
    has_changed(s);
}

static void set_last_words(struct nw_session *s, char *words, bool are_json) {
    free(s->last_words);
    s->last_words = words;
    s->last_words_are_json = are_json;
}

struct nw_session *nw_session_new(const struct nw_options *options) {
    struct nw_session *s = calloc(1, sizeof *s);
    if (!s) return NULL;
    s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (s->wake < 0) {
        free(s);
        return NULL;
    }
    pthread_mutex_init(&s->mutex, NULL);
    nw_condition_init(&s->changed);
    s->options = *options;
    s->fd = -1;
    s->next_question = 1;
    s->status.away_since = nw_now();
    pthread_mutex_lock(&sessions_mutex);
    s->next = sessions;
    if (sessions) sessions->previous = s;
    sessions = s;
    pthread_mutex_unlock(&sessions_mutex);
    return s;
}

// Lets go of the frame and the buffer. One that the daemon may still read is never used again.
static void empty(struct nw_save *save, bool is_released) {
    drop_frame(save->frame);
    save->frame = NULL;
    if (save->buffer) {
        save->buffer->is_spoilt |= !is_released;
        nw_buffer_drop(save->buffer);
    }
    save->buffer = NULL;
}

static void free_save(struct nw_save *save) {
    empty(save, false);
    for (int i = 0; i < NW_TARGETS; i++) free(save->paths[i]);
    free(save->stalled);
    free(save->error);
    free(save);
}

struct nw_save *nw_save_new(uint64_t number, int targets, bool is_barrier, void *user) {
    struct nw_save *save = calloc(1, sizeof *save);
    if (!save) return NULL;
    save->sequence = number;
    save->references = 1;
    save->targets = targets;
    save->is_barrier = is_barrier;
    save->user = user;
    return save;
}

static void drop_save(struct nw_save *save) {
    if (--save->references == 0) free_save(save);
}

void nw_save_drop(struct nw_session *s, struct nw_save *save) {
    pthread_mutex_lock(&s->mutex);
    drop_save(save);
    pthread_mutex_unlock(&s->mutex);
}

static void drop_news(struct nw_session *s) {
    struct news *news = s->first_news;
    s->first_news = news->next;
    if (!s->first_news) s->last_news = NULL;
    s->news_count--;
    free(news->text);
    free(news);
}

void nw_session_free(struct nw_session *s) {
    if (!s) return;
    pthread_mutex_lock(&sessions_mutex);
    if (s->previous) s->previous->next = s->next; else if (sessions == s) sessions = s->next;
    if (s->next) s->next->previous = s->previous;
    pthread_mutex_unlock(&sessions_mutex);
    if (!s->status.is_forked) drop_connection(s);
    for (int i = 0; i < s->dead_count; i++) close(s->dead[i]);
    if (s->wake >= 0) close(s->wake);
    if (!s->status.is_forked) {
        while (s->first_row) {
            struct nw_frame *next = s->first_row->next;
            drop_frame(s->first_row);
            s->first_row = next;
        }
        while (s->answers) {
            struct answer *next = s->answers->next;
            free(s->answers);
            s->answers = next;
        }
        while (s->first_news) drop_news(s);
        for (uint32_t i = 0; i < s->key_count; i++) free(s->keys[i].name);
        free(s->keys);
        free(s->index);
        free(s->in);
        free(s->last_words);
    }
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->mutex);
    free(s);
}

void nw_sessions_forget(void) {
    // Whoever held a mutex is not in this process, and what it was about to change may be half changed: nothing but the
    // descriptors is touched here.
    pthread_mutex_init(&sessions_mutex, NULL);
    for (struct nw_session *s = sessions; s; s = s->next) {
        pthread_mutex_init(&s->mutex, NULL);
        nw_condition_init(&s->changed);
        if (s->fd >= 0) close(s->fd);
        for (int i = 0; i < s->dead_count; i++) close(s->dead[i]);
        if (s->wake >= 0) close(s->wake);
        s->fd = s->wake = -1;  // guard: connection-of-its-process (skip)
        s->dead_count = 0;
        s->is_serving = false;
        s->status.is_forked = true;
        s->status.state = NW_AWAY;
    }
    sessions = NULL;
}

bool nw_session_attach(struct nw_session *s, int fd) {
    pthread_mutex_lock(&s->mutex);
    bool is_open = !s->has_ended && !s->status.is_forked;
    int own = is_open ? fcntl(fd, F_DUPFD_CLOEXEC, 3) : -1;
    if (own >= 0) {
        drop_connection(s);
        fcntl(own, F_SETFL, fcntl(own, F_GETFL) | O_NONBLOCK);
        set_last_words(s, NULL, false);
        s->fd = own;
        s->status.state = NW_GREETING;
        s->status.connection++;
        wake(s);
        has_changed(s);
    }
    pthread_mutex_unlock(&s->mutex);
    return own >= 0;
}

// Rows that the daemon has; not below the last one that it has said before.
static void drop_rows(struct nw_session *s, uint64_t sequence) {
    if (sequence > s->status.taken) {
        s->status.taken = sequence;
        s->moved_at = nw_now();
    }
    while (s->first_row && s->first_row->sequence <= sequence) {
        struct nw_frame *row = s->first_row;
        s->first_row = row->next;
        s->status.kept_bytes -= row->length;
        s->status.kept_rows--;
        drop_frame(row);
    }
    if (!s->first_row) s->last_row = NULL;
}

// A row that the daemon has refused: it never acknowledges it. Returns whether it was still kept.
static bool drop_row(struct nw_session *s, uint64_t sequence) {
    struct nw_frame **place = &s->first_row, *before = NULL;
    while (*place && (*place)->sequence < sequence) {
        before = *place;
        place = &before->next;
    }
    struct nw_frame *row = *place;
    if (!row || row->sequence != sequence) return false;
    *place = row->next;
    if (s->last_row == row) s->last_row = before;
    s->status.kept_bytes -= row->length;
    s->status.kept_rows--;
    s->moved_at = nw_now();
    drop_frame(row);
    return true;
}

static struct nw_frame *definition(const struct key *keys, uint32_t first, uint32_t count) {
    size_t size = 8;
    for (uint32_t i = 0; i < count; i++) size += 2 + keys[i].length;
    struct nw_frame *frame = new_frame(DEFINE_KEYS, 0, size, 0);
    if (!frame) return NULL;
    unsigned char *at = frame->bytes + NW_HEADER_BYTES;
    put32(at, first);
    put32(at + 4, count);
    at += 8;
    for (uint32_t i = 0; i < count; i++) {
        put16(at, (uint16_t)keys[i].length);
        memcpy(at + 2, keys[i].name, keys[i].length);
        at += 2 + keys[i].length;
    }
    return frame;
}

// Sends the names of keys, in frames that fit.
static bool send_keys(struct nw_session *s, uint32_t first) {
    for (; first < s->key_count; first += KEYS_PER_FRAME) {
        uint32_t count = s->key_count - first < KEYS_PER_FRAME ? s->key_count - first : KEYS_PER_FRAME;
        struct nw_frame *frame = definition(s->keys + first, first, count);
        if (!frame) return false;
        send_frame(s, frame, NULL);
        drop_frame(frame);
    }
    return true;
}

// Whether a save must stay behind what is before it, as `send_ready` goes through the saves in their order.
struct order {
    // Something before it is not with the daemon; something before it that is not is a barrier.
    bool is_first_left, waits;
};

static bool may_go(struct order *order, const struct nw_save *save) {
    // guard: files-barrier (always: !(save->is_barrier && order->is_first_left))
    bool may = save->is_sent && !save->is_out && !order->waits && !(save->is_barrier && order->is_first_left);
    if (!save->is_held) {
        order->is_first_left = true;
        order->waits |= save->is_barrier;
    }
    return may;
}

// Sends the saves whose frames are there and whose turn it is.
static void send_ready(struct nw_session *s) {
    struct order order = {false, false};
    if (s->status.state != NW_OPEN) return;
    for (struct nw_save *save = s->saves; save && s->fd >= 0; save = save->next) {
        if (save->is_ended || !may_go(&order, save)) continue;
        save->is_out = true;
        send_frame(s, save->frame, save->buffer);
    }
}

void nw_session_opened(struct nw_session *s, uint64_t last_sequence, bool merges_rows) {
    pthread_mutex_lock(&s->mutex);
    drop_rows(s, last_sequence);
    // A daemon that has lost updates has fewer than it had acknowledged.
    s->status.taken = last_sequence;
    s->merges_rows = merges_rows;
    s->status.is_wanted = false;
    if (s->fd >= 0) {
        s->status.state = NW_OPEN;
        s->status.connected_at = s->moved_at = nw_now();
        if (!send_keys(s, 0)) drop_connection(s);
        struct nw_frame *row = s->first_row;
        struct nw_save *save = s->saves;
        for (struct nw_save *each = save; each; each = each->next) each->is_out = each->is_held = false;
        struct order order = {false, false};
        while (s->fd >= 0 && (row || save)) {  // guard: client-sends-again (never)
            if (save && save->is_ended) {  // guard: client-keeps-saves (always: save->is_ended)
                save = save->next;
            } else if (save && (!row || save->sequence < row->sequence)) {
                save->is_refused = false;
                save->send_at = 0;
                if (may_go(&order, save)) {
                    save->is_out = true;
                    send_frame(s, save->frame, save->buffer);
                }
                save = save->next;
            } else {
                send_frame(s, row, NULL);
                row = row->next;
            }
        }
    }
    has_changed(s);
    pthread_mutex_unlock(&s->mutex);
}

void nw_session_detach(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    if (!s->status.is_forked) drop_connection(s);
    pthread_mutex_unlock(&s->mutex);
}

// MARK: The end

// Whether there is something that the daemon has not taken (or, with `durable`, not ended).
static bool owes(const struct nw_session *s, bool durable) {
    if (s->first_row) return true;
    for (const struct nw_save *save = s->saves; save; save = save->next)
        if (!save->is_ended && (durable || !save->is_accepted)) return true;
    return false;
}

static void end(struct nw_session *s) {
    if (s->has_ended) return;
    s->has_ended = s->status.is_closed = true;
    if (s->status.state == NW_OPEN) {
        struct nw_frame *frame = new_frame(CLOSE, 0, 0, 0);
        if (frame) send_frame(s, frame, NULL);
        drop_frame(frame);
    }
    if (!s->first_out) drop_connection(s);
    has_changed(s);
    wake(s);
}

// Tickets may keep a session for as long as they like: one that is over holds no descriptor for them.
static void let_go(struct nw_session *s) {
    if (!s->has_ended || s->fd >= 0 || s->is_serving || s->status.is_kept || s->wake < 0) return;
    close(s->wake);
    s->wake = -1;
}

static void end_if_done(struct nw_session *s) {
    if ((s->status.is_closed && !owes(s, false)) || (s->status.is_abandoned && !owes(s, true))) end(s);
    if (s->has_ended && !s->first_out && s->fd >= 0) drop_connection(s);
}

void nw_session_close(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    s->status.is_closed = true;
    if (!s->status.is_forked) {
        end_if_done(s);
        let_go(s);
        wake(s);
        has_changed(s);
    }
    pthread_mutex_unlock(&s->mutex);
}

void nw_session_end(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    if (!s->status.is_forked) {
        end(s);
        drop_connection(s);
    }
    s->has_ended = s->status.is_closed = true;
    let_go(s);
    pthread_mutex_unlock(&s->mutex);
}

void nw_session_abandon(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    s->status.is_abandoned = true;
    if (!s->status.is_forked) {
        end_if_done(s);
        let_go(s);
        wake(s);
        has_changed(s);
    }
    pthread_mutex_unlock(&s->mutex);
}

// MARK: What comes

static void add_news(struct nw_session *s, struct nw_text_range text, bool is_event) {
    int limit = is_event ? NEWS : NW_ERRORS;
    if (s->news_count >= limit) return;
    struct news *news = malloc(sizeof *news);
    char *copy = copied_range(text);
    if (!news || !copy) {
        free(news);
        free(copy);
        return;
    }
    *news = (struct news){NULL, ++s->last_news_number, is_event, copy, text.length};
    if (s->last_news) s->last_news->next = news; else s->first_news = news;
    s->last_news = news;
    s->news_count++;
}

static void replace(char **place, struct nw_text_range value) {
    char *copy = copied_range(value);
    if (!copy) return;
    free(*place);
    *place = copy;
}

static void end_save(struct nw_session *s, struct nw_save *save) {
    save->is_ended = true;
    empty(save, true);
    // It may have been what others waited for.
    send_ready(s);
}

static void take_failure(struct nw_session *s, struct nw_save *save, struct nw_text_range event) {
    struct nw_text_range error = {"{}", 2};
    nw_json_member(event, "error", &error);
    bool is_busy = nw_json_is(error, "code", "busy");
    if (is_busy && !save->refused_since) save->refused_since = nw_now();
    double waited = save->refused_since ? nw_now() - save->refused_since : 0;
    // guard: refused-save-waits (never)
    if (nw_json_is(error, "code", "draining") || (is_busy && waited <= s->options.busy_seconds)) {
        // Not taken: for the next daemon, or for later.
        save->is_refused = true;
        if (is_busy) {
            double pause = waited < BUSY_SECONDS / 10 ? BUSY_SECONDS / 10
                           : waited > BUSY_SECONDS    ? BUSY_SECONDS
                                                      : waited;
            save->send_at = nw_now() + pause;
        }
        return;
    }
    if (!save->error) replace(&save->error, error);
    save->is_failed = true;
    add_news(s, event, true);
}

static void take_event(struct nw_session *s, struct nw_text_range event) {
    uint64_t sequence = 0, target = 0, bytes = 0;
    if (!nw_json_number(event, "sequence", &sequence)) return;
    struct nw_save *save = s->saves;
    while (save && save->sequence != sequence) save = save->next;
    if (!save || save->is_ended) return;
    nw_json_number(event, "target", &target);
    if (target >= (uint64_t)save->targets) return;
    struct nw_text_range value;
    if (nw_json_member(event, "path", &value)) replace(&save->paths[target], value);
    bool has_bytes = nw_json_number(event, "bytes", &bytes);
    if (nw_json_is(event, "event", "accepted")) {
        save->is_accepted = save->is_held = true;
        save->total_bytes = bytes;
        send_ready(s);
    } else if (nw_json_is(event, "event", "progress")) {
        nw_json_number(event, "bytes_done", &save->done_bytes[target]);
    } else if (nw_json_is(event, "event", "written") || nw_json_is(event, "event", "durable")) {
        if (has_bytes) save->done_bytes[target] = bytes;
        if (nw_json_is(event, "event", "written")) {
            save->written |= (uint8_t)(1 << target);
            return;
        }
        save->written |= (uint8_t)(1 << target);
        save->durable |= (uint8_t)(1 << target);
        if (save->stalled) add_news(s, event, true);
        free(save->stalled);
        save->stalled = NULL;
    } else if (nw_json_is(event, "event", "stalled")) {
        if (!nw_json_member(event, "error", &value)) return;
        if (!save->stalled) save->stalled_since = nw_now();
        bool is_new = !save->stalled || strlen(save->stalled) != value.length ||
                      memcmp(save->stalled, value.start, value.length) != 0;
        if (is_new) add_news(s, event, true);
        replace(&save->stalled, value);
    } else if (nw_json_is(event, "event", "failed")) {
        take_failure(s, save, event);
    } else if (nw_json_is(event, "event", "released")) {
        if (save->is_refused) {
            save->is_refused = false;
            return;
        }
        if (save->buffer && !nw_json_member(event, "buffer", &value)) save->buffer->is_spoilt = true;
        end_save(s, save);
    }
}

static void take_answer(struct nw_session *s, uint8_t type, uint32_t request, const unsigned char *payload,
                        size_t length) {
    struct answer *answer = malloc(sizeof *answer + length);
    if (!answer) return;
    *answer = (struct answer){NULL, request, type, length};
    memcpy(answer->payload, payload, length);
    struct answer **place = &s->answers;
    while (*place) place = &(*place)->next;
    *place = answer;
    if (++s->answer_count > NW_ANSWERS) {
        struct answer *oldest = s->answers;
        s->answers = oldest->next;
        s->answer_count--;
        free(oldest);
    }
}

static void take_frame(struct nw_session *s, uint8_t type, uint32_t request, const unsigned char *payload,
                       size_t length) {
    struct nw_text_range text = {(const char *)payload, length};
    struct nw_text_range fatal;
    if (type == LOG_ACK && length >= 24) {
        drop_rows(s, get64(payload));
        int64_t durable = (int64_t)get64(payload + 16);
        s->status.has_durable = durable != INT64_MIN;  // guard: durable-is-told (never)
        s->status.durable_update = durable;
    } else if (type == CHECKPOINT_EVENT) {
        take_event(s, text);
    } else if (request) {
        take_answer(s, type, request, payload, length);
    } else if (type == ERROR) {
        uint64_t sequence;
        if (nw_json_member(text, "fatal", &fatal) && fatal.length == 4) set_last_words(s, copied_range(text), true);
        // Also if the connection ends with it: sent again, it would end the next one.
        if (nw_json_number(text, "sequence", &sequence)) drop_row(s, sequence);
        // Before the session is open it is about the connection, whose end says why.
        if (s->status.state == NW_OPEN) add_news(s, text, false);
    }
    has_changed(s);
}

// What breaks a rule of the header, for the Python around this to say in words.
static const char *wrong_header(const unsigned char *header) {
    if (get16(header) != MAGIC || get16(header + 14) != 0 || get16(header + 12) != 0) return "header";
    if (header[2] != FRAMING_VERSION) return "version";
    if (get32(header + 8) > NW_PAYLOAD_BYTES) return "length";
    return NULL;
}

static void take_bytes(struct nw_session *s) {
    size_t at = 0;
    while (s->fd >= 0 && s->in_length - at >= NW_HEADER_BYTES) {
        unsigned char *header = s->in + at;
        const char *wrong = wrong_header(header);
        if (wrong) {
            char words[64];
            int length = snprintf(words, sizeof words, "%s %u %u", wrong, header[2], get32(header + 8));
            set_last_words(s, copied(words, (size_t)length), false);
            drop_connection(s);
            return;
        }
        size_t length = get32(header + 8);
        if (s->in_length - at - NW_HEADER_BYTES < length) break;
        take_frame(s, header[3], get32(header + 4), header + NW_HEADER_BYTES, length);
        at += NW_HEADER_BYTES + length;
    }
    if (s->in_length < at) return;
    memmove(s->in, s->in + at, s->in_length - at);
    s->in_length -= at;
}

static void receive(struct nw_session *s) {
    while (s->fd >= 0) {
        if (s->in_capacity - s->in_length < READ_BYTES) {
            size_t capacity = s->in_capacity ? 2 * s->in_capacity : 2 * READ_BYTES;
            unsigned char *larger = realloc(s->in, capacity);
            if (!larger) return drop_connection(s);
            s->in = larger;
            s->in_capacity = capacity;
        }
        ssize_t count = recv(s->fd, s->in + s->in_length, READ_BYTES, MSG_DONTWAIT);
        if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (count < 0 && !s->last_words) {
            char words[64];
            int length = snprintf(words, sizeof words, "errno %d", errno);
            set_last_words(s, copied(words, (size_t)length), false);
        }
        if (count <= 0) return drop_connection(s);
        s->in_length += (size_t)count;
        take_bytes(s);
    }
}

// Saves that the daemon had no room for. Returns when the next one is due; 0: none.
static double send_again(struct nw_session *s) {
    double next = 0, now = nw_now();
    if (s->status.state != NW_OPEN) return 0;
    for (struct nw_save *save = s->saves; save; save = save->next) {
        if (save->is_ended || !save->send_at) continue;
        if (save->send_at > now || save->is_refused) {
            if (!next || save->send_at < next) next = save->send_at;
            continue;
        }
        save->send_at = 0;
        send_frame(s, save->frame, save->buffer);
    }
    return next;
}

static bool is_pending(const struct nw_save *save) { return save->is_handed_over && !save->is_sent && !save->is_ended; }
static bool is_reaped(const struct nw_save *save) { return save->is_ended && (!save->is_failed || save->is_told); }

static unsigned reasons(struct nw_session *s, const uint64_t *seen, bool heeds_loss) {
    if (s->status.is_forked) return NW_OVER;
    if (seen) return s->status.generation != *seen ? NW_CHANGED : 0;
    if (s->has_ended && s->fd < 0) return NW_OVER;
    if (s->is_dismissed) return NW_DISMISSED;
    unsigned found = s->first_news ? NW_NEWS : 0;
    bool has_work = s->first_row || s->status.is_wanted;
    for (struct nw_save *save = s->saves; save; save = save->next) {
        if (is_pending(save) && !save->frame) found |= NW_PENDING;
        if (is_reaped(save)) found |= NW_NEWS;
        has_work |= !save->is_ended;
    }
    bool is_away = s->status.state == NW_AWAY && !s->has_ended;
    if (is_away && (s->is_loss_news || (heeds_loss && has_work))) found |= NW_LOST;
    return found;
}

unsigned nw_session_serve(struct nw_session *s, const uint64_t *seen, bool heeds_loss, double seconds) {
    double until = nw_now() + seconds;
    unsigned reason;
    pthread_mutex_lock(&s->mutex);
    while (!(reason = reasons(s, seen, heeds_loss))) {
        double now = nw_now();
        if (!(now < until)) break;
        if (s->is_serving || s->wake < 0) {
            nw_condition_wait(&s->changed, &s->mutex, until);
            continue;
        }
        double next = send_again(s);
        if (reasons(s, seen, heeds_loss)) continue;
        double limit = next && next < until ? next : until;
        struct pollfd polled[2] = {
            {.fd = s->wake, .events = POLLIN},
            {.fd = s->fd, .events = (short)(POLLIN | (s->first_out ? POLLOUT : 0))},
        };
        s->is_serving = true;
        pthread_mutex_unlock(&s->mutex);
        int milliseconds = limit - now > 3600 ? 3600000 : (int)((limit - now) * 1000) + 1;
        int ready = poll(polled, polled[1].fd < 0 ? 1 : 2, milliseconds);
        pthread_mutex_lock(&s->mutex);
        if (s->status.is_forked) break;
        s->is_serving = false;
        while (s->dead_count) close(s->dead[--s->dead_count]);
        if (polled[0].revents) {
            uint64_t ignored;
            ssize_t count = read(s->wake, &ignored, sizeof ignored);
            (void)count;
        }
        if (s->fd >= 0) {
            flush(s);
            if (polled[1].fd == s->fd && polled[1].revents & ~POLLOUT) receive(s);
            end_if_done(s);
        }
        // Another thread may have to serve now.
        pthread_cond_broadcast(&s->changed);
        // A signal: for whoever called to look after.
        if (ready < 0) {
            reason = reasons(s, seen, heeds_loss);
            break;
        }
    }
    if (reason & NW_LOST) s->is_loss_news = false;
    let_go(s);
    pthread_mutex_unlock(&s->mutex);
    return reason;
}

void nw_session_want(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    if (s->status.state != NW_OPEN && !s->status.is_wanted) {
        s->status.is_wanted = true;
        wake(s);
    }
    pthread_mutex_unlock(&s->mutex);
}

bool nw_session_claim(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    bool is_mine = !s->status.is_kept && !s->status.is_forked && !s->is_dismissed;
    s->status.is_kept |= is_mine;
    pthread_mutex_unlock(&s->mutex);
    return is_mine;
}

void nw_session_unclaim(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    s->status.is_kept = false;
    let_go(s);
    has_changed(s);
    pthread_mutex_unlock(&s->mutex);
}

void nw_session_dismiss(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    s->is_dismissed = true;
    wake(s);
    // The keeper may wait for the thread that serves.
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
}

// MARK: Keys

static uint32_t hash_of(const char *name, size_t length) {
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)name[i]) * 16777619u;
    return hash;
}

// The place in the index where a key is, or would be.
static uint32_t place_of(const struct nw_session *s, const char *name, size_t length) {
    uint32_t mask = s->index_capacity - 1, at = hash_of(name, length) & mask;
    for (;; at = (at + 1) & mask) {
        uint32_t number = s->index[at];
        if (!number) return at;
        const struct key *key = &s->keys[number - 1];
        if (key->length == length && memcmp(key->name, name, length) == 0) return at;
    }
}

int64_t nw_session_key(struct nw_session *s, const char *name, size_t length) {
    pthread_mutex_lock(&s->mutex);
    uint32_t number = s->index_capacity ? s->index[place_of(s, name, length)] : 0;
    pthread_mutex_unlock(&s->mutex);
    return (int64_t)number - 1;
}

uint32_t nw_session_key_count(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    uint32_t count = s->key_count;
    pthread_mutex_unlock(&s->mutex);
    return count;
}

// Room for so many keys more, so that adding them can't fail.
static bool make_room(struct nw_session *s, uint32_t more) {
    uint32_t wanted = s->key_count + more;
    if (wanted > s->key_capacity) {
        uint32_t capacity = s->key_capacity ? s->key_capacity : 64;
        while (capacity < wanted) capacity *= 2;
        struct key *keys = realloc(s->keys, capacity * sizeof *keys);
        if (!keys) return false;
        s->keys = keys;
        s->key_capacity = capacity;
    }
    if (wanted * 2 > s->index_capacity) {
        uint32_t capacity = s->index_capacity ? s->index_capacity : 128;
        while (capacity < wanted * 2) capacity *= 2;
        uint32_t *index = calloc(capacity, sizeof *index), *old = s->index;
        if (!index) return false;
        s->index = index;
        s->index_capacity = capacity;
        for (uint32_t i = 0; i < s->key_count; i++) s->index[place_of(s, s->keys[i].name, s->keys[i].length)] = i + 1;
        free(old);
    }
    return true;
}

// MARK: Rows

static size_t tail_of(const struct nw_value *value) {
    return value->tag == NW_STR || value->tag == NW_BIG_INT ? value->bits : 0;
}

static struct nw_frame *row_frame(
    int64_t update, double wall_time, const struct nw_value *values, uint32_t count, size_t tail) {
    struct nw_frame *frame = new_frame(LOG, 0, 32 + 13 * (size_t)count + tail, 0);
    if (!frame) return NULL;
    unsigned char *at = frame->bytes + NW_HEADER_BYTES;
    put64(at + 8, (uint64_t)update);
    memcpy(at + 16, &wall_time, sizeof wall_time);
    put32(at + 24, count);
    put32(at + 28, (uint32_t)tail);
    unsigned char *bits = at + 32, *ids = bits + 8 * (size_t)count, *tags = ids + 4 * (size_t)count,
                  *text = tags + count;
    for (uint32_t i = 0; i < count; i++) {
        put64(bits + 8 * (size_t)i, values[i].bits);
        put32(ids + 4 * (size_t)i, values[i].key);
        tags[i] = (unsigned char)values[i].tag;
        size_t length = tail_of(&values[i]);
        if (length) memcpy(text, values[i].tail, length);
        text += length;
    }
    return frame;
}

// A row must fit into a page of `entries`, with the names of its keys.
static bool fits(const struct nw_session *s, const struct nw_value *values, uint32_t count, uint32_t first_new,
                 const struct nw_key *new_keys, size_t size) {
    if (size > NW_PAYLOAD_BYTES) return false;
    if (size + (size_t)count * (6 + NW_KEY_BYTES) <= NW_PAYLOAD_BYTES) return true;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t id = values[i].key;
        size += 6 + (id < first_new ? s->keys[id].length : new_keys[id - first_new].length);
    }
    return size <= NW_PAYLOAD_BYTES;
}

enum nw_logged nw_session_log(struct nw_session *s, const int64_t *wanted, double wall_time,
                              const struct nw_value *values, uint32_t count, uint32_t first_new,
                              const struct nw_key *new_keys, uint32_t new_count) {
    size_t tail = 0;
    for (uint32_t i = 0; i < count; i++) {
        size_t length = tail_of(&values[i]);
        if (length > NW_PAYLOAD_BYTES || (tail += length) > NW_PAYLOAD_BYTES) return NW_TOO_LARGE;
    }
    enum nw_logged result = NW_LOGGED;
    struct nw_frame *frame = NULL;
    char **names = NULL;
    pthread_mutex_lock(&s->mutex);
    struct nw_status *status = &s->status;
    int64_t update = wanted                                                  ? *wanted
                     : status->has_update && status->last_update < INT64_MAX ? status->last_update + 1
                                                                             : 1;
    bool is_same = status->has_update && update == status->last_update;
    bool has_no_next = !wanted && status->has_update && status->last_update == INT64_MAX;
    if (status->is_forked) result = NW_FORKED;  // guard: run-of-its-process (never)
    else if (status->is_closed) result = NW_CLOSED;
    else if (has_no_next) result = NW_IN_DISORDER;
    // guard: client-update-larger (never)
    else if (status->has_update && (update < status->last_update || (is_same && !s->merges_rows)))
        result = NW_IN_DISORDER;
    else if (first_new != s->key_count || s->key_count + new_count > NW_KEYS) result = NW_TOO_MANY_KEYS;
    else if (!fits(s, values, count, first_new, new_keys, 32 + 13 * (size_t)count + tail)) result = NW_TOO_LARGE;
    else if (status->log_ended) result = NW_LOG_ENDED;
    if (result != NW_LOGGED) goto end;

    // Everything that can fail comes first.
    frame = row_frame(update, wall_time, values, count, tail);
    if (!frame) result = NW_MEMORY;
    if (frame && status->kept_bytes + frame->length > s->options.queue_bytes) {  // guard: client-memory-bounded (never)
        bool is_slow = status->kept_rows && status->state == NW_OPEN && nw_now() - s->moved_at < SLOW_SECONDS;
        // guard: client-raises-where-asked (never: s->options.refuses)
        result = is_slow ? NW_SLOW : s->options.refuses ? NW_QUEUE_FULL : NW_NOT_KEPT;
        if (result == NW_NOT_KEPT) {
            // It has its number all the same: what comes after it has its own.
            status->not_kept++;
            s->is_gap |= !is_same;
            status->has_update = true;
            status->last_update = update;
        }
    }
    if (result == NW_LOGGED && new_count) {
        names = calloc(new_count, sizeof *names);
        if (!names || !make_room(s, new_count)) result = NW_MEMORY;
        for (uint32_t i = 0; result == NW_LOGGED && i < new_count; i++)
            if (!(names[i] = copied(new_keys[i].name, new_keys[i].length))) result = NW_MEMORY;
    }
    if (result != NW_LOGGED) goto end;

    for (uint32_t i = 0; i < new_count; i++) {
        s->index[place_of(s, names[i], new_keys[i].length)] = s->key_count + 1;
        s->keys[s->key_count++] =
            (struct key){names[i], new_keys[i].length, 0, !strcmp(names[i], "epoch") || !strcmp(names[i], "sample")};
        names[i] = NULL;
    }
    if (!is_same || s->is_gap) status->rows++;
    s->is_gap = false;
    for (uint32_t i = 0; i < count; i++) {
        struct key *key = &s->keys[values[i].key];
        if (is_same && key->row == status->rows && !key->is_repeated) result = NW_LOGGED_TWICE;
        key->row = status->rows;
    }
    status->has_update = true;
    status->last_update = update;
    frame->sequence = ++status->sequence;
    put64(frame->bytes + NW_HEADER_BYTES, frame->sequence);
    if (s->last_row) s->last_row->next = frame; else s->first_row = frame;
    s->last_row = frame;
    status->kept_bytes += frame->length;
    if (!status->kept_rows++) s->moved_at = nw_now();
    if (status->state == NW_OPEN) {
        if (new_count && !send_keys(s, first_new)) drop_connection(s);
        if (s->fd >= 0) send_frame(s, frame, NULL);
    } else if (status->state == NW_AWAY && status->kept_rows == 1) {
        // Whoever keeps the session had nothing to do.
        has_changed(s);
        wake(s);
    }
    frame = NULL;
end:
    pthread_mutex_unlock(&s->mutex);
    drop_frame(frame);
    for (uint32_t i = 0; names && i < new_count; i++) free(names[i]);
    free(names);
    return result;
}

uint64_t nw_session_number(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    uint64_t number = s->status.is_closed || s->status.is_forked ? 0 : ++s->status.sequence;
    pthread_mutex_unlock(&s->mutex);
    return number;
}

void nw_session_end_log(struct nw_session *s, uint64_t sequence) {
    pthread_mutex_lock(&s->mutex);
    s->status.log_ended = true;
    struct nw_frame **place = &s->first_row, *last = NULL;
    while (*place && (*place)->sequence < sequence) {
        last = *place;
        place = &last->next;
    }
    while (*place) {
        struct nw_frame *row = *place;
        *place = row->next;
        s->status.kept_bytes -= row->length;
        s->status.kept_rows--;
        drop_frame(row);
    }
    s->last_row = last;
    has_changed(s);
    pthread_mutex_unlock(&s->mutex);
}

bool nw_session_refuse(struct nw_session *s, uint64_t sequence) {
    pthread_mutex_lock(&s->mutex);
    bool is_dropped = drop_row(s, sequence);
    if (is_dropped) has_changed(s);
    pthread_mutex_unlock(&s->mutex);
    return is_dropped;
}

void nw_session_take_log_on(struct nw_session *s, int64_t update, uint64_t rows) {
    pthread_mutex_lock(&s->mutex);
    s->status.has_update = true;
    s->status.last_update = update;
    s->status.rows = rows;
    pthread_mutex_unlock(&s->mutex);
}

// MARK: Saves

bool nw_session_hand_over(struct nw_session *s, struct nw_save **saves, int count) {
    pthread_mutex_lock(&s->mutex);
    bool is_open = !s->status.is_closed && !s->status.is_forked;
    for (int i = 0; is_open && i < count; i++) {
        // In the order of their numbers.
        struct nw_save **place = &s->saves;
        while (*place && (*place)->sequence < saves[i]->sequence) place = &(*place)->next;
        saves[i]->references++;
        saves[i]->is_handed_over = true;
        saves[i]->next = *place;
        *place = saves[i];
    }
    has_changed(s);
    wake(s);
    pthread_mutex_unlock(&s->mutex);
    return is_open;
}

bool nw_session_send(struct nw_session *s, struct nw_save *save, uint8_t type, struct nw_buffer *buffer,
                     const unsigned char *payload, size_t length, size_t place, const unsigned char *const *pickles,
                     const size_t *lengths, int count) {
    struct nw_frame *frame = new_frame(type, 0, length, buffer != NULL);
    if (!frame) return false;
    memcpy(frame->bytes + NW_HEADER_BYTES, payload, length);
    if (buffer) put64(frame->bytes + NW_HEADER_BYTES, save->sequence);
    pthread_mutex_lock(&s->mutex);
    // Two threads may have made the same frame; the buffer is the daemon's as soon as one is sent.
    bool is_mine = is_pending(save) && !save->frame && !s->status.is_forked;
    if (is_mine) {
        save->frame = frame;
        save->buffer = buffer;
        if (buffer) nw_buffer_keep(buffer);
    }
    pthread_mutex_unlock(&s->mutex);
    if (!is_mine) {
        free(frame);
        return true;
    }
    for (int i = 0; i < count; i++) {
        memcpy(buffer->address + place, pickles[i], lengths[i]);
        place += lengths[i];
    }
    pthread_mutex_lock(&s->mutex);
    save->is_sent = true;
    send_ready(s);
    has_changed(s);
    pthread_mutex_unlock(&s->mutex);
    return true;
}

void nw_session_fail(struct nw_session *s, struct nw_save *save) {
    pthread_mutex_lock(&s->mutex);
    if (is_pending(save) && !save->frame) {
        save->is_failed = true;
        end_save(s, save);
        has_changed(s);
        wake(s);
    }
    pthread_mutex_unlock(&s->mutex);
}

static struct nw_save *kept(struct nw_save *save) {
    if (save) save->references++;
    return save;
}

struct nw_save *nw_session_pending(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    struct nw_save *save = s->saves;
    while (save && !(is_pending(save) && !save->frame)) save = save->next;
    kept(save);
    pthread_mutex_unlock(&s->mutex);
    return save;
}

struct nw_save *nw_session_find(struct nw_session *s, uint64_t after, bool failed) {
    pthread_mutex_lock(&s->mutex);
    struct nw_save *save = s->saves;
    while (save && (save->sequence < after || !(failed ? save->is_failed && !save->is_told : !save->is_ended)))
        save = save->next;
    kept(save);
    pthread_mutex_unlock(&s->mutex);
    return save;
}

void nw_session_tell(struct nw_session *s, struct nw_save *save) {
    pthread_mutex_lock(&s->mutex);
    save->is_told = true;
    pthread_mutex_unlock(&s->mutex);
}

struct nw_save *nw_session_reap(struct nw_session *s, bool all) {
    pthread_mutex_lock(&s->mutex);
    struct nw_save **place = &s->saves;
    while (*place && !all && !is_reaped(*place)) place = &(*place)->next;
    struct nw_save *save = *place;
    if (save) {
        *place = save->next;
        save->next = NULL;
        if (!save->is_ended) empty(save, false);
    }
    pthread_mutex_unlock(&s->mutex);
    return save;
}

void nw_save_status(struct nw_session *s, struct nw_save *save, struct nw_save_status *status) {
    pthread_mutex_lock(&s->mutex);
    *status = (struct nw_save_status){
        .sequence = save->sequence,
        .is_handed_over = save->is_handed_over,
        .is_sent = save->is_sent,
        .is_ended = save->is_ended,
        .is_accepted = save->is_accepted,
        .is_failed = save->is_failed,
        .is_told = save->is_told,
        .written = save->written,
        .durable = save->durable,
        .total_bytes = save->total_bytes,
        .stalled_since = save->stalled_since,
    };
    for (int i = 0; i < save->targets; i++) status->done_bytes += save->done_bytes[i];
    pthread_mutex_unlock(&s->mutex);
}

char *nw_save_text(struct nw_session *s, struct nw_save *save, enum nw_text which, int target) {
    pthread_mutex_lock(&s->mutex);
    const char *text = which == NW_PATH ? save->paths[target] : which == NW_STALLED ? save->stalled : save->error;
    char *copy = text ? copied(text, strlen(text)) : NULL;
    pthread_mutex_unlock(&s->mutex);
    return copy;
}

// MARK: Questions, and what is known

uint32_t nw_session_ask(struct nw_session *s, uint8_t type, const void *payload, size_t length, bool is_greeting,
                        int directory) {
    uint32_t number = 0;
    pthread_mutex_lock(&s->mutex);
    if (s->fd >= 0 && (s->status.state == NW_OPEN || is_greeting)) {
        struct nw_frame *frame = new_frame(type, s->next_question, length, directory >= 0);
        if (frame) {
            frame->directory = directory;
            directory = -1;
            memcpy(frame->bytes + NW_HEADER_BYTES, payload, length);
            number = s->next_question++;
            if (!s->next_question) s->next_question = 1;
            send_frame(s, frame, NULL);
            drop_frame(frame);
        }
    }
    pthread_mutex_unlock(&s->mutex);
    if (directory >= 0) close(directory);
    return number;
}

unsigned char *nw_session_answer(struct nw_session *s, uint32_t number, uint8_t *type, size_t *length) {
    unsigned char *copy = NULL;
    pthread_mutex_lock(&s->mutex);
    struct answer **place = &s->answers;
    while (*place && (*place)->number != number) place = &(*place)->next;
    struct answer *answer = *place;
    if (answer && (copy = malloc(answer->length + 1))) {
        memcpy(copy, answer->payload, answer->length);
        *type = answer->type;
        *length = answer->length;
        *place = answer->next;
        s->answer_count--;
        free(answer);
    }
    pthread_mutex_unlock(&s->mutex);
    return copy;
}

char *nw_session_news(struct nw_session *s, size_t *length, bool *is_event, uint64_t *number) {
    char *text = NULL;
    pthread_mutex_lock(&s->mutex);
    if (s->first_news && (text = copied(s->first_news->text, s->first_news->length))) {
        *length = s->first_news->length;
        *is_event = s->first_news->is_event;
        *number = s->first_news->number;
    }
    pthread_mutex_unlock(&s->mutex);
    return text;
}

void nw_session_drop_news(struct nw_session *s, uint64_t number) {
    pthread_mutex_lock(&s->mutex);
    if (s->first_news && s->first_news->number == number) {
        drop_news(s);
        has_changed(s);
    }
    pthread_mutex_unlock(&s->mutex);
}

void nw_session_status(struct nw_session *s, struct nw_status *status) {
    pthread_mutex_lock(&s->mutex);
    *status = s->status;
    status->saves = status->saves_not_accepted = 0;
    if (!s->status.is_forked) {
        for (const struct nw_save *save = s->saves; save; save = save->next) {
            status->saves += !save->is_ended;
            status->saves_not_accepted += !save->is_ended && !save->is_accepted;
        }
        status->has_work = s->first_row || status->saves;
        status->has_news = s->first_news != NULL;
        status->is_over = s->has_ended && s->fd < 0;
    }
    pthread_mutex_unlock(&s->mutex);
}

char *nw_session_last_words(struct nw_session *s, bool *is_json) {
    pthread_mutex_lock(&s->mutex);
    char *copy = s->last_words ? copied(s->last_words, strlen(s->last_words)) : NULL;
    *is_json = s->last_words_are_json;
    pthread_mutex_unlock(&s->mutex);
    return copy;
}

uint64_t nw_session_take_not_kept(struct nw_session *s) {
    pthread_mutex_lock(&s->mutex);
    uint64_t count = s->status.not_kept;
    s->status.not_kept = 0;
    pthread_mutex_unlock(&s->mutex);
    return count;
}
