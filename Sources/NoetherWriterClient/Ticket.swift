// SPDX-License-Identifier: Apache-2.0
internal import Posix
internal import Synchronization
internal import Wire

/// A save on its way to the disk. Any thread and any task may look and wait, also after its ``Run`` is gone.
public final class Ticket: Sendable {
    private struct State {
        var paths: [String]
        var isAccepted = false
        var written: Set<Int> = []
        var durable: Set<Int> = []
        var stall: Stall?
        var byteCount: UInt64 = 0
        /// By target.
        var bytesDone: [Int: UInt64] = [:]
        var failure: NoetherWriterError?
        var observers: [Int: AsyncStream<Progress>.Continuation] = [:]
        var nextObserver = 0
    }

    /// Storage refuses for now.
    struct Stall: Sendable {
        var reason: String
        /// Monotonic seconds.
        var since: Double
    }

    /// How far a save is.
    public struct Progress: Sendable, Equatable {
        /// Bytes of all files; 0 before the daemon has accepted it.
        public var bytesTotal: UInt64
        /// How many of these bytes the file system has.
        public var bytesDone: UInt64
        /// Why storage refuses for now.
        public var stalled: String?
    }

    private let count: Int
    private let state: Mutex<State>
    private let end = Completion<NoetherWriterError?>()
    private let session: Session
    private let number: Mutex<UInt64> = Mutex(0)

    /// - Parameter paths: of the files, in order of the targets.
    init(_ session: Session, paths: [String]) {
        self.session = session
        count = paths.count
        state = Mutex(State(paths: paths))
    }

    /// The session's number for it.
    var sequence: UInt64 {
        get { number.withLock { $0 } }
        set { number.withLock { $0 = newValue } }
    }

    /// The files, in order of the targets.
    public var paths: [String] { state.withLock { $0.paths } }
    /// The daemon holds the snapshot: the trainer may die.
    public var isAccepted: Bool { state.withLock { $0.isAccepted } }
    /// The file system has all of it.
    public var isWritten: Bool { state.withLock { $0.written.count == count } }
    /// Every file survives power loss.
    public var isDurable: Bool { state.withLock { $0.durable.count == count } }
    /// Every file is durable or given up.
    public var isDone: Bool { end.value != nil }
    /// Why a file was given up, or nil.
    public var failure: NoetherWriterError? { state.withLock { $0.failure } }
    /// Bytes of all files, as the daemon has said with its acceptance; 0 before.
    public var bytesTotal: UInt64 { state.withLock { $0.byteCount } }
    /// How many of these bytes the file system has.
    public var bytesDone: UInt64 { state.withLock { Self.progress($0).bytesDone } }
    /// Why storage refuses for now.
    public var stalled: String? { stall?.reason }

    var stall: Stall? { state.withLock { $0.stall } }
    /// In messages.
    var name: String { state.withLock { $0.paths.joined(separator: ", ") } }

    var fileNames: [String] {
        state.withLock { $0.paths.map { String($0.split(separator: "/").last ?? "") } }
    }

    private static func progress(_ state: State) -> Progress {
        Progress(
            bytesTotal: state.byteCount,
            bytesDone: min(state.byteCount, state.bytesDone.values.reduce(0, +)),
            stalled: state.stall?.reason)
    }

    /// How far it is, now and with each change, until it is durable or given up. A slow reader gets the newest only.
    public var progress: AsyncStream<Progress> {
        AsyncStream(bufferingPolicy: .bufferingNewest(1)) { continuation in
            let number = state.withLock { state in
                state.nextObserver += 1
                state.observers[state.nextObserver] = continuation
                continuation.yield(Self.progress(state))
                return state.nextObserver
            }
            continuation.onTermination = { [weak self] _ in
                self?.state.withLock { _ = $0.observers.removeValue(forKey: number) }
            }
            if end.value != nil { continuation.finish() }
        }
    }

    // MARK: Waiting

    /// Returns when every file of this save is durable. Holds no thread.
    /// - Parameter timeout: nil waits as long as storage accepts data and the daemon is there.
    /// - Throws: ``NoetherWriterError``: `.storage` if a file was given up, `.refused`; `.timeout` if the time ran out
    ///   or, without a timeout, storage refused for 30 s; `.unavailable` if the daemon has been away for a minute or
    ///   does not answer. The save is kept then, and continues. `CancellationError` if the task is cancelled: the
    ///   save continues.
    public func waitUntilDurable(timeout: Duration? = nil) async throws {
        var patience = Patience(session, timeout)
        try await arrived(&patience)
    }

    /// As ``waitUntilDurable(timeout:)``, and blocks this thread.
    /// - Throws: ``NoetherWriterError``.
    @available(*, noasync, message: "it blocks a thread of the tasks: await waitUntilDurable(timeout:)")
    public func waitBlocking(timeout: Duration? = nil) throws(NoetherWriterError) {
        var patience = Patience(session, timeout)
        try wait(&patience)
    }

    func arrived(_ patience: inout Patience) async throws {
        if let error = try await end.arrived(&patience, self) { throw told(error) }
    }

    func wait(_ patience: inout Patience) throws(NoetherWriterError) {
        if let error = try end.wait(&patience, self) { throw told(error) }
    }

    /// It is said here; nobody else says it again.
    private func told(_ error: NoetherWriterError) -> NoetherWriterError {
        session.told(sequence)
        return error
    }

    /// As ``waitBlocking(timeout:)``.
    @available(*, deprecated, renamed: "waitBlocking(timeout:)")
    @available(*, noasync, message: "it blocks a thread of the tasks: await waitUntilDurable(timeout:)")
    public func wait(timeout: Duration? = nil) throws(NoetherWriterError) { try waitBlocking(timeout: timeout) }

    /// As ``waitUntilDurable(timeout:)``.
    @available(*, deprecated, renamed: "waitUntilDurable(timeout:)")
    public func durable() async throws { try await waitUntilDurable() }

    // MARK: What the daemon says

    func handle(_ event: CheckpointEvent) {
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
                state.stall = nil
            case .stalled:
                state.stall = Stall(
                    reason: event.error?.message ?? "storage refuses",
                    since: state.stall?.since ?? Clock.monotonicSeconds)
            case .failed: state.failure = state.failure ?? Self.error(of: event)
            case .released: break
            }
            for observer in state.observers.values { observer.yield(Self.progress(state)) }
        }
        if event.event == .failed || event.event == .released { finish(state.withLock { $0.failure }) }
    }

    private func finish(_ error: NoetherWriterError?) {
        end.complete(error)
        let observers = state.withLock { state in
            defer { state.observers = [:] }
            return state.observers.values
        }
        for observer in observers { observer.finish() }
    }

    static func error(of event: CheckpointEvent) -> NoetherWriterError {
        guard let error = event.error else { return .refused(code: "storage", message: "the save failed") }
        guard error.code == WireError.Code.storage.rawValue else {
            return .refused(code: error.code, message: error.message)
        }
        return .storage(path: event.path ?? "the save", message: error.message, errno: error.errno ?? 0)
    }
}
