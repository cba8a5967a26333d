// SPDX-License-Identifier: Apache-2.0
public import FoundationEssentials
internal import Posix
internal import Wire

/// What can go wrong for a trainer, as a type. Each says what happened, what was kept and what to do (docs/ERRORS.md);
/// what the daemon had accepted it finishes, whatever happens here. ``code`` names its kind, as the Python client does.
public enum NoetherWriterError: Error, Sendable, Equatable, CustomStringConvertible {
    /// No daemon of this user answers on the socket, and none could be started. Nothing was sent; `reason` says what to
    /// mend.
    case notListening(socket: String, reason: String)
    /// No daemon of this user can be at that path, in words. Nothing was sent, and the file there is as it was: correct
    /// NOETHER_WRITER_SOCKET, or unset it.
    case wrongSocket(String)
    /// The daemon ended the connection. A run keeps what it has not taken, and sends it to the next daemon.
    case closed
    /// The daemon is away or does not answer; the words say for how long. What it has not taken is kept in this process
    /// and sent when it is back.
    case unavailable(String)
    /// This run was closed by its own process: nothing more is sent. Open it again.
    case runClosed
    /// The daemon, or this library before it sends, refused a request, and nothing of it was kept; `code` is one of
    /// docs/PROTOCOL.md, which says what to do.
    case refused(code: String, message: String)
    /// A run id, a stage, a model's name, a tag or an info text cannot be a part of a path, or a path is not valid.
    /// Nothing was written: choose another one.
    case refusedName(String)
    /// The file system refused a file for good. Older files are as they were: mend what the message names, and save
    /// again.
    case storage(path: String, message: String, errno: Int32)
    /// An update that is not larger than the last one. Nothing of it was logged.
    case updateOrder(update: Int64, last: Int64)
    /// A key twice in one update. Nothing of it was logged.
    case duplicateKey(String, update: Int64)
    /// A tensor whose shape, strides or offset reach beyond its storage, or a key, value or save that can't be sent.
    /// Nothing of it was.
    case unsupportedValue(String)
    /// Not done in time, in words. Nothing is lost, the daemon continues: wait again. `stalled` says why if storage
    /// refuses for now.
    case timeout(waitingFor: String, stalled: String?)
    /// All buffer memory is with the daemon, in bytes. Nothing was saved now, earlier saves go on: save less often, or
    /// raise NOETHER_WRITER_POOL_BYTES.
    case poolExhausted(held: Int, needed: Int, limit: Int)
    /// The memory limit of this job (its control group) leaves less than a save needs, in bytes: the kernel would have
    /// killed the job. Nothing was saved.
    case jobMemory(needed: Int, room: Int)
    /// So many saves wait for the daemon, and each holds a descriptor. Nothing was saved now, earlier saves go on: save
    /// less often, or raise the limit (`ulimit -n`).
    case tooManySaves(count: Int)
    /// A variable of the environment that can't be read. Nothing was begun: correct it, or unset it.
    case invalidVariable(name: String, value: String, wanted: String)
    /// Ranks of one job share a run and its one log, which rank 0 writes. Nothing was logged.
    case notRankZero(rank: Int)

    /// The kind of an error, as the Python client has a type for each.
    public enum Code: String, Sendable, CaseIterable {
        /// No daemon listens, and none could be started.
        case daemonNotFound
        /// No daemon of this user can be at the path of the socket.
        case wrongSocket
        /// The daemon is away or does not answer.
        case daemonUnavailable
        /// The run was closed by its own process.
        case runClosed
        /// The daemon and this library do not understand one another.
        case protocolError
        /// A name or a path that can't be one.
        case refusedName
        /// A run to be followed that the daemon does not have.
        case unknownRun
        /// A subscription's reader had not read every row of a run that has ended.
        case tooSlow
        /// The daemon has no room.
        case daemonBusy
        /// Another living process holds this run.
        case runInUse
        /// Another rank wrote the file of that name.
        case nameInUse
        /// A newer writer brings the run's log now.
        case logTakenOver
        /// The log has reached the daemon's limit.
        case logFull
        /// Updates that the daemon had acknowledged are gone from the log.
        case logDamaged
        /// An update that is not larger than the last one.
        case updateOrder
        /// A key twice in one update.
        case duplicateKey
        /// Something that can't be sent.
        case unsupportedValue
        /// All buffer memory is with the daemon.
        case poolExhausted
        /// The file system refused for good.
        case storage
        /// Not done in time.
        case waitTimeout
        /// Storage refuses for now.
        case checkpointStalled
        /// A variable of the environment that can't be read.
        case invalidVariable
        /// Only rank 0 logs.
        case notRankZero
    }

    /// What kind it is.
    public var code: Code {
        switch self {
        case .notListening: .daemonNotFound
        case .wrongSocket: .wrongSocket
        case .closed, .unavailable: .daemonUnavailable
        case .runClosed: .runClosed
        case .refused(let code, _): Self.codes[code] ?? .protocolError
        case .refusedName: .refusedName
        case .storage: .storage
        case .updateOrder: .updateOrder
        case .duplicateKey: .duplicateKey
        case .unsupportedValue: .unsupportedValue
        case .timeout(_, let stalled): stalled == nil ? .waitTimeout : .checkpointStalled
        case .poolExhausted, .jobMemory, .tooManySaves: .poolExhausted
        case .invalidVariable: .invalidVariable
        case .notRankZero: .notRankZero
        }
    }

    /// This library's own beside those of the protocol: the daemon cannot know what it has forgotten.
    static let logDamaged = "log-damaged"

    /// By the codes of docs/PROTOCOL.md, section 7; as noether_writer/errors.py has them.
    private static let codes: [String: Code] = [
        "bad-name": .refusedName, "bad-path": .refusedName, "bad-key": .unsupportedValue,
        "bad-rank": .unsupportedValue, "wrong-user": .wrongSocket,
        "run-in-use": .runInUse, "name-in-use": .nameInUse, "unknown-run": .unknownRun, "too-slow": .tooSlow,
        "log-taken-over": .logTakenOver, "update-order": .updateOrder, "log-full": .logFull,
        logDamaged: .logDamaged,
        "draining": .daemonUnavailable, "busy": .daemonBusy, "too-many": .daemonBusy, "storage": .storage,
    ]

    /// What is kept if storage refuses, and what to do.
    static let stalledWords =
        "The daemon keeps it in memory and tries again: free space or correct the permissions; the write then completes"

    /// What happened, what was kept and what to do, in a sentence.
    public var description: String {
        switch self {
        case .notListening(let socket, let reason):
            "no daemon listens on \(socket)\(reason.hasPrefix("and ") ? "," : ":") \(reason)"
        case .wrongSocket(let words): words
        case .closed: "the daemon closed the connection; what it had accepted is safe with it"
        case .unavailable(let words): words
        case .runClosed: "this run is closed, and nothing more is sent: open it again to continue it"
        case .refused(let code, let message) where code == "unsupported-version" || code == "unknown-type":
            "\(message); use one version of noether-writer on both sides, and restart the daemon after an update (\(code))"
        case .refused(let code, let message): "\(message) (\(code))"
        case .refusedName(let words): words
        case .storage(let path, let message, _):
            path.isEmpty || message.contains(path) ? message : "\(path): \(message)"
        case .updateOrder(let update, let last):
            "update \(update) is not larger than the last one, \(last): nothing of it was logged"
        case .duplicateKey(let key, let update):
            "\(key) is twice in update \(update): nothing of it was logged"
        case .unsupportedValue(let message): message
        case .timeout(let words, nil): words
        case .timeout(let run, let stalled?) where !run.hasPrefix("/"):
            "\(run) is not durable yet: \(stalled). \(Self.stalledWords)"
        case .timeout(let what, let stalled?):
            "not durable yet: \(stalled.contains(what) ? stalled : "\(what): \(stalled)"). \(Self.stalledWords)"
        case .poolExhausted(let held, let needed, let limit):
            "\(held) bytes of checkpoints wait for the daemon, and \(needed) more would exceed the limit of \(limit); "
                + "the save was not made. Free storage, save less often, or raise NOETHER_WRITER_POOL_BYTES"
        case .tooManySaves(let count):
            "\(count) saves wait for the daemon, and each holds a file descriptor: one more would exceed a quarter of the "
                + "descriptors that this process may have; the save was not made. Free storage, save less often, or raise "
                + "the limit (`ulimit -n`)"
        case .jobMemory(let needed, let room):
            "a save needs a buffer of \(needed) bytes, and the memory limit of this job (its control group) leaves "
                + "\(room): the save was not made, since the kernel would have killed the job. Give the job more memory, "
                + "by the size of what it saves, or set NOETHER_WRITER_POOL_BYTES to try it"
        case .invalidVariable(let name, let value, let wanted):
            "\(name) must be \(wanted), not \(value.debugDescription)"
        case .notRankZero(let rank): "this is rank \(rank): a run has one log, and rank 0 writes it. Nothing was logged"
        }
    }
}

extension NoetherWriterError: LocalizedError {
    /// As ``description``.
    public var errorDescription: String? { description }
}

/// Its name before version 1.
@available(*, deprecated, renamed: "NoetherWriterError")
public typealias ClientError = NoetherWriterError

extension NoetherWriterError {
    /// What went wrong below this library, as one of its own errors: nothing that can't be named leaves it.
    init(_ error: any Error) {
        switch error {
        case let error as NoetherWriterError: self = error
        case let error as WireError: self = .refused(code: error.code.rawValue, message: error.message)
        case let error as PosixError:
            self = .unavailable(
                "the connection to the daemon is lost: \(error); what the daemon had accepted is safe with it")
        default: self = .refused(code: WireError.Code.badFrame.rawValue, message: "\(error)")
        }
    }

    /// Runs what may throw anything.
    static func typed<Value>(_ body: () throws -> Value) throws(NoetherWriterError) -> Value {
        do { return try body() } catch { throw NoetherWriterError(error) }
    }
}
