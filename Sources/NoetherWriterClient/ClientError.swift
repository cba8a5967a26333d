/// What can go wrong for a trainer, as a type. Each says what happened and what to do; what the daemon had accepted
/// stays in its care whatever happens here.
public enum ClientError: Error, Sendable, Equatable, CustomStringConvertible {
    /// Nothing answers on the socket, and no daemon could be started.
    case notListening(socket: String, reason: String)
    /// The connection ended.
    case closed
    /// The daemon refused a request; `code` is one of PROTOCOL.md section 7.
    case refused(code: String, message: String)
    /// The file system refused a file for good.
    case storage(path: String, message: String, errno: Int32)
    /// An update that is not larger than the last one.
    case updateOrder(update: Int64, last: Int64)
    case duplicateKey(String, update: Int64)
    /// A tensor whose shape, strides or offset reach beyond its storage, or a value that has no pickle.
    case unsupportedValue(String)
    /// Not done in time; the daemon goes on. `stalled` says why where storage refuses for now.
    case timeout(waitingFor: String, stalled: String?)
    /// All buffer memory is with the daemon.
    case poolExhausted(held: Int, needed: Int, limit: Int)

    public var description: String {
        switch self {
        case .notListening(let socket, let reason):
            "no daemon answers on \(socket) (\(reason)); start noether-writerd, put it on PATH, or name its socket in "
                + "NOETHER_WRITER_SOCKET"
        case .closed: "the daemon closed the connection; what it had accepted is in its care"
        case .refused(let code, let message): "\(message) (\(code))"
        case .storage(let path, let message, _): "\(path): \(message)"
        case .updateOrder(let update, let last): "update \(update) is not larger than the last one, \(last)"
        case .duplicateKey(let key, let update): "\(key) is already logged in update \(update)"
        case .unsupportedValue(let message): message
        case .timeout(let what, nil): "\(what) is not done in time; the daemon goes on"
        case .timeout(let what, let stalled?):
            "\(what) is not durable yet: \(stalled). It is in the daemon's memory, which tries again"
        case .poolExhausted(let held, let needed, let limit):
            "\(held) bytes of checkpoints wait for the daemon and \(needed) more would pass the limit of \(limit); "
                + "nothing was saved now. Save less often, or raise NOETHER_WRITER_POOL_BYTES"
        }
    }
}
