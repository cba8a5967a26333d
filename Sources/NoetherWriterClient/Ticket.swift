// SPDX-License-Identifier: Apache-2.0
import Dispatch
internal import Posix
internal import Synchronization
internal import Wire

/// A save on its way to the disk. Any thread may look and wait.
public final class Ticket: Sendable {
    private struct State {
        var paths: [String]
        var isAccepted = false
        var written: Set<Int> = []
        var durable: Set<Int> = []
        var stalled: String?
        var stalledSince = 0.0
        var byteCount: UInt64 = 0
        /// By target.
        var bytesDone: [Int: UInt64] = [:]
    }

    /// For how long storage may refuse before a `wait` without a timeout gives up.
    static let stallTime = Duration.seconds(30)

    private let count: Int
    private let state: Mutex<State>
    private let end = Completion<ClientError?>()

    private let awaySeconds: @Sendable () -> Double

    /// - Parameter awaySeconds: for how long the daemon has been away.
    init(count: Int, awaySeconds: @escaping @Sendable () -> Double) {
        self.count = count
        self.awaySeconds = awaySeconds
        state = Mutex(State(paths: Array(repeating: "", count: count)))
    }

    /// The files, in order of the targets; empty until the daemon has named them.
    public var paths: [String] { state.withLock { $0.paths } }
    /// The daemon holds the snapshot: the trainer may die.
    public var isAccepted: Bool { state.withLock { $0.isAccepted } }
    /// The file system has all of it.
    public var isWritten: Bool { state.withLock { $0.written.count == count } }
    /// Every file survives power loss.
    public var isDurable: Bool { state.withLock { $0.durable.count == count } }
    /// Bytes of all files, as the daemon has said with its acceptance; 0 before.
    public var bytesTotal: UInt64 { state.withLock { $0.byteCount } }
    /// Of these, what the file system has.
    public var bytesDone: UInt64 {
        state.withLock { min($0.byteCount, $0.bytesDone.values.reduce(0, +)) }
    }
    /// Why storage refuses for now.
    public var stalled: String? { state.withLock { $0.stalled } }

    /// Blocks until every file of this save is durable.
    /// - Parameter timeout: nil waits as long as storage accepts data and the daemon is there.
    /// - Throws: ``ClientError``: `.storage` if a file was given up, `.refused`; `.timeout` if the time is over,
    ///   or, without a timeout, if storage refused for 30 s or the daemon has been away for a minute. The save is
    ///   kept then, and continues.
    public func wait(timeout: Duration? = nil) throws(ClientError) {
        let deadline = DispatchTime.after(timeout)
        while true {
            let next = min(deadline, .after(.seconds(1)))
            if let result = end.wait(until: next) {
                if let error = result { throw error }
                return
            }
            let (stalled, since, path) = state.withLock { ($0.stalled, $0.stalledSince, $0.paths[0]) }
            let hasStalled =
                timeout == nil && stalled != nil
                && Clock.monotonicSeconds - since > Self.stallTime.seconds
            let isAway = timeout == nil && awaySeconds() > Link.awayTime.seconds
            if hasStalled || isAway || DispatchTime.now() >= deadline {
                throw .timeout(waitingFor: path.isEmpty ? "the save" : path, stalled: stalled)
            }
        }
    }

    /// Returns when every file is durable.
    /// - Throws: ``ClientError`` if one was given up.
    public func durable() async throws {
        if let error = await end.arrived() { throw error }
    }

    func take(_ event: CheckpointEvent) {
        let target = event.target ?? 0
        state.withLock { state in
            if let path = event.path, state.paths.indices.contains(target) { state.paths[target] = path }
            switch event.event {
            case .accepted:
                state.isAccepted = true
                state.byteCount = event.bytes ?? 0
            case .progress: state.bytesDone[target] = event.bytesDone ?? 0
            case .written:
                state.written.insert(target)
                state.bytesDone[target] = event.bytes ?? 0
            case .durable:
                state.durable.insert(target)
                state.bytesDone[target] = event.bytes ?? 0
                state.stalled = nil
            case .stalled:
                if state.stalled == nil { state.stalledSince = Clock.monotonicSeconds }
                state.stalled = event.error?.message ?? "storage refuses"
            case .failed, .released: break
            }
        }
        if event.event == .failed { end.complete(Self.error(of: event)) }
        if event.event == .released { end.complete(nil) }
    }

    static func error(of event: CheckpointEvent) -> ClientError {
        guard let error = event.error else { return .refused(code: "storage", message: "the save failed") }
        guard error.code == WireError.Code.storage.rawValue else {
            return .refused(code: error.code, message: error.message)
        }
        return .storage(path: event.path ?? "the save", message: error.message, errno: error.errno ?? 0)
    }
}
