// SPDX-License-Identifier: Apache-2.0
/// Concurrency model: `state` is under its lock, and the socket is read under it, without waiting. A task that waits
/// holds no thread: one thread of the process (`Readiness`) watches the sockets of all subscriptions.
public import Dispatch
internal import Posix
internal import Synchronization
package import Wire

/// Following a run, or the daemon as a whole: an AsyncSequence that pulls. Nothing is read that was not asked for, so a
/// slow reader holds no memory, here or in the daemon.
public final class Subscription: AsyncSequence, Sendable {
    /// One update's values.
    public struct Row: Sendable {
        /// From 0, in the log.
        public var index: Int
        /// Rows that are there now.
        public var total: Int
        /// Which one.
        public var update: Int64
        /// Seconds since 1970; 0 if it is not known.
        public var wallTime: Double
        /// In the order in which they were logged.
        public var values: [(key: String, value: Scalar)]
    }

    /// What a subscription hears.
    public enum Event: Sendable {
        /// An update was logged.
        case row(Row)
        /// A file's state has changed, or its progress.
        case checkpoint(Checkpoint)
        /// A trainer has opened the run again.
        case opened
        /// The log was cut, or begun anew, or its last row has got more values and comes again: its first `rows` are as
        /// they were.
        case restarted(rows: Int)
        /// This reader was slow: so many events, never rows, were left out; the checkpoints as they are now.
        case missed(Int, [Checkpoint])
        /// The run is over, and all its rows were read. The last event.
        case ended(Outcome)
        /// Of a subscription to the daemon as a whole.
        case report(DaemonReport)
    }

    /// How a run has ended.
    public enum Outcome: String, Sendable {
        /// By its trainer.
        case finished
        /// The trainer was gone first.
        case interrupted
    }

    /// What iterating gives.
    public typealias Element = Event
    private struct State {
        var decoder = FrameDecoder()
        var events: ArraySlice<Event> = []
        var nextRow = 0
        var isOver = false
        /// The daemon has closed the connection.
        var hasEnded = false
        /// Tasks that wait.
        var waiters: [ObjectIdentifier: WakeUp] = [:]
    }

    private let socket: OwnedFD
    private let wake: WakeEvent
    private let state: Mutex<State>
    /// In `Readiness`; nil while no task has waited.
    private let token = Mutex<UInt64?>(nil)
    /// Of the moment of subscribing.
    package let run: RunStatus?
    /// The run's last checkpoints, oldest first, of that moment.
    public let checkpoints: [Checkpoint]

    /// Follows a run that the daemon has, or had lately, until it ends.
    /// - Parameters:
    ///   - runID: as it was opened with.
    ///   - start: the first row wanted; 0 gives the whole log before what comes, nil only what comes.
    ///   - directory: the run's, if several have one id.
    ///   - socket: the daemon's.
    /// - Throws: ``NoetherWriterError``; no daemon is started.
    public convenience init(
        run runID: String, from start: Int? = 0, directory: String? = nil,
        socket: String = DaemonConnection.defaultSocket()
    ) async throws(NoetherWriterError) {
        self.init(
            try await offTasks { () throws(NoetherWriterError) in
                try Opened(Subscribe(runID: runID, runDirectory: directory, from: start), socket: socket)
            })
    }

    /// Follows the daemon as a whole: a report each interval.
    /// - Parameters:
    ///   - interval: 0.1 to 60 s.
    ///   - socket: the daemon's.
    /// - Throws: ``NoetherWriterError``; no daemon is started.
    public convenience init(
        reportsEach interval: Duration, socket: String = DaemonConnection.defaultSocket()
    ) async throws(NoetherWriterError) {
        self.init(
            try await offTasks { () throws(NoetherWriterError) in
                try Opened(Subscribe(runID: nil, intervalSeconds: interval.seconds), socket: socket)
            })
    }

    /// As the initializer, and blocks this thread.
    /// - Throws: ``NoetherWriterError``; no daemon is started.
    @available(*, noasync, message: "it blocks a thread of the tasks: await Subscription(run:)")
    public static func openBlocking(
        run runID: String, from start: Int? = 0, directory: String? = nil,
        socket: String = DaemonConnection.defaultSocket()
    ) throws(NoetherWriterError) -> Subscription {
        Subscription(
            try Opened(Subscribe(runID: runID, runDirectory: directory, from: start), socket: socket))
    }

    /// As the initializer, and blocks this thread.
    /// - Throws: ``NoetherWriterError``; no daemon is started.
    @available(*, noasync, message: "it blocks a thread of the tasks: await Subscription(reportsEach:)")
    public static func openBlocking(
        reportsEach interval: Duration, socket: String = DaemonConnection.defaultSocket()
    ) throws(NoetherWriterError) -> Subscription {
        Subscription(try Opened(Subscribe(runID: nil, intervalSeconds: interval.seconds), socket: socket))
    }

    /// What the daemon has answered.
    private struct Opened: Sendable {
        let socket: OwnedFD
        let wake: WakeEvent
        let answer: Subscribed
        let decoder: FrameDecoder

        init(_ message: Subscribe, socket path: String) throws(NoetherWriterError) {
            let socket = try DaemonLauncher.connect(path)
            let deadline = DispatchTime.after(DaemonConnection.answerTime)
            (wake, answer, decoder) = try NoetherWriterError.typed {
                try UnixSocket.setNonBlocking(socket)
                let wake = try WakeEvent()
                var decoder = FrameDecoder()
                func ask<T: Decodable>(_ type: FrameType, _ message: some Encodable, _: T.Type) throws -> T {
                    let bytes = Frame(type, request: 1, payload: try JSONPayload.encode(message)).encoded()
                    // A few hundred bytes into an empty socket.
                    _ = try bytes.withUnsafeBytes { try UnixSocket.send(on: socket, $0) }
                    while true {
                        if let frame = try decoder.next() {
                            guard frame.header.type != FrameType.error.rawValue else {
                                throw DaemonConnection.refusal(frame.payload)
                            }
                            return try JSONPayload.decode(T.self, from: frame.payload)
                        }
                        guard deadline > .now() else {
                            throw DaemonConnection.noAnswer(within: DaemonConnection.answerTime)
                        }
                        try wake.wait(
                            for: socket, orWriting: false,
                            milliseconds: Subscription.milliseconds(until: deadline))
                        guard try Subscription.receive(socket, into: &decoder) else {
                            throw NoetherWriterError.closed
                        }
                    }
                }
                let welcome = try ask(
                    .hello, Hello(client: "noether-writer-swift/\(Release.version)"), Welcome.self)
                try DaemonConnection.check(welcome)
                guard welcome.capabilities.contains("subscribe") else {
                    throw NoetherWriterError.refused(
                        code: WireError.Code.unknownType.rawValue,
                        message: "\(welcome.daemon) is too old to be followed")
                }
                return (wake, try ask(.subscribe, message, Subscribed.self), decoder)
            }
            self.socket = socket
        }
    }

    private init(_ opened: Opened) {
        socket = opened.socket
        wake = opened.wake
        run = opened.answer.run
        checkpoints = (opened.answer.checkpoints ?? []).map(Checkpoint.init)
        var first = State()
        first.decoder = opened.decoder
        first.nextRow = opened.answer.from ?? 0
        state = Mutex(first)
    }

    deinit {
        if let token = token.withLock({ $0 }) { Readiness.remove(socket, token) }
    }

    /// Ends the sequence, for all who wait in it too.
    public func close() {
        let waiters = state.withLock { state in
            state.isOver = true
            return Array(state.waiters.values)
        }
        wake.signal()
        for waiter in waiters { waiter.signal() }
    }

    // MARK: Reading

    /// What has come so far, without waiting.
    private func nextIfThere() throws(NoetherWriterError) -> (event: Event?, isOver: Bool) {
        let result: Result<(event: Event?, isOver: Bool), NoetherWriterError> = state.withLock { state in
            do throws(NoetherWriterError) {
                return .success(try NoetherWriterError.typed { try nextIfThere(in: &state) })
            } catch { return .failure(error) }
        }
        return try result.get()
    }

    private func nextIfThere(in state: inout State) throws -> (event: Event?, isOver: Bool) {
        while state.events.isEmpty, !state.isOver {
            if let frame = try state.decoder.next() {
                try Self.handle(frame, &state)
            } else {
                let before = state.decoder.pendingByteCount
                if !state.hasEnded { state.hasEnded = try !Self.receive(socket, into: &state.decoder) }
                guard state.decoder.pendingByteCount == before else { continue }
                if state.hasEnded { throw NoetherWriterError.closed }
                return (nil, false)
            }
        }
        guard !state.isOver else {
            // Whoever else is blocked in `wake` hears of it too.
            wake.signal()
            return (nil, true)
        }
        let event = state.events.removeFirst()
        if case .ended = event { state.isOver = true }
        return (event, false)
    }

    /// Reads what is there.
    /// - Returns: false at the end of the stream.
    private static func receive(_ socket: OwnedFD, into decoder: inout FrameDecoder) throws -> Bool {
        try withUnsafeTemporaryAllocation(byteCount: 64 << 10, alignment: 16) { buffer in
            switch try UnixSocket.receive(from: socket, into: buffer) {
            case .wouldBlock: return true
            case .end: return false
            case .bytes(let count, _, _):
                decoder.feed(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
                return true
            }
        }
    }

    private static func milliseconds(until deadline: DispatchTime) -> Int32 {
        guard deadline != .distantFuture else { return -1 }
        let now = DispatchTime.now()
        guard deadline > now else { return 0 }
        return Int32(Swift.min(1 << 30, (deadline.uptimeNanoseconds - now.uptimeNanoseconds) / 1_000_000 + 1))
    }

    /// The next event; nil after `ended`. Holds no thread. A task that is cancelled ends its own wait, and nobody
    /// else's.
    /// - Throws: ``NoetherWriterError``: the daemon is gone. `CancellationError`.
    public func next() async throws -> Event? {
        while true {
            try Task.checkCancellation()
            let wakeUp = WakeUp()
            let number = ObjectIdentifier(wakeUp)
            // Before it looks, so that nothing that comes in between is missed.
            state.withLock { $0.waiters[number] = wakeUp }
            defer { state.withLock { _ = $0.waiters.removeValue(forKey: number) } }
            let (event, isOver) = try nextIfThere()
            if event != nil || isOver { return event }
            try watch()
            await withTaskCancellationHandler {
                await wakeUp.wait()
            } onCancel: {
                wakeUp.signal()
            }
        }
    }

    /// The socket is watched until there is something to read.
    private func watch() throws(NoetherWriterError) {
        let result: Result<Void, NoetherWriterError> = token.withLock { token in
            do throws(NoetherWriterError) {
                if let token { return .success(try Readiness.arm(socket, token)) }
                token = try Readiness.add(socket) { [weak self] in
                    guard let self else { return }
                    for waiter in self.state.withLock({ Array($0.waiters.values) }) { waiter.signal() }
                }
                return .success(())
            } catch { return .failure(error) }
        }
        try result.get()
    }

    /// The next event; nil after `ended`. Blocks this thread.
    /// - Throws: ``NoetherWriterError``: the daemon is gone.
    @available(*, noasync, message: "it blocks a thread of the tasks: await next()")
    public func nextBlocking() throws(NoetherWriterError) -> Event? {
        try nextBlocking(until: .distantFuture).event
    }

    /// As `nextBlocking()`, or until the time is over: then neither an event, nor the end.
    @available(*, noasync, message: "it blocks a thread of the tasks: await next()")
    public func nextBlocking(
        until deadline: DispatchTime
    ) throws(NoetherWriterError) -> (event: Event?, isOver: Bool) {
        while true {
            let found = try nextIfThere()
            if found.event != nil || found.isOver { return found }
            guard deadline > .now() else { return (nil, false) }
            try NoetherWriterError.typed {
                try wake.wait(
                    for: socket, orWriting: false, milliseconds: Self.milliseconds(until: deadline))
            }
        }
    }

    /// As ``nextBlocking(until:)``.
    @available(*, deprecated, renamed: "nextBlocking(until:)")
    @available(*, noasync, message: "it blocks a thread of the tasks: await next()")
    public func next(until deadline: DispatchTime) throws(NoetherWriterError) -> (event: Event?, isOver: Bool) {
        try nextBlocking(until: deadline)
    }

    private static func handle(_ frame: Frame, _ state: inout State) throws {
        switch FrameType(rawValue: frame.header.type) {
        case .rows:
            let page = try EntriesPage(decoding: frame.payload)
            for row in page.rows {
                let values = zip(row.keyIDs, row.values).map { (page.keys[$0] ?? "", Scalar($1)) }
                let event = Row(
                    index: state.nextRow, total: page.total, update: row.update, wallTime: row.wallTime,
                    values: values)
                state.events.append(.row(event))
                state.nextRow += 1
            }
        case .streamEvent:
            // What a newer daemon says of a kind that is not known here does not decode.
            guard let event = try? JSONPayload.decode(StreamEvent.self, from: frame.payload) else { return }
            if event.event == .restarted { state.nextRow = event.rows ?? 0 }
            if let event = Event(event) { state.events.append(event) }
        case .error: throw DaemonConnection.refusal(frame.payload)
        default: return
        }
    }

    // MARK: AsyncSequence

    /// Reads the subscription's events. A task that is cancelled ends its own iteration, and nobody else's.
    public struct Iterator: AsyncIteratorProtocol, Sendable {
        let subscription: Subscription

        /// The next event; nil after ``Event/ended(_:)``.
        /// - Throws: ``NoetherWriterError``, or `CancellationError`.
        public func next() async throws -> Event? { try await subscription.next() }
    }

    /// All iterators of a subscription share its events: each event goes to one of them.
    public func makeAsyncIterator() -> Iterator { Iterator(subscription: self) }
}

extension Subscription.Event {
    fileprivate init?(_ event: StreamEvent) {
        switch event.event {
        case .opened: self = .opened
        case .restarted: self = .restarted(rows: event.rows ?? 0)
        case .missed: self = .missed(event.missed ?? 0, (event.checkpoints ?? []).map(Checkpoint.init))
        case .checkpoint:
            guard let info = event.checkpoint else { return nil }
            self = .checkpoint(Checkpoint(info))
        case .ended:
            guard let run = event.run else { return nil }
            self = .ended(run.state == .finished ? .finished : .interrupted)
        case .status:
            guard let report = event.report else { return nil }
            self = .report(DaemonReport(report))
        }
    }
}

/// One thread that watches the sockets of all subscriptions.
private enum Readiness {
    private static let told = Mutex<[UInt64: @Sendable () -> Void]>([:])
    private static let next = Mutex<UInt64>(0)
    private static let poller = Result { () throws(PosixError) in
        let poller = try Poller()
        poller.start { event in told.withLock { $0[event.token] }?() }
        return poller
    }

    /// - Parameter readable: called once, then once after each `arm`.
    static func add(
        _ socket: OwnedFD, _ readable: @escaping @Sendable () -> Void
    ) throws(NoetherWriterError) -> UInt64 {
        let token = next.withLock { next in
            next += 1
            return next
        }
        told.withLock { $0[token] = readable }
        try NoetherWriterError.typed { try poller.get().add(socket, token: token) }
        return token
    }

    static func arm(_ socket: OwnedFD, _ token: UInt64) throws(NoetherWriterError) {
        try NoetherWriterError.typed { try poller.get().arm(socket, token: token, writing: false) }
    }

    static func remove(_ socket: OwnedFD, _ token: UInt64) {
        if let poller = try? poller.get() { poller.remove(socket) }
        told.withLock { _ = $0.removeValue(forKey: token) }
    }
}
