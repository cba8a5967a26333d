// SPDX-License-Identifier: Apache-2.0
/// Concurrency model: `state` is under its lock; one reader at a time, on `queue` if it is a task.
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
        case report(Report)
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
    }

    private let socket: OwnedFD
    private let wake: WakeEvent
    private let state = Mutex(State())
    private let queue = DispatchQueue(label: "noether-writer.subscription")
    /// Of the moment of subscribing.
    package let run: RunStatus?
    /// The run's last checkpoints, oldest first, of that moment.
    public let checkpoints: [Checkpoint]

    /// Follows a run that the daemon has, or has had recently, until it ends.
    /// - Parameters:
    ///   - runID: as it was opened with.
    ///   - start: the first row wanted; 0 gives the whole log before what comes, nil only what comes.
    ///   - directory: the run's directory, if several runs have the same id.
    ///   - socket: the daemon's.
    /// - Throws: ``ClientError``; no daemon is started.
    public convenience init(
        run runID: String, from start: Int? = 0, directory: String? = nil,
        socket: String = DaemonConnection.defaultSocket()
    ) throws {
        try self.init(Subscribe(runID: runID, runDirectory: directory, from: start), socket: socket)
    }

    /// Follows the daemon as a whole: a report each interval.
    /// - Parameters:
    ///   - interval: 0.1 to 60 s.
    ///   - socket: the daemon's.
    /// - Throws: ``ClientError``; no daemon is started.
    public convenience init(
        reportsEach interval: Duration, socket: String = DaemonConnection.defaultSocket()
    ) throws { try self.init(Subscribe(runID: nil, intervalSeconds: interval.seconds), socket: socket) }

    private init(_ message: Subscribe, socket path: String) throws {
        socket = try DaemonLauncher.connect(path)
        try UnixSocket.setNonBlocking(socket)
        wake = try WakeEvent()
        var decoder = FrameDecoder()
        let reader = Reader(socket: socket, wake: wake)
        func ask<T: Decodable>(_ type: FrameType, _ message: some Encodable, _: T.Type) throws -> T {
            let bytes = Frame(type, request: 1, payload: try JSONPayload.encode(message)).encoded()
            // A few hundred bytes into an empty socket.
            _ = try bytes.withUnsafeBytes { try UnixSocket.send(on: reader.socket, $0) }
            while true {
                if let frame = try decoder.next() {
                    guard frame.header.type != FrameType.error.rawValue else {
                        throw DaemonConnection.refusal(frame.payload)
                    }
                    return try JSONPayload.decode(T.self, from: frame.payload)
                }
                guard try reader.read(into: &decoder, until: .distantFuture) else { throw ClientError.closed }
            }
        }
        let welcome = try ask(.hello, Hello(client: "noether-writer-swift/\(Release.version)"), Welcome.self)
        try DaemonConnection.check(welcome)
        guard welcome.capabilities.contains("subscribe") else {
            throw ClientError.refused(
                code: WireError.Code.unknownType.rawValue,
                message: "\(welcome.daemon) is too old to be followed")
        }
        let answer = try ask(.subscribe, message, Subscribed.self)
        run = answer.run
        checkpoints = (answer.checkpoints ?? []).map(Checkpoint.init)
        let found = decoder
        state.withLock { state in
            state.decoder = found
            state.nextRow = answer.from ?? 0
        }
    }

    /// Ends the sequence, also for whoever waits in it.
    public func close() {
        state.withLock { $0.isOver = true }
        wake.signal()
    }

    /// The next event; nil after `ended`. Blocks.
    /// - Throws: ``ClientError``: the daemon is gone.
    public func next() throws -> Event? { try next(until: .distantFuture).event }

    /// As `next()`, or until the time is over: then neither an event, nor the end.
    public func next(until deadline: DispatchTime) throws -> (event: Event?, isOver: Bool) {
        let reader = Reader(socket: socket, wake: wake)
        while true {
            let (found, isOver) = try state.withLock { state in
                while state.events.isEmpty, !state.isOver, let frame = try state.decoder.next() {
                    try Self.take(frame, &state)
                }
                guard !state.isOver, !state.events.isEmpty else { return (Event?.none, state.isOver) }
                let event = state.events.removeFirst()
                if case .ended = event { state.isOver = true }
                return (event, false)
            }
            if isOver { return (nil, true) }
            if let found { return (found, false) }
            guard deadline > .now() else { return (nil, false) }
            // Not under the lock: `close` must get it.
            var bytes: [UInt8] = []
            guard try reader.read(into: &bytes, until: deadline) else { throw ClientError.closed }
            state.withLock { $0.decoder.feed(bytes) }
        }
    }

    private static func take(_ frame: Frame, _ state: inout State) throws {
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

    /// Reads on a queue of its own, and ends the subscription if its task is cancelled.
    public struct Iterator: AsyncIteratorProtocol, Sendable {
        let subscription: Subscription

        /// The next event; nil after ``Event/ended(_:)``.
        /// - Throws: ``ClientError``.
        public func next() async throws -> Event? {
            try await withTaskCancellationHandler {
                try await withCheckedThrowingContinuation { continuation in
                    subscription.queue.async {
                        continuation.resume(with: Result { try subscription.next() })
                    }
                }
            } onCancel: {
                subscription.close()
            }
        }
    }

    /// All iterators of a subscription share its events.
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
            self = .report(Subscription.Report(report))
        }
    }
}

/// Waits for bytes of the socket.
private struct Reader {
    let socket: OwnedFD
    let wake: WakeEvent

    /// - Returns: false at the end of the stream. There are no new bytes if the time is over or `wake` was called.
    func read(into bytes: inout [UInt8], until deadline: DispatchTime) throws -> Bool {
        try wake.wait(for: socket, orWriting: false, milliseconds: milliseconds(until: deadline))
        var count = 0
        var isEnd = false
        bytes = [UInt8](repeating: 0, count: 64 << 10)
        try bytes.withUnsafeMutableBytes { buffer in
            switch try UnixSocket.receive(from: socket, into: buffer) {
            case .wouldBlock: break
            case .end: isEnd = true
            case .bytes(let received, _, _): count = received
            }
        }
        bytes.removeLast(bytes.count - count)
        return !isEnd
    }

    func read(into decoder: inout FrameDecoder, until deadline: DispatchTime) throws -> Bool {
        var bytes: [UInt8] = []
        defer { decoder.feed(bytes) }
        return try read(into: &bytes, until: deadline)
    }

    private func milliseconds(until deadline: DispatchTime) -> Int32 {
        guard deadline != .distantFuture else { return -1 }
        let now = DispatchTime.now()
        guard deadline > now else { return 0 }
        return Int32(min(1 << 30, (deadline.uptimeNanoseconds - now.uptimeNanoseconds) / 1_000_000 + 1))
    }
}
