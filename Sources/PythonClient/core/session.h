// SPDX-License-Identifier: Apache-2.0
// One run's session with the daemon: everything about it that may not be left half done.
//
// Sequence numbers, key ids, the frames that are kept until the daemon has them, who owns a buffer, what is sent and
// what has come: each function here changes all of it or nothing, calls no Python, and blocks on nothing but its own
// mutex. So a signal handler, an exception or another thread of the trainer meets a session only before or after a
// call, never within one.
//
// The bytes are those of docs/PROTOCOL.md. Nothing here decides what a trainer is told: the Python around it reads the
// state and says it.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pool.h"

enum {
    NW_TARGETS = 4,
    NW_KEY_BYTES = 1024,
    NW_KEYS = 65536,
    NW_VALUES = 16384,
    NW_HEADER_BYTES = 16,
    NW_PAYLOAD_BYTES = 1 << 20,
    // Answers that nobody has fetched, since whoever asked was interrupted.
    NW_ANSWERS = 64,
    // Of updates that the daemon has refused; there may be one an update.
    NW_ERRORS = 64,
};

enum nw_tag { NW_FLOAT, NW_INT, NW_BOOL, NW_NONE, NW_STR, NW_BIG_INT };

struct nw_value {
    uint32_t key;
    enum nw_tag tag;
    uint64_t bits;
    // Of a string or a big integer: `bits` bytes.
    const char *tail;
};

struct nw_key {
    const char *name;
    size_t length;
};

// What became of an update.
enum nw_logged {
    NW_LOGGED,
    // The same as the last update: it was added to that row, and a key that the row had has the later value now.
    NW_LOGGED_TWICE,
    // It could not be kept, since the daemon has been away for too long.
    NW_NOT_KEPT,
    // Training goes on without a log.
    NW_LOG_ENDED,
    // Nothing of it was logged:
    NW_CLOSED = 16,
    NW_FORKED,
    NW_IN_DISORDER,
    NW_QUEUE_FULL,
    NW_TOO_MANY_KEYS,
    NW_TOO_LARGE,
    NW_MEMORY,
    // As much is kept as may be, and the daemon is there and takes it: there is room in a moment.
    NW_SLOW,
};

// Why `nw_session_serve` has returned.
enum nw_reason {
    NW_CHANGED = 1,
    NW_NEWS = 2,
    NW_PENDING = 4,
    NW_LOST = 8,
    NW_OVER = 16,
    NW_DISMISSED = 32,
};

enum nw_state { NW_AWAY, NW_GREETING, NW_OPEN };

struct nw_session;

// A save, from `nw_session_hand_over` on known to the session. `user` is the caller's; the session never looks at it.
struct nw_save {
    unsigned references;
    struct nw_save *next;
    void *user;
    uint64_t sequence;
    int targets;
    // Handed over; its frame is there; released, or failed before it was sent.
    bool is_handed_over, is_sent, is_ended;
    bool is_accepted, is_failed, is_told, is_refused;
    // No save, but a frame whose order counts: it goes when the daemon has accepted all that is before it, and what is
    // after it waits until the daemon has accepted it.
    bool is_barrier;
    // On this connection: it was handed to the socket; the daemon has accepted it.
    bool is_out, is_held;
    uint8_t written, durable;
    struct nw_frame *frame;
    struct nw_buffer *buffer;
    uint64_t total_bytes;
    uint64_t done_bytes[NW_TARGETS];
    // JSON, as it came; NULL: none. `stalled` and `error` are objects of the protocol, paths are strings.
    char *paths[NW_TARGETS];
    char *stalled;
    char *error;
    double stalled_since;
    double refused_since;
    double send_at;
};

// `number` is one of nw_session_number's, taken when the trainer's call began: of two saves that are made at once, in a
// signal's handler perhaps, the one that was begun later is the newer one.
struct nw_save *nw_save_new(uint64_t number, int targets, bool is_barrier, void *user);
void nw_save_drop(struct nw_session *session, struct nw_save *save);

// Options of a session.
struct nw_options {
    // Bytes of updates that are kept while the daemon is away.
    size_t queue_bytes;
    // A full queue refuses updates, instead of leaving them out.
    bool refuses;
    // For how long a save may wait for a daemon that has no room.
    double busy_seconds;
};

struct nw_session *nw_session_new(const struct nw_options *options);
// NULL is allowed. Closes the connection, and lets go of every buffer.
void nw_session_free(struct nw_session *session);
// Every session of this process: a forked child holds none of its parent's sockets.
void nw_sessions_forget(void);

// MARK: The connection

// Takes a connected socket of its own (it is copied). False: the session is closed.
bool nw_session_attach(struct nw_session *session, int fd);
// `run_opened` has come: drops the updates up to `last_sequence`, and sends what the daemon does not have.
void nw_session_opened(struct nw_session *session, uint64_t last_sequence, bool merges_rows);
void nw_session_detach(struct nw_session *session);
// Nothing more is taken from the trainer. The session ends as soon as the daemon has taken what it was given; until
// then whoever keeps it reconnects as before.
void nw_session_close(struct nw_session *session);
// Nobody holds the run any more: it ends as soon as everything is durable.
void nw_session_abandon(struct nw_session *session);
// It ends now, whatever the daemon does not have.
void nw_session_end(struct nw_session *session);
// Reads and sends until the state has changed since `seen` (or, if `seen` is NULL, until there is something to do for
// whoever keeps the session; that a connection is missing counts only with `heeds_loss`), or until `seconds` have
// passed. Any number of threads may call it; one of them serves all. Returns nw_reason.
unsigned nw_session_serve(struct nw_session *session, const uint64_t *seen, bool heeds_loss, double seconds);
// Somebody asks: a connection is missing from now on, until there is one.
void nw_session_want(struct nw_session *session);
// One thread at a time keeps the session. Returns whether it is the caller.
bool nw_session_claim(struct nw_session *session);
void nw_session_unclaim(struct nw_session *session);
// Whoever keeps the session is to leave it as it is, and nobody keeps it from now on.
void nw_session_dismiss(struct nw_session *session);

// MARK: What the trainer says

uint32_t nw_session_key_count(struct nw_session *session);
// The id of a key; negative: it has none.
int64_t nw_session_key(struct nw_session *session, const char *name, size_t length);
// All of the update is taken, or nothing: `new_keys` get the ids from `first_new` on, which were free when they were
// chosen.
enum nw_logged nw_session_log(
    struct nw_session *session, const int64_t *update, double wall_time, const struct nw_value *values, uint32_t count,
    uint32_t first_new, const struct nw_key *new_keys, uint32_t new_count);
// A number for a `finish` or a save; 0: the session is closed.
uint64_t nw_session_number(struct nw_session *session);
// Saves are the session's until they end. False: it is closed.
bool nw_session_hand_over(struct nw_session *session, struct nw_save **saves, int count);
// The frame of a save is there (`payload`, but for its number): its buffer is the session's until the daemon releases
// it. `pickles` are copied into the buffer from `place` on. A save that has been sent, or has failed, stays as it is.
// A barrier has no buffer, and its `payload` has its number already. False: no memory.
bool nw_session_send(struct nw_session *session, struct nw_save *save, uint8_t type, struct nw_buffer *buffer,
                     const unsigned char *payload, size_t length, size_t place, const unsigned char *const *pickles,
                     const size_t *lengths, int count);
// It can't be sent, for a reason that the caller knows.
void nw_session_fail(struct nw_session *session, struct nw_save *save);
// A question: its number, or 0 where there is no connection (or, while it is being opened, where `is_greeting` is
// false).
// `directory`, or -1, goes with it, and is closed in any case.
uint32_t nw_session_ask(struct nw_session *session, uint8_t type, const void *payload, size_t length, bool is_greeting,
                        int directory);
// The daemon takes no update from this one on.
void nw_session_end_log(struct nw_session *session, uint64_t sequence);
// The daemon has refused an update, and has said so on a connection that was lost. Returns false if that was heard.
bool nw_session_refuse(struct nw_session *session, uint64_t sequence);
// A log that was there before: the daemon's, or a file's.
void nw_session_take_log_on(struct nw_session *session, int64_t update, uint64_t rows);

// MARK: What has come

// The answer to a question, once: a copy of its payload, which the caller frees; NULL: none yet.
unsigned char *nw_session_answer(struct nw_session *session, uint32_t number, uint8_t *type, size_t *length);
// The first thing that is worth a word: an `error` that answers no question, or a save's event. The caller frees it,
// and drops it by its number when the word was said; NULL: nothing.
char *nw_session_news(struct nw_session *session, size_t *length, bool *is_event, uint64_t *number);
void nw_session_drop_news(struct nw_session *session, uint64_t number);
// The first save that waits for its frame, with a reference; NULL: none.
struct nw_save *nw_session_pending(struct nw_session *session);
// The first save at or behind `after` (0: the first one) that is not at its end, or, with `failed`, that has failed and
// was not told.
struct nw_save *nw_session_find(struct nw_session *session, uint64_t after, bool failed);
void nw_session_tell(struct nw_session *session, struct nw_save *save);
// A save that the session does not know any more, for its caller to drop with what it holds; NULL: none. `all`: also
// one that has not ended: nothing more will be heard of it, and its buffer is never used again.
struct nw_save *nw_session_reap(struct nw_session *session, bool all);

struct nw_status {
    uint64_t generation;
    enum nw_state state;
    // Counts connections.
    uint64_t connection;
    bool is_closed, is_forked, is_abandoned, has_work, is_over, log_ended, is_wanted, is_kept, has_news;
    // In monotonic seconds: since when there has been no connection, and since when the last one was open.
    double away_since, connected_at;
    uint64_t sequence;
    bool has_update, has_durable;
    int64_t last_update, durable_update;
    uint64_t rows;
    // The last number up to which the daemon has every row.
    uint64_t taken;
    uint64_t kept_rows, kept_bytes, not_kept;
    uint64_t saves, saves_not_accepted;
};
void nw_session_status(struct nw_session *session, struct nw_status *status);
// What the daemon said when it ended the connection, or why this side did; the caller frees it; NULL: nothing was said.
char *nw_session_last_words(struct nw_session *session, bool *is_json);
// How many updates were not kept, once: 0 from then on.
uint64_t nw_session_take_not_kept(struct nw_session *session);

// A copy of what became of a save, taken at once.
struct nw_save_status {
    uint64_t sequence;
    bool is_handed_over, is_sent, is_ended, is_accepted, is_failed, is_told;
    unsigned written, durable;
    uint64_t total_bytes, done_bytes;
    double stalled_since;
};
void nw_save_status(struct nw_session *session, struct nw_save *save, struct nw_save_status *status);
// "stalled", "error", or the path of a target (0 ...): JSON; the caller frees it; NULL: none.
enum nw_text { NW_PATH, NW_STALLED, NW_ERROR };
char *nw_save_text(struct nw_session *session, struct nw_save *save, enum nw_text which, int target);
