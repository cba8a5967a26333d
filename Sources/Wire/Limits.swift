// SPDX-License-Identifier: Apache-2.0
/// Every number that bounds what a peer can ask for, and nothing else. Tests/Docs/limits.py makes the table in
/// docs/PROTOCOL.md, section 8, of them and of their comments; the daemon's own budgets (memory, queues) are settings,
/// in config/.
public enum Limits {
    /// The payload of one frame, in bytes. Bulk data goes by memfd.
    public static let payloadBytes = 1 << 20
    /// Descriptors that come with one frame.
    public static let fdsPerFrame = 1
    /// Storages in one checkpoint.
    public static let storages = 100_000
    /// Names that one snapshot is written under.
    public static let targets = 4
    /// One path component, in bytes (NAME_MAX of Linux file systems).
    public static let nameBytes = 255
    /// A path, in bytes (PATH_MAX).
    public static let pathBytes = 4096
    /// A key of the log, in bytes.
    public static let keyBytes = 1024
    /// Keys of one run's log.
    public static let keysPerRun = 65_536
    /// Values of one update.
    public static let valuesPerLog = 16_384
    /// A checkpoint file, in bytes.
    public static let imageBytes: UInt64 = 1 << 40
    /// Saves of one rank of a run that have not ended.
    public static let savesInFlightPerRun = 64
    /// Saves, removals and commits of one session of files that have not ended.
    public static let filesInFlightPerSession = 256
    /// How many of these a session has with one file system at a time: others have their turn.
    public static let filesAtOncePerSession = 4
    /// Sessions of files whose connections have gone, and that may come back.
    public static let fileSessionsRemembered = 64
    /// Paths of which it is known who wrote them last, or why that failed.
    public static let pathsRemembered = 4096
    /// Directories in directories that a removal goes into.
    public static let directoryDepth = 256
    /// Connections of one user.
    public static let connections = 2048
    /// How many connections without a hello one process keeps when its user may open no more.
    public static let silentConnectionsPerProcess = 64
    /// What waits for a client that does not read, in bytes; more closes the connection.
    public static let outQueueBytes = 8 << 20
    /// How long the error that says so waits for the client to read it.
    public static let lastWordsSeconds = 1
    /// What all connections hold together, of frames that are not complete and of answers that are not read, in bytes;
    /// more closes the one that holds most.
    public static let heldBytes = 256 << 20
    /// `wait` and `finish` that one connection has asked and that are not answered yet.
    public static let answersPendingPerConnection = 64
    /// The same of all connections, closed ones too: storage that hangs keeps every question open.
    public static let answersPending = 4096
    /// How long a connection may take to say `hello`.
    public static let handshakeSeconds = 5
    /// How long a frame may take to come whole.
    public static let incompleteFrameSeconds = 30
    /// Ended runs that `status` still lists.
    public static let endedRunsRemembered = 256
    /// Failed files of one run that answers name; the others are counted.
    public static let failuresRemembered = 64
    /// The message of an error, in bytes: it may quote what a client sent.
    public static let messageBytes = 1000
    /// Streams at once, over all connections.
    public static let subscriptions = 64
    /// Events that wait for a subscriber that does not read; older ones are left out, and it is told how many.
    public static let subscriptionEvents = 256
    /// What a subscriber has not read yet, in bytes: no more rows or events are made for it then.
    public static let subscriptionBytes = 256 << 10
    /// How long the log of an ended run waits for a subscriber that reads nothing, before it is told that it is too
    /// slow.
    public static let subscriptionPatienceSeconds = 20
    /// Checkpoints of a living run whose history is kept.
    public static let checkpointsRemembered = 256
    /// Checkpoints of an ended run whose history is kept.
    public static let checkpointsRememberedEnded = 32
    /// Rows or values in one page of an answer.
    public static let pageItems = 20_000

    /// As `welcome` says them.
    public static let announced: [String: UInt64] = [
        "payload_bytes": UInt64(payloadBytes), "fds_per_frame": UInt64(fdsPerFrame),
        "storages": UInt64(storages), "targets": UInt64(targets), "name_bytes": UInt64(nameBytes),
        "path_bytes": UInt64(pathBytes), "key_bytes": UInt64(keyBytes), "keys_per_run": UInt64(keysPerRun),
        "values_per_log": UInt64(valuesPerLog), "image_bytes": imageBytes,
        "saves_in_flight_per_run": UInt64(savesInFlightPerRun),
        "files_in_flight_per_session": UInt64(filesInFlightPerSession), "connections": UInt64(connections),
        "out_queue_bytes": UInt64(outQueueBytes),
        "answers_pending_per_connection": UInt64(answersPendingPerConnection),
        "subscriptions": UInt64(subscriptions), "subscription_events": UInt64(subscriptionEvents),
        "subscription_bytes": UInt64(subscriptionBytes),
        "handshake_seconds": UInt64(handshakeSeconds),
        "incomplete_frame_seconds": UInt64(incompleteFrameSeconds),
    ]
}
