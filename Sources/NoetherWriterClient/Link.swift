// SPDX-License-Identifier: Apache-2.0
/// A session with the daemon that outlives its connections: what is not acknowledged is kept, and sent again after a
/// reconnect; the daemon drops what it has taken already, by sequence number.
///
/// Concurrency model: everything is under the lock of `state`, and frames are handed to the connection inside it, so
/// that they leave in the order of their numbers. Events come on a connection's thread; reconnecting has a queue of its
/// own.
import Dispatch
internal import Posix
internal import Synchronization
internal import Wire

final class Link: Sendable {
    /// A save that the daemon has not released.
    struct Save: Sendable {
        var ticket: Ticket
        var buffer: BufferPool.Buffer
        var frame: Frame
        /// A daemon that was leaving did not take it: its successor will. Or it had no room, and is asked again.
        var isRefused = false
        /// Since when it has no room, in monotonic seconds.
        var refusedSince: Double?
    }

    private struct State {
        var connection: DaemonConnection?
        var awaySince = Clock.monotonicSeconds
        var isClosed = false
        var sequence: UInt64 = 0
        var lastUpdate: Int64?
        var keys: [String] = []
        var keyIDs: [ByteName: UInt32] = [:]
        var logs: [(sequence: UInt64, frame: Frame)] = []
        var logByteCount = 0
        var saves: [UInt64: Save] = [:]
        var failed: [ClientError] = []
        var durableUpdate: Int64?
        /// The daemon takes no more of this log.
        var logIsFull = false
        var hasSaidGap = false
    }

    static func warn(_ words: String) { Process.writeToStandardError("noether-writer: \(words)") }

    /// For how long a call without a timeout waits for a daemon that is away.
    static let awayTime = Duration.seconds(60)
    /// Between two tries of a save that the daemon has no room for.
    private static let busySeconds = 1.0
    private static let pauses = [0.02, 0.05, 0.1, 0.2, 0.5, 1]
    private static let firstConnectSeconds = 20.0
    /// Keys in one frame: far below its limit.
    private static let keysPerFrame = 256

    private let socket: String
    private let message: OpenRun
    private let variables: Variables
    let pool: BufferPool
    private let state = Mutex(State())
    private let queue = DispatchQueue(label: "noether-writer.reconnect")
    let opened: RunOpened

    init(socket: String, _ message: OpenRun, _ variables: Variables) throws {
        self.socket = socket
        self.message = message
        self.variables = variables
        pool = try BufferPool.shared.get()
        let deadline = Clock.monotonicSeconds + Self.firstConnectSeconds
        // The events of the first connection come before `self` is whole.
        let relay = Relay()
        var attempt = 0
        while true {
            do {
                let connection = try DaemonConnection(socket: socket, startsDaemon: true, variables) {
                    relay.take($0, $1)
                }
                do {
                    opened = try connection.ask(.openRun, message, RunOpened.self)
                } catch {
                    connection.close()
                    throw error
                }
                state.withLock { $0.connection = connection }
                break
            } catch let error as ClientError {
                // A daemon that is leaving: the next one is a moment away.
                guard error.isPassing, Clock.monotonicSeconds < deadline else { throw error }
                Clock.sleep(Self.pauses[min(attempt, Self.pauses.count - 1)])
                attempt += 1
            }
        }
        relay.connect(self)
    }

    /// Events on their way to a link that may be gone, or not yet whole.
    private final class Relay: Sendable {
        private struct State {
            weak var link: Link?
            var isConnected = false
            var early: [(DaemonConnection, Result<Frame, ClientError>)] = []
        }
        private let state = Mutex(State())

        func connect(_ link: Link) {
            let early = state.withLock { state in
                state.link = link
                state.isConnected = true
                defer { state.early = [] }
                return state.early
            }
            for (connection, event) in early { link.take(event, from: connection) }
        }

        func take(_ connection: DaemonConnection, _ event: Result<Frame, ClientError>) {
            let link = state.withLock { state -> Link? in
                if !state.isConnected { state.early.append((connection, event)) }
                return state.link
            }
            link?.take(event, from: connection)
        }
    }

    // MARK: What the trainer calls

    var durableUpdate: Int64? { state.withLock { $0.durableUpdate } }
    var lastUpdate: Int64? { state.withLock { $0.lastUpdate } }
    var tickets: [Ticket] {
        state.withLock { $0.saves.sorted { $0.key < $1.key }.map(\.value.ticket) }
    }

    /// For how long there has been no connection, in seconds; 0 with one.
    var awaySeconds: Double {
        state.withLock { $0.connection == nil ? Clock.monotonicSeconds - $0.awaySince : 0 }
    }

    private var raisesWhenAway: Bool { variables.whenAway == .raise }

    /// Takes a log on that the daemon has, up to this update.
    func resume(at update: Int64?) { state.withLock { $0.lastUpdate = update } }

    /// Returns when half of what may wait for the daemon is free: for rows that are there all at once.
    /// - Throws: `ClientError.timeout` if the daemon takes nothing for a minute.
    func waitForRoom() throws(ClientError) {
        var deadline = DispatchTime.after(Self.awayTime)
        var last = Int.max
        while true {
            let waiting = state.withLock { $0.logByteCount }
            if waiting <= variables.queueByteCount / 2 { return }
            if waiting < last { deadline = .after(Self.awayTime) }
            last = waiting
            guard .now() < deadline else {
                throw .timeout(waitingFor: "the log that is resumed", stalled: nil)
            }
            Clock.sleep(0.005)
        }
    }

    /// Each failure is thrown once.
    func throwFailure() throws(ClientError) {
        if let error = state.withLock({ $0.failed.isEmpty ? nil : $0.failed.removeFirst() }) { throw error }
    }

    func forget(_ error: ClientError) { state.withLock { state in state.failed.removeAll { $0 == error } } }

    func log(_ entry: [(key: String, value: Scalar)], update: Int64) throws(ClientError) {
        let result: Result<Void, ClientError> = state.withLock { state in
            do throws(ClientError) { return .success(try log(entry, update: update, &state)) } catch {
                return .failure(error)
            }
        }
        try result.get()
    }

    private func log(
        _ entry: [(key: String, value: Scalar)], update: Int64, _ state: inout State
    ) throws(ClientError) {
        guard !state.isClosed else { throw .runClosed }
        if let last = state.lastUpdate, update <= last { throw .updateOrder(update: update, last: last) }
        var keyIDs: [UInt32] = []
        var new: [String] = []
        var seen: Set<ByteName> = []
        for (key, _) in entry {
            guard seen.insert(ByteName(key)).inserted else { throw .duplicateKey(key, update: update) }
            if let id = state.keyIDs[ByteName(key)] {
                keyIDs.append(id)
            } else {
                keyIDs.append(UInt32(state.keyIDs.count + new.count))
                new.append(key)
            }
        }
        // The daemon would refuse them, and count its keys differently from then on.
        for key in new where !(1...Limits.keyBytes).contains(key.utf8.count) || key.utf8.contains(0) {
            throw .unsupportedValue(
                "the key \(String(key.prefix(40)).debugDescription) has \(key.utf8.count) bytes; a key has 1 to "
                    + "\(Limits.keyBytes), and no NUL")
        }
        guard entry.count <= Limits.valuesPerLog, state.keys.count + new.count <= Limits.keysPerRun else {
            throw .unsupportedValue(
                "update \(update) has \(entry.count) values and would give this run \(state.keys.count + new.count) keys; at "
                    + "most \(Limits.valuesPerLog) and \(Limits.keysPerRun)")
        }
        var writer = ByteWriter()
        LogPayload(
            sequence: state.sequence + 1, update: update, wallTime: Clock.wallSeconds, keyIDs: keyIDs,
            values: entry.map(\.value.bits)
        ).encode(into: &writer)
        let frame = Frame(.log, payload: writer.bytes)
        guard frame.payload.count <= Limits.payloadBytes else {
            throw .unsupportedValue(
                "update \(update) has \(frame.payload.count) bytes; at most \(Limits.payloadBytes): write long texts to a file"
            )
        }
        guard !state.logIsFull else { return }
        guard state.logByteCount + frame.payload.count <= variables.queueByteCount else {
            let words =
                "the daemon has not taken \(state.logs.count) updates (\(state.logByteCount) bytes, limit "
                + "\(Variable.queueBytes.rawValue)=\(variables.queueByteCount)); no more are kept until it is back"
            if raisesWhenAway { throw .refused(code: "too-many", message: words) }
            if !state.hasSaidGap { Self.warn("\(words). Training continues, and the log has a gap") }
            state.hasSaidGap = true
            return
        }
        for key in new {
            state.keyIDs[ByteName(key)] = UInt32(state.keys.count)
            state.keys.append(key)
        }
        state.sequence += 1
        state.lastUpdate = update
        state.logs.append((state.sequence, frame))
        state.logByteCount += frame.payload.count
        for first in stride(from: state.keys.count - new.count, to: state.keys.count, by: Self.keysPerFrame) {
            send(Self.define(state.keys, from: first), to: &state)
        }
        send(frame, to: &state)
    }

    /// - Parameter payload: with its number and the last update.
    func save(
        _ ticket: Ticket, _ buffer: BufferPool.Buffer, payload: (UInt64, Int64?) throws -> [UInt8]
    ) throws {
        let result: Result<Void, any Error> = state.withLock { state in
            do {
                guard !state.isClosed else { throw ClientError.runClosed }
                let frame = Frame(
                    .save, payload: try payload(state.sequence + 1, state.lastUpdate), fdCount: 1)
                guard frame.payload.count <= Limits.payloadBytes else {
                    throw ClientError.unsupportedValue("a save with too many storages for one frame")
                }
                state.sequence += 1
                state.saves[state.sequence] = Save(ticket: ticket, buffer: buffer, frame: frame)
                send(frame, fd: buffer.memory.fd, to: &state)
                return .success(())
            } catch { return .failure(error) }
        }
        try result.get()
    }

    func nextSequence() -> UInt64 {
        state.withLock { state in
            state.sequence += 1
            return state.sequence
        }
    }

    /// Asks, and asks again after a reconnect if the first answer was lost: for questions that may be asked twice.
    func request(_ type: FrameType, _ payload: [UInt8], timeout: Duration?) throws(ClientError) -> Frame {
        let deadline = Clock.monotonicSeconds + (timeout?.seconds ?? 0)
        while true {
            guard let connection = state.withLock({ $0.connection }) else {
                if state.withLock({ $0.isClosed }) { throw .runClosed }
                let isOver =
                    timeout == nil ? awaySeconds > Self.awayTime.seconds : Clock.monotonicSeconds > deadline
                guard !isOver else {
                    throw .timeout(
                        waitingFor: "a daemon, which has been away for \(Int(awaySeconds)) s,", stalled: nil)
                }
                Clock.sleep(0.02)
                continue
            }
            let left = timeout.map { _ in Duration.seconds(max(0, deadline - Clock.monotonicSeconds)) }
            do { return try connection.request(type, payload, timeout: left) } catch {
                guard error == .closed else { throw error }
                // Its reader says so too, in a moment.
                Clock.sleep(0.005)
            }
        }
    }

    func close() {
        let connection = state.withLock { state in
            state.isClosed = true
            defer { state.connection = nil }
            return state.connection
        }
        connection?.close()
    }

    // MARK: Connections

    private static func define(_ keys: [String], from first: Int) -> Frame {
        var writer = ByteWriter()
        let last = min(first + keysPerFrame, keys.count)
        KeyDefinitions(firstID: UInt32(first), keys: Array(keys[first..<last])).encode(into: &writer)
        return Frame(.defineKeys, payload: writer.bytes)
    }

    /// Where there is a connection. A lost one is found out by its reader.
    private func send(_ frame: Frame, fd: OwnedFD? = nil, to state: inout State) {
        try? state.connection?.send(frame, fd: fd)
    }

    private func take(_ event: Result<Frame, ClientError>, from connection: DaemonConnection) {
        switch event {
        case .failure: lost(connection)
        case .success(let frame):
            switch FrameType(rawValue: frame.header.type) {
            case .checkpointEvent:
                if let event = try? JSONPayload.decode(CheckpointEvent.self, from: frame.payload) {
                    take(event)
                }
            case .logAck:
                if let ack = try? LogAck(decoding: frame.payload) {
                    state.withLock { state in
                        acknowledge(ack.sequence, &state)
                        state.durableUpdate = ack.durableUpdate ?? state.durableUpdate
                    }
                }
            case .error:
                let error = DaemonConnection.refusal(frame.payload)
                state.withLock { state in
                    if case .refused(WireError.Code.logFull.rawValue, let message) = error {
                        fill(&state, message)
                    }
                    if !state.logIsFull || raisesWhenAway { state.failed.append(error) }
                }
            default: break
            }
        }
    }

    /// The log has reached the daemon's limit. What was refused will not be taken later.
    private func fill(_ state: inout State, _ message: String) {
        if !state.logIsFull, !raisesWhenAway {
            Self.warn("\(message). Training continues, and nothing more is logged")
        }
        state.logIsFull = true
        state.logs.removeAll()
        state.logByteCount = 0
    }

    private func acknowledge(_ sequence: UInt64, _ state: inout State) {
        let taken = state.logs.firstIndex { $0.sequence > sequence } ?? state.logs.endIndex
        state.logByteCount -= state.logs[..<taken].reduce(0) { $0 + $1.frame.payload.count }
        state.logs.removeFirst(taken)
    }

    private func take(_ event: CheckpointEvent) {
        let found: Save? = state.withLock { state in
            guard var save = state.saves[event.sequence] else { return nil }
            if event.event == .failed, let code = event.error?.code,
                code == WireError.Code.draining.rawValue
                    || code == WireError.Code.busy.rawValue && sendLater(event.sequence, &save)
            {
                save.isRefused = true
                state.saves[event.sequence] = save
                return nil
            }
            if event.event == .released {
                if save.isRefused {
                    save.isRefused = false
                    state.saves[event.sequence] = save
                    return nil
                }
                state.saves[event.sequence] = nil
            }
            if event.event == .failed { state.failed.append(Ticket.error(of: event)) }
            return save
        }
        guard let found else { return }
        // The buffer first: whoever waited may save again at once.
        if event.event == .released {
            // Without a number, something may still read it.
            pool.release(found.buffer.number, reuses: event.buffer != nil)
        }
        found.ticket.take(event)
    }

    /// Whether a save may wait longer for storage that is slow; then it is sent again by itself.
    private func sendLater(_ sequence: UInt64, _ save: inout Save) -> Bool {
        let now = Clock.monotonicSeconds
        let waited = now - (save.refusedSince ?? now)
        guard waited <= pool.timeoutSeconds else { return false }
        save.refusedSince = now - waited
        queue.asyncAfter(deadline: .now() + min(Self.busySeconds, max(Self.busySeconds / 10, waited))) {
            [weak self] in
            self?.state.withLock { state in
                guard let save = state.saves[sequence] else { return }
                self?.send(save.frame, fd: save.buffer.memory.fd, to: &state)
            }
        }
        return true
    }

    private func lost(_ connection: DaemonConnection) {
        let isNews = state.withLock { state in
            guard !state.isClosed, state.connection === connection else { return false }
            state.connection = nil
            state.awaySince = Clock.monotonicSeconds
            return true
        }
        if isNews { queue.async { [weak self] in self?.reconnect(attempt: 0) } }
    }

    private func reconnect(attempt: Int) {
        guard !state.withLock({ $0.isClosed }) else { return }
        do { try connectAgain() } catch {
            let pause = Self.pauses[min(attempt, Self.pauses.count - 1)]
            queue.asyncAfter(deadline: .now() + pause) { [weak self] in self?.reconnect(attempt: attempt + 1)
            }
        }
    }

    private func connectAgain() throws {
        let relay = Relay()
        let connection = try DaemonConnection(socket: socket, startsDaemon: true, variables) {
            relay.take($0, $1)
        }
        do {
            var message = message
            // What was said at the first opening is not said again.
            message.configYaml = nil
            message.resumeAt = nil
            let opened = try connection.ask(.openRun, message, RunOpened.self)
            state.withLock { state in
                acknowledge(opened.lastSequence, &state)
                state.connection = connection
                for first in stride(from: 0, to: state.keys.count, by: Self.keysPerFrame) {
                    send(Self.define(state.keys, from: first), to: &state)
                }
                let logs = state.logs.map { ($0.sequence, $0.frame, OwnedFD?.none) }
                let saves = state.saves.map {
                    ($0.key, $0.value.frame, OwnedFD?.some($0.value.buffer.memory.fd))
                }
                for (_, frame, fd) in (logs + saves).sorted(by: { $0.0 < $1.0 }) {
                    send(frame, fd: fd, to: &state)
                }
            }
        } catch {
            connection.close()
            throw error
        }
        relay.connect(self)
    }
}

extension ClientError {
    /// A daemon that is on its way out, or has just gone.
    var isPassing: Bool {
        switch self {
        case .closed: true
        case .refused(let code, _): code == "draining"
        default: false
        }
    }
}
