// SPDX-License-Identifier: Apache-2.0
/// What can go wrong for a trainer, as a type. Each says what happened, what was kept and what to do (docs/ERRORS.md);
/// what the daemon had accepted it finishes, whatever happens here.
public enum ClientError: Error, Sendable, Equatable, CustomStringConvertible {
    /// No daemon of this user answers on the socket, and none could be started. Nothing was sent; `reason` says what to
    /// correct.
    case notListening(socket: String, reason: String)
    /// The daemon ended the connection. A run keeps what it has not taken, and sends it to the next daemon.
    case closed
    /// This run was closed by its own process: nothing more is sent. Open it again.
    case runClosed
    /// The daemon refused a request, and nothing of it was kept; `code` is one of docs/PROTOCOL.md, which says
    /// what to do.
    case refused(code: String, message: String)
    /// The file system refused a file for good. Older files are as they were: correct what the message names, and save
    /// again.
    case storage(path: String, message: String, errno: Int32)
    /// An update that is not larger than the last one. Nothing of it was logged.
    case updateOrder(update: Int64, last: Int64)
    /// A key came twice in one update. Nothing of it was logged.
    case duplicateKey(String, update: Int64)
    /// A tensor whose shape, strides or offset reach beyond its storage, or a key, value or save that cannot be
    /// sent. Nothing of it was sent.
    case unsupportedValue(String)
    /// Not done in time. Nothing is lost, the daemon continues: wait again. `stalled` says why if storage refuses for
    /// now.
    case timeout(waitingFor: String, stalled: String?)
    /// All buffer memory is with the daemon, in bytes. This save was not made, earlier saves continue: save less
    /// often, or raise NOETHER_WRITER_POOL_BYTES.
    case poolExhausted(held: Int, needed: Int, limit: Int)
    /// A variable of the environment that can't be read. Nothing was begun: correct it, or unset it.
    case invalidVariable(name: String, value: String, wanted: String)
    /// Ranks of one job share a run and its one log, which rank 0 writes. Nothing was logged.
    case notRankZero(rank: Int)

    /// What happened, what was kept and what to do, in a sentence.
    public var description: String {
        switch self {
        case .notListening(let socket, let reason): "no daemon answers on \(socket): \(reason)"
        case .closed: "the daemon closed the connection; what it had accepted is in its care"
        case .runClosed: "this run is closed, and nothing more is sent: open it again to continue it"
        case .refused(let code, let message) where code == "unsupported-version" || code == "unknown-type":
            "\(message); use one version of noether-writer on both sides, and restart the daemon after an update (\(code))"
        case .refused(let code, let message): "\(message) (\(code))"
        case .storage(let path, let message, _): message.contains(path) ? message : "\(path): \(message)"
        case .updateOrder(let update, let last):
            "update \(update) is not larger than the last one, \(last): nothing of it was logged"
        case .duplicateKey(let key, let update):
            "\(key) is twice in update \(update): nothing of it was logged"
        case .unsupportedValue(let message): message
        case .timeout(let what, nil): "\(what) is not done in time; the daemon continues"
        case .timeout(let what, let stalled?):
            "\(what) is not durable yet: \(stalled). The daemon keeps it in memory and tries again: free space or correct "
                + "the permissions; the write then completes"
        case .poolExhausted(let held, let needed, let limit):
            "\(held) bytes of checkpoints wait for the daemon, and \(needed) more would exceed the limit of \(limit); "
                + "the save was not made. Free storage, save less often, or raise NOETHER_WRITER_POOL_BYTES"
        case .invalidVariable(let name, let value, let wanted):
            "\(name) must be \(wanted), not \(value.debugDescription)"
        case .notRankZero(let rank): "this is rank \(rank): a run has one log, and rank 0 writes it. Nothing was logged"
        }
    }
}
