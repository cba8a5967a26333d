// SPDX-License-Identifier: Apache-2.0
/// The variables of the environment that tune this library: their names, what they may hold and what holds without
/// them. They mean what they mean to the Python client (noether_writer/environment.py); an empty one is none.
internal import Posix

enum Variable: String, CaseIterable {
    /// The daemon's socket. Read by `SocketPath`, which the daemon shares.
    case socket = "NOETHER_WRITER_SOCKET"
    /// The program that is started if no daemon listens.
    case daemon = "NOETHER_WRITER_DAEMON"
    /// What is kept of the log for a daemon that is away, in bytes.
    case queueBytes = "NOETHER_WRITER_QUEUE_BYTES"
    /// What becomes of updates beyond that.
    case whenAway = "NOETHER_WRITER_WHEN_AWAY"
    /// Of all buffers for saves, in bytes.
    case poolBytes = "NOETHER_WRITER_POOL_BYTES"
    /// How long a save waits for a buffer, and for a daemon that has no room.
    case poolTimeout = "NOETHER_WRITER_POOL_TIMEOUT"
    /// A buffer that was not used for this long goes back to the system.
    case poolIdleSeconds = "NOETHER_WRITER_POOL_IDLE_SECONDS"
    /// How long a process that ends waits for what the daemon does not have yet.
    case exitTimeout = "NOETHER_WRITER_EXIT_TIMEOUT"
    /// Whether event files are written; 0 for no.
    case tensorboard = "NOETHER_WRITER_TENSORBOARD"
    /// How many checkpoints with a tag of progress are kept.
    case keepLast = "NOETHER_WRITER_KEEP_LAST"
    /// Older ones whose update is a multiple of this stay too.
    case keepEvery = "NOETHER_WRITER_KEEP_EVERY"
    /// torchrun's: this process's number in its job, and how many there are.
    case rank = "RANK"
    case worldSize = "WORLD_SIZE"
}

struct Variables: Sendable {
    enum WhenAway: String, CaseIterable {
        /// Training continues, and the log has a gap, which is said once.
        case keepTraining = "keep-training"
        case raise
    }

    var queueByteCount = 64 << 20
    var whenAway = WhenAway.keepTraining
    /// nil: half of the memory, and what the job's limit leaves.
    var poolByteCount: Int?
    var poolTimeoutSeconds = 600.0
    var poolIdleSeconds = 300.0
    static let exitSeconds = 30.0
    var exitSeconds = Variables.exitSeconds
    /// nil leaves it to the daemon's setting.
    var tensorboard: Bool?
    /// nil leaves it to the daemon's setting, as in the next one.
    var keepLast: Int?
    var keepEvery: Int?
    var rank = 0
    var worldSize = 1

    /// Beyond these they bound nothing, and what is computed with them would overflow.
    private static let longestSeconds = 1e9
    private static let largestCount = 1 << 60

    /// - Throws: `NoetherWriterError.invalidVariable`, which names the first that can't be read.
    init(_ environment: (String) -> String? = ThisProcess.environment) throws(NoetherWriterError) {
        func text(_ variable: Variable) -> String? {
            environment(variable.rawValue).flatMap { $0.isEmpty ? nil : $0 }
        }
        func read<Value>(
            _ variable: Variable, _ wanted: String, into value: inout Value, _ parse: (String) -> Value?
        ) throws(NoetherWriterError) {
            guard let text = text(variable) else { return }
            guard let found = parse(text) else {
                throw .invalidVariable(name: variable.rawValue, value: text, wanted: wanted)
            }
            value = found
        }
        func count(_ text: String) -> Int? {
            Int(text).flatMap { $0 >= 0 ? min($0, Self.largestCount) : nil }
        }
        func seconds(_ text: String) -> Double? {
            Double(text).flatMap { $0 >= 0 ? min($0, Self.longestSeconds) : nil }
        }
        let bytes = "a number of bytes, in digits"
        let time = "a number of seconds"
        try read(.queueBytes, bytes, into: &queueByteCount, count)
        let policies = WhenAway.allCases.map(\.rawValue).joined(separator: " or ")
        try read(.whenAway, policies, into: &whenAway) { WhenAway(rawValue: $0) }
        try read(.poolBytes, bytes, into: &poolByteCount) { count($0).map { .some($0) } }
        try read(.poolTimeout, time, into: &poolTimeoutSeconds, seconds)
        try read(.poolIdleSeconds, time, into: &poolIdleSeconds, seconds)
        try read(.exitTimeout, time, into: &exitSeconds, seconds)
        try read(.rank, "this process's number in its job", into: &rank, count)
        try read(.worldSize, "the number of processes of this job", into: &worldSize, count)
        let checkpoints = "a number of checkpoints, in digits"
        try read(.keepLast, checkpoints, into: &keepLast) { count($0).map { .some($0) } }
        try read(.keepEvery, checkpoints, into: &keepEvery) { count($0).map { .some($0) } }
        tensorboard = text(.tensorboard).map { $0 != "0" }
    }
}
