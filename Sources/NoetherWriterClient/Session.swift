// SPDX-License-Identifier: Apache-2.0
/// A session with the daemon that outlives its connections: what is not acknowledged is kept, and sent again after a
/// reconnect; the daemon drops what it has taken already, by sequence number.
///
/// Concurrency model: everything is under the lock of `state`, and frames are handed to the connection inside it, so
/// that they leave in the order of their numbers. Events come on a connection's thread, and reconnecting has its own.
import Dispatch
internal import Posix
internal import Synchronization
internal import Wire

final class Session: Sendable {
    typealias Answer = DaemonConnection.Answer

    /// A save that the daemon has not released.
    struct Save: Sendable {
        var ticket: Ticket
        /// nil: it is a removal, which goes to the daemon after what comes before it and before what comes after it.
        var buffer: BufferPool.Buffer?
        var frame: Frame
        /// Over the present connection.
        var isSent = false
        /// The daemon has accepted it, over the present connection.
        var isTaken = false
        /// A daemon that was leaving did not take it: its successor will. Or it had no room, and is asked again.
        var isRefused = false
        /// Since when it has no room, in monotonic seconds.
        var refusedSince: Double?
    }

    /// Asked of this daemon, and of the next one if this one goes without an answer.
    private struct Question: Sendable {
        var type: FrameType
        var payload: [UInt8]
        var answer: Completion<Answer>
    }

    private struct State {
        var connection: DaemonConnection?
        /// Hands what this connection says to the session, in order, also what came before the session was whole.
        var events: EarlyEvents?
        var awaySince = Clock.monotonicSeconds
        var openSince = Clock.monotonicSeconds
        /// Tries to come back since a connection lasted.
        var attempt = 0
        var hasSaidAway = false
        /// Nothing more is taken from the trainer.
        var isClosed = false
        /// Nothing more is sent, and nothing is heard.
        var isEnded = false
        var questions: [UInt64: Question] = [:]
        var nextQuestion: UInt64 = 0
        /// The last `finish` that was asked, and its number.
        var finish: (sequence: UInt64, answer: Completion<Answer>)?
        /// The next one, which is asked when that has been answered: the daemon holds only so many answers.
        var nextFinish: Completion<Answer>?
        /// An older daemon has refused an update, which it never acknowledges, and has not said which.
        var wasRefused = false
        /// Somebody else brings the log now: the next connection does not ask for it again.
        var hasLostLog = false
        var notKept = 0
        var sequence: UInt64 = 0
        var lastUpdate: Int64?
        /// The daemon adds what is logged again for the last update to its row.
        var mergesRows = false
        /// This session has brought the last row.
        var hasOwnRow = false
        /// The keys of the last row, and the size of its values.
        var row: (keys: Set<UInt32>, byteCount: Int) = ([], 0)
        var hasSaidTwice = false
        var hasSaidRank = false
        var keys: [String] = []
        var keyIDs: [ByteName: UInt32] = [:]
        var logs: [(sequence: UInt64, frame: Frame)] = []
        var logByteCount = 0
        var saves: [UInt64: Save] = [:]
        /// How many of them are removals.
        var orders = 0
        /// Errors for updates that the daemon has refused. Each next call throws one of them.
        var refusals: [NoetherWriterError] = []
        /// Errors of failed saves that no call has thrown yet, by the number of the save.
        var failures: [UInt64: (error: NoetherWriterError, paths: [String])] = [:]
        var durableUpdate: Int64?
        /// The number up to which the daemon has acknowledged the log.
        var acknowledged: UInt64 = 0
        /// Acknowledged updates that are gone: said at once, and thrown by the next `finish`.
        var logDamage: NoetherWriterError?
        /// The daemon takes no more of this log.
        var logIsFull = false
        var hasSaidGap = false
        /// Warnings for the program's logger, which is called without the lock: it may look at the run, or log to it.
        var unsaid: [String] = []
    }

    static let keptWords = "what it has not taken is kept in this process and sent when it is back"
    /// How many refusals are kept until a call throws them.
    private static let refusalsKept = 64
    /// Between two tries of a save that the daemon has no room for.
    private static let busySeconds = 1.0
    private static let pauses = [0.02, 0.05, 0.1, 0.2, 0.5, 1]
    private static let firstConnectSeconds = 20.0
    /// After this long without an answer whoever opens a run is told what it waits for.
    private static let quietSeconds = 1.0
    /// How many bytes a key takes in a page of rows beside its name: its number and the length of its name.
    private static let pageKeyByteCount = 6
    /// Keys in one frame: far below its limit.
    private static let keysPerFrame = 256

    private let socket: String
    private let message: OpenRun
    private let variables: Variables
    let speaker: Speaker
    let pool: BufferPool
    private let state = Mutex(State())
    private let queue = DispatchQueue(label: "noether-writer.reconnect")
    let opened: RunOpened

    init(
        socket: String, _ message: OpenRun, _ variables: Variables, _ speaker: Speaker
    ) throws(NoetherWriterError) {
        self.socket = socket
        self.speaker = speaker
        self.message = message
        self.variables = variables
        pool = try BufferPool.shared.get()
        let deadline = Clock.monotonicSeconds + Self.firstConnectSeconds
        // The events of the first connection come before `self` is whole.
        var early = EarlyEvents()
        let quiet = DispatchWorkItem {
            speaker.warn(
                "\(message.layout == nil ? "run \(message.runId)" : "files"): the daemon at \(socket) has not answered for a second: it is stopped, busy, or waits "
                    + "for storage; waiting for it, \(Int(DaemonConnection.answerTime.seconds)) s at most")
        }
        DispatchQueue.waits.asyncAfter(deadline: .now() + Self.quietSeconds, execute: quiet)
        defer { quiet.cancel() }
        var attempt = 0
        while true {
            early = EarlyEvents()
            do throws(NoetherWriterError) {
                let connection = try DaemonConnection(socket: socket, startsDaemon: true, variables) {
                    [early] in early.forward($0, $1)
                }
                do throws(NoetherWriterError) {
                    if try DaemonReplacement.handOver(connection, socket: socket, say: speaker.warn) {
                        throw .closed
                    }
                    opened = try Self.open(connection, message)
                } catch {
                    connection.close()
                    throw error
                }
                let mergesRows = connection.can("log_merge")
                state.withLock { state in
                    state.connection = connection
                    state.events = early
                    state.mergesRows = mergesRows
                }
                if !(message.keepLast == nil && message.keepEvery == nil), !connection.can("run_settings") {
                    speaker.warn(
                        "run \(message.runId) asks for keepLast or keepEvery, and this daemon knows only its own settings: "
                            + "restart it after an update")
                }
                break
            } catch {
                early.forget()
                // A daemon that is leaving: the next one is a moment away.
                guard error.isRetryable, Clock.monotonicSeconds < deadline else { throw error }
                Clock.sleep(Self.pauses[min(attempt, Self.pauses.count - 1)])
                attempt += 1
            }
        }
        early.connect(self)
        Ending.add(self)
    }

    /// Opens the run on a connection. A descriptor of the output root goes with it: the daemon may see another file
    /// system, and writes where this process looks.
    /// - Throws: `NoetherWriterError`: also if the daemon is too old for files of no run.
    static func open(
        _ connection: DaemonConnection, _ message: OpenRun
    ) throws(NoetherWriterError) -> RunOpened {
        if message.layout == OpenRun.filesLayout, !connection.can(OpenRun.filesLayout) {
            throw .refused(
                code: WireError.Code.unsupportedVersion.rawValue,
                message:
                    "\(connection.welcome?.daemon ?? "the daemon") is too old to save a file that belongs to no run. Nothing was "
                    + "sent")
        }
        let root = connection.can("output_root_descriptor") ? FileSystem.openRoot(message.outputRoot) : nil
        return try connection.ask(.openRun, message, RunOpened.self, fd: root)
    }

    /// What is on its way to a session that may be gone, or not yet whole, in the order in which they come.
    private final class EarlyEvents: Sendable {
        private struct State {
            weak var session: Session?
            var isConnected = false
            var early: [@Sendable (Session) -> Void] = []
        }
        private let state = Mutex(State())

        func connect(_ session: Session) {
            while true {
                // What comes meanwhile waits too: an answer that overtook a refusal would say that all is well.
                let early = state.withLock { state in
                    state.session = session
                    if state.early.isEmpty { state.isConnected = true }
                    defer { state.early = [] }
                    return state.early
                }
                if early.isEmpty { return }
                for each in early { each(session) }
            }
        }

        /// The connection was not to be: what it says is nobody's, and nothing keeps it.
        func forget() {
            state.withLock { state in
                state.isConnected = true
                state.early = []
            }
        }

        func forward(_ connection: DaemonConnection, _ event: Result<Frame, NoetherWriterError>) {
            inOrder { $0.handle(event, from: connection) }
        }

        func inOrder(_ body: @escaping @Sendable (Session) -> Void) {
            let session = state.withLock { state -> Session? in
                if !state.isConnected { state.early.append(body) }
                return state.isConnected ? state.session : nil
            }
            if let session { body(session) }
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
    func resume(at update: Int64?) {
        state.withLock { state in
            state.lastUpdate = update
            state.hasOwnRow = false
        }
    }

    /// Returns when half of what may wait for the daemon is free: for rows that are there all at once.
    /// - Throws: `NoetherWriterError.timeout` if the daemon takes nothing for a minute.
    func waitForRoom() throws(NoetherWriterError) {
        var deadline = DispatchTime.now() + Patience.awaySeconds
        var last = Int.max
        while true {
            let waiting = state.withLock { $0.logByteCount }
            if waiting <= variables.queueByteCount / 2 { return }
            if waiting < last { deadline = .now() + Patience.awaySeconds }
            last = waiting
            guard .now() < deadline else {
                throw .timeout(
                    waitingFor: "the daemon has taken nothing of the log that is resumed for a minute; it is kept",
                    stalled: nil)
            }
            Clock.sleep(0.005)
        }
    }

    /// Throws the error for the oldest refused update, if there is one. Each error is thrown once.
    func throwRefusal() throws(NoetherWriterError) {
        if let error = state.withLock({ $0.refusals.isEmpty ? nil : $0.refusals.removeFirst() }) { throw error }
    }

    /// Throws once for each time that acknowledged updates were found missing.
    func throwLogDamage() throws(NoetherWriterError) {
        let damage = state.withLock { state in
            defer { state.logDamage = nil }
            return state.logDamage
        }
        if let damage { throw damage }
    }

    /// Throws the error of the oldest failed save that no call has thrown yet, if there is one. Each is thrown once.
    func throwFailure() throws(NoetherWriterError) {
        let error = state.withLock { state in
            state.failures.keys.min().flatMap { state.failures.removeValue(forKey: $0) }
        }
        if let error { throw error.error }
    }

    /// Why the last save of a path has failed, if no call has said it yet; this one does.
    func failure(of path: String) -> NoetherWriterError? {
        state.withLock { state in
            let found = state.failures.filter { $0.value.paths.contains { $0.utf8.elementsEqual(path.utf8) } }
            return found.keys.max().flatMap { state.failures.removeValue(forKey: $0)?.error }
        }
    }

    /// The failure of a save was said: nobody else says it again.
    func told(_ sequence: UInt64) { state.withLock { _ = $0.failures.removeValue(forKey: sequence) } }

    func sayIsNotRankZero() {
        let isFirst = state.withLock { state in
            defer { state.hasSaidRank = true }
            return !state.hasSaidRank
        }
        guard isFirst else { return }
        speaker.warn(
            "this is rank \(message.rank ?? 0), and rank 0 writes the log of run \(runID): nothing is logged here")
    }

    /// - Throws: `NoetherWriterError.runClosed`.
    func checkOpen() throws(NoetherWriterError) {
        if state.withLock({ $0.isClosed }) { throw .runClosed }
    }

    var runID: String { message.runId }
    /// What tells it from others.
    var id: String { message.session }
    /// In messages.
    var title: String {
        message.layout == OpenRun.filesLayout ? "the files that this process saves" : "run \(message.runId)"
    }

    static func newID() -> String {
        let words = [UInt64.random(in: 0 ... .max), UInt64.random(in: 0 ... .max)]
        return words.map { word in
            let text = String(word, radix: 16)
            return String(repeating: "0", count: 16 - text.count) + text
        }.joined()
    }

    var isEnded: Bool { state.withLock { $0.isEnded } }

    /// - Parameter update: nil: the one after the last.
    func log(_ entry: [(key: String, value: Scalar)], update: Int64?) throws(NoetherWriterError) {
        let (result, words) = state.withLock { state -> (Result<Void, NoetherWriterError>, [String]) in
            let result: Result<Void, NoetherWriterError>
            do throws(NoetherWriterError) { result = .success(try log(entry, update: update, &state)) } catch {
                result = .failure(error)
            }
            defer { state.unsaid = [] }
            return (result, state.unsaid)
        }
        for each in words { speaker.warn(each) }
        try result.get()
    }

    private func log(
        _ entry: [(key: String, value: Scalar)], update wanted: Int64?, _ state: inout State
    ) throws(NoetherWriterError) {
        guard !state.isClosed else { throw .runClosed }
        if wanted == nil, state.lastUpdate == .max {
            throw .unsupportedValue("no update can come after \(Int64.max): nothing of it was logged")
        }
        let update = wanted ?? (state.lastUpdate ?? 0) + 1
        // The smallest one means none on the wire.
        guard update > .min else { throw .unsupportedValue("update \(update) does not fit into 64 bits") }
        for case (let key, .bigInt(let digits)) in entry where !(1...255).contains(digits.count) {
            let what = digits.isEmpty ? "no bytes" : "more than 255 bytes"
            throw .unsupportedValue(
                "\(key.debugDescription) of update \(update): an integer of \(what) cannot be logged. Nothing of it was "
                    + "logged")
        }
        let isSame = update == state.lastUpdate
        if let last = state.lastUpdate, update < last || isSame && !(state.mergesRows && state.hasOwnRow) {
            throw .updateOrder(update: update, last: last)
        }
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
        for key in new {
            guard (1...Limits.keyBytes).contains(key.utf8.count) else {
                throw .unsupportedValue(
                    "the key \(String(key.prefix(40)).debugDescription) has \(key.utf8.count) bytes; a key must have 1 to "
                        + "\(Limits.keyBytes)")
            }
            if key.utf8.contains(0) { throw .unsupportedValue("the key \(key.debugDescription) holds a NUL") }
        }
        guard entry.count <= Limits.valuesPerLog else {
            throw .unsupportedValue(
                "update \(update) has \(entry.count) values; at most \(Limits.valuesPerLog) fit into one")
        }
        guard state.keys.count + new.count <= Limits.keysPerRun else {
            throw .unsupportedValue(
                "update \(update) would give this run more than \(Limits.keysPerRun) keys: a key should name what is "
                    + "measured, and not contain data")
        }
        var writer = ByteWriter()
        LogPayload(
            sequence: state.sequence + 1, update: update, wallTime: Clock.wallSeconds, keyIDs: keyIDs,
            values: entry.map(\.value.bits)
        ).encode(into: &writer)
        let frame = Frame(.log, payload: writer.bytes)
        // A row must fit into a page of the log, with the names of its keys.
        let before = isSame ? state.row : (keys: [], byteCount: 0)
        let names = entry.reduce(0) { $0 + Self.pageKeyByteCount + $1.key.utf8.count }
        let byteCount = before.byteCount + frame.payload.count + names
        guard byteCount <= Limits.payloadBytes else {
            throw .unsupportedValue(
                "update \(update) and the names of its keys have more than \(Limits.payloadBytes) bytes, and at most that "
                    + "many fit into one: write long texts to a file, use shorter keys, or log some in another update")
        }
        let rowKeys = before.keys.union(keyIDs)
        guard rowKeys.count <= Limits.valuesPerLog else {
            throw .unsupportedValue(
                "update \(update) would have \(rowKeys.count) values; at most \(Limits.valuesPerLog). Nothing of it was "
                    + "logged")
        }
        guard !state.logIsFull else { return }
        guard state.logByteCount + frame.payload.count <= variables.queueByteCount else {
            let words =
                "the daemon has not taken \(state.logs.count) updates (\(state.logByteCount) bytes, limit "
                + "\(Variable.queueBytes.rawValue)=\(variables.queueByteCount)); no more are kept until it is back"
            if raisesWhenAway { throw .unavailable(words) }
            state.notKept += 1
            if !state.hasSaidGap { state.unsaid.append("\(words). Training continues, and the log has a gap") }
            state.hasSaidGap = true
            return
        }
        for key in new {
            state.keyIDs[ByteName(key)] = UInt32(state.keys.count)
            state.keys.append(key)
        }
        if isSame, rowKeys.count < before.keys.count + keyIDs.count, !state.hasSaidTwice {
            state.hasSaidTwice = true
            state.unsaid.append(
                "a key was logged twice at one update of run \(runID) (the last is \(update)): its last value is kept. This "
                    + "is said once")
        }
        state.row = (rowKeys, byteCount)
        state.hasOwnRow = true
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
    /// - Throws: `NoetherWriterError`; the buffer is free again then.
    func save(
        _ ticket: Ticket, _ copy: SavedCopy, payload: (UInt64, Int64?) -> SavePayload
    ) throws(NoetherWriterError) {
        do throws(NoetherWriterError) {
            try add(ticket, .save, copy.buffer) { sequence, update in try payload(sequence, update).encoded() }
        } catch {
            pool.release(copy.buffer.number)
            throw error
        }
    }

    /// - Parameter payload: with its number.
    func order(
        _ ticket: Ticket, _ type: FrameType, payload: (UInt64) throws -> [UInt8]
    ) throws(NoetherWriterError) {
        try add(ticket, type, nil) { sequence, _ in try payload(sequence) }
    }

    private func add(
        _ ticket: Ticket, _ type: FrameType, _ buffer: BufferPool.Buffer?,
        payload: (UInt64, Int64?) throws -> [UInt8]
    ) throws(NoetherWriterError) {
        let result: Result<Void, NoetherWriterError> = state.withLock { state in
            do throws(NoetherWriterError) {
                guard !state.isClosed else { throw .runClosed }
                let (sequence, update) = (state.sequence + 1, state.lastUpdate)
                let bytes = try NoetherWriterError.typed { try payload(sequence, update) }
                guard bytes.count <= Limits.payloadBytes else {
                    throw .unsupportedValue(
                        "a save with too many storages for one frame: save it in parts")
                }
                let frame = Frame(type, payload: bytes, fdCount: buffer == nil ? 0 : 1)
                state.sequence = sequence
                ticket.sequence = sequence
                state.saves[sequence] = Save(ticket: ticket, buffer: buffer, frame: frame)
                if buffer == nil { state.orders += 1 }
                if state.orders == 0 { sendSave(sequence, &state) } else { sendReady(&state) }
                return .success(())
            } catch { return .failure(error) }
        }
        try result.get()
    }

    private func sendSave(_ sequence: UInt64, _ state: inout State) {
        guard state.connection != nil, let save = state.saves[sequence] else { return }
        state.saves[sequence]?.isSent = true
        send(save.frame, fd: save.buffer?.memory.fd, to: &state)
    }

    private func sendReady(_ state: inout State) {
        for sequence in Self.ready(state) { sendSave(sequence, &state) }
    }

    /// What is to be sent now, in order: a removal when all that comes before it is accepted or has ended, and what
    /// comes after a removal when that is accepted (docs/PROTOCOL.md, "Order").
    private static func ready(_ state: State) -> [UInt64] {
        var found: [UInt64] = []
        var allTaken = true
        for (sequence, save) in state.saves.sorted(by: { $0.key < $1.key }) {
            let isOrder = save.buffer == nil
            if isOrder, !save.isSent, !allTaken { break }
            if !save.isSent { found.append(sequence) }
            if save.isTaken { continue }
            allTaken = false
            if isOrder { break }
        }
        return found
    }

    // MARK: Questions

    /// Asks, again after a reconnect if the first answer was lost: for questions that may be asked twice.
    func ask(_ type: FrameType, _ payload: [UInt8]) -> Completion<Answer> {
        state.withLock { ask(type, payload, &$0) }
    }

    @discardableResult
    private func ask(
        _ type: FrameType, _ payload: [UInt8], _ state: inout State,
        _ answer: Completion<Answer> = Completion<Answer>()
    ) -> Completion<Answer> {
        guard !state.isEnded else {
            answer.complete(.failure(.runClosed))
            return answer
        }
        state.nextQuestion += 1
        let number = state.nextQuestion
        state.questions[number] = Question(type: type, payload: payload, answer: answer)
        post(number, state)
        return answer
    }

    private func post(_ number: UInt64, _ state: State) {
        guard let question = state.questions[number] else { return }
        try? state.connection?.post(question.type, question.payload) { [events = state.events] answer in
            events?.inOrder { $0.answered(number, answer) }
        }
    }

    private func answered(_ number: UInt64, _ answer: Answer) {
        // The daemon is leaving, and its successor will answer.
        if case .failure(let error) = answer, error.isRetryable { return }
        state.withLock { $0.questions.removeValue(forKey: number) }?.answer.complete(answer)
        state.withLock { state in
            guard state.finish?.answer.value != nil, let next = state.nextFinish.take() else { return }
            askFinish(&state, next)
        }
        endIfDone()
    }

    /// The run's end, asked once for what was logged and saved until now: who asks again, or beside, shares the answer.
    func finish() -> Completion<Answer> {
        state.withLock { state in
            if let (sequence, answer) = state.finish {
                switch answer.value {
                case nil where sequence == state.sequence: return answer
                case nil:
                    let next = state.nextFinish ?? Completion<Answer>()
                    state.nextFinish = next
                    return next
                case .success? where sequence == state.sequence: return answer
                default: break
                }
            }
            return askFinish(&state, Completion<Answer>())
        }
    }

    @discardableResult
    private func askFinish(_ state: inout State, _ answer: Completion<Answer>) -> Completion<Answer> {
        state.sequence += 1
        let payload = (try? JSONPayload.encode(Finish(sequence: state.sequence))) ?? []
        state.finish = (state.sequence, answer)
        return ask(.finish, payload, &state, answer)
    }

    // MARK: The end

    /// Nothing more is taken from the trainer. What it has given is kept until the daemon has it and every save is
    /// durable or given up, so that each ticket ends with the truth.
    func close() {
        state.withLock { $0.isClosed = true }
        endIfDone()
    }

    /// After the last answer, the last acknowledgement and the last save's end.
    private func endIfDone() {
        let (isDone, connection) = state.withLock { state -> (Bool, DaemonConnection?) in
            let hasLog = !state.logs.isEmpty && !state.wasRefused && !state.logIsFull
            guard state.isClosed, !hasLog, state.saves.isEmpty, state.questions.isEmpty else {
                return (false, nil)
            }
            state.isEnded = true
            defer { state.connection = nil }
            return (true, state.connection)
        }
        guard isDone else { return }
        connection?.close()
        Ending.remove(self)
    }

    /// Whether the daemon does not have something yet that this process would lose.
    var hasWork: Bool {
        state.withLock { state in
            let hasLog = !state.logs.isEmpty && !state.wasRefused && !state.logIsFull
            return hasLog || state.saves.values.contains { !$0.ticket.isAccepted }
        }
    }

    /// How many updates and saves the daemon does not have.
    var notTaken: (updates: Int, saves: Int) {
        state.withLock { state in
            let hasLog = !state.wasRefused && !state.logIsFull
            return (hasLog ? state.logs.count : 0, state.saves.values.count { !$0.ticket.isAccepted })
        }
    }

    /// What a person should know when this process ends: what is lost with it, and what is not safe yet.
    func lastWords() -> [String] {
        state.withLock { state in
            var words: [String] = []
            var files: [String] = []
            for (_, save) in state.saves.sorted(by: { $0.key < $1.key }) {
                guard save.ticket.isAccepted else {
                    files += save.ticket.fileNames
                    continue
                }
                if state.isClosed { continue }
                let why = save.ticket.stalled.map { ": \($0)" } ?? ""
                words.append(
                    "\(save.ticket.name) is not durable yet\(why). The daemon has it, and continues after this process"
                )
            }
            words += state.failures.sorted { $0.key < $1.key }.map { "\($0.value.error)" }
            words += state.refusals.map { "\($0)" }
            var lost: [String] = []
            for file in files where !lost.contains(file) { lost.append(file) }
            if lost.count > Self.filesNamed {
                let more = lost.count - Self.filesNamed
                lost.removeLast(more)
                lost.append(more == 1 ? "another file" : "\(more) other files")
            }
            let rows = state.wasRefused || state.logIsFull ? 0 : state.logs.count
            if rows > 0 {
                lost.append(rows == 1 ? "the last update of the log" : "the last \(rows) updates of the log")
            }
            if state.notKept > 0 {
                lost.append("\(state.notKept) updates that were not kept while the daemon was away")
            }
            if !lost.isEmpty {
                let why =
                    state.connection == nil
                    ? "LOST with this process, the daemon is away" : "lost unless the daemon still takes it"
                words.append("\(why): \(lost.joined(separator: ", ")). Older files stay")
            }
            return words
        }
    }

    /// In the last words of a process.
    private static let filesNamed = 8

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

    private func handle(_ event: Result<Frame, NoetherWriterError>, from connection: DaemonConnection) {
        switch event {
        case .failure: lost(connection)
        case .success(let frame):
            switch FrameType(rawValue: frame.header.type) {
            case .checkpointEvent:
                if let event = try? JSONPayload.decode(CheckpointEvent.self, from: frame.payload) {
                    handle(event)
                }
            case .logAck:
                if let ack = try? LogAck(decoding: frame.payload) {
                    state.withLock { state in
                        acknowledge(ack.sequence, &state)
                        state.durableUpdate = ack.durableUpdate ?? state.durableUpdate
                    }
                    endIfDone()
                }
            case .error:
                let error = DaemonConnection.refusal(frame.payload)
                let sequence = (try? JSONPayload.decode(ErrorMessage.self, from: frame.payload))?.sequence
                let words = state.withLock { state -> [String] in
                    // Of a connection on which nothing was opened it is about that one, which ends.
                    guard state.connection === connection else { return [] }
                    if case .refused(WireError.Code.logFull.rawValue, let message) = error {
                        fill(&state, message)
                        if raisesWhenAway { state.refusals.append(error) }
                        defer { state.unsaid = [] }
                        return state.unsaid
                    }
                    if error.code == .logTakenOver { state.hasLostLog = true }
                    if let sequence { _ = drop(sequence, &state) } else { state.wasRefused = true }
                    if state.refusals.count < Self.refusalsKept { state.refusals.append(error) }
                    return []
                }
                for each in words { speaker.warn(each) }
                endIfDone()
            default: break
            }
        }
    }

    /// The log has reached the daemon's limit. What was refused will not be taken later.
    private func fill(_ state: inout State, _ message: String) {
        if !state.logIsFull, !raisesWhenAway {
            state.unsaid.append("\(message). Training continues, and nothing more is logged")
        }
        state.logIsFull = true
        state.logs.removeAll()
        state.logByteCount = 0
    }

    private func acknowledge(_ sequence: UInt64, _ state: inout State) {
        state.acknowledged = max(state.acknowledged, sequence)
        let taken = state.logs.firstIndex { $0.sequence > sequence } ?? state.logs.endIndex
        state.logByteCount -= state.logs[..<taken].reduce(0) { $0 + $1.frame.payload.count }
        state.logs.removeFirst(taken)
    }

    /// Whether the daemon still has what it has acknowledged to this session.
    private func noteDamage(_ opened: RunOpened, _ state: inout State) {
        guard opened.log ?? true, opened.lastSequence < state.acknowledged else { return }
        let end = opened.logUpdate.map { "it ends at update \($0)" } ?? "it has nothing"
        let words =
            "the log of run \(runID) has lost updates that the daemon had acknowledged: \(end). Its journal was "
            + "damaged or removed; a damaged one is kept in \(opened.runDirectory)/tracker as entries.N.journal, and the "
            + "daemon's messages say more. What is logged from now on is kept"
        let error = NoetherWriterError.refused(code: NoetherWriterError.logDamaged, message: words)
        if raisesWhenAway {
            if state.refusals.count < Self.refusalsKept { state.refusals.append(error) }
        } else {
            state.logDamage = error
            state.unsaid.append(words)
        }
    }

    /// Forgets an update that the daemon has refused.
    /// - Returns: whether it was still kept: nobody has heard of the refusal then.
    private func drop(_ sequence: UInt64, _ state: inout State) -> Bool {
        guard let index = state.logs.firstIndex(where: { $0.sequence == sequence }) else { return false }
        state.logByteCount -= state.logs.remove(at: index).frame.payload.count
        return true
    }

    private func handle(_ event: CheckpointEvent) {
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
                if save.buffer == nil { state.orders -= 1 }
            }
            if event.event == .accepted {
                save.isTaken = true
                state.saves[event.sequence] = save
            }
            if event.event == .failed {
                state.failures[event.sequence] = (Ticket.error(of: event), save.ticket.paths)
            }
            if state.orders > 0 { sendReady(&state) }
            return save
        }
        guard let found else { return }
        say(event, of: found.ticket)
        // The buffer first: whoever waited may save again at once.
        if event.event == .released, let buffer = found.buffer {
            // Without a number, something may still read it.
            pool.release(buffer.number, reuses: event.buffer != nil)
        }
        found.ticket.handle(event)
        endIfDone()
    }

    /// That storage refuses, and that it accepts again, once each.
    private func say(_ event: CheckpointEvent, of ticket: Ticket) {
        let wasStalled = ticket.stall != nil
        if event.event == .stalled, !wasStalled {
            speaker.warn(
                "storage refuses for now: \(event.error?.message ?? "it does not say why"). "
                    + NoetherWriterError.stalledWords)
        } else if event.event == .durable, wasStalled {
            speaker.warn("storage accepts again: \(event.path ?? ticket.name) is durable")
        }
    }

    /// Whether a save may wait on for storage that is behind; then it is sent again by itself.
    private func sendLater(_ sequence: UInt64, _ save: inout Save) -> Bool {
        let now = Clock.monotonicSeconds
        let waited = now - (save.refusedSince ?? now)
        guard waited <= pool.timeoutSeconds else { return false }
        save.refusedSince = now - waited
        queue.asyncAfter(deadline: .now() + min(Self.busySeconds, max(Self.busySeconds / 10, waited))) {
            [weak self] in
            self?.state.withLock { state in
                guard let save = state.saves[sequence] else { return }
                self?.send(save.frame, fd: save.buffer?.memory.fd, to: &state)
            }
        }
        return true
    }

    private func lost(_ connection: DaemonConnection) {
        let attempt: Int? = state.withLock { state in
            guard !state.isEnded, state.connection === connection else { return nil }
            state.connection = nil
            state.awaySince = Clock.monotonicSeconds
            // A connection that ends as soon as it is made is no way back: the pauses continue from where they were.
            let lasted = state.awaySince - state.openSince > Self.pauses[Self.pauses.count - 1]
            state.attempt = lasted ? 0 : state.attempt + 1
            return state.attempt
        }
        if let attempt { reconnectLater(attempt) }
    }

    private func reconnectLater(_ attempt: Int) {
        let pause = attempt == 0 ? 0 : Self.pauses[min(attempt - 1, Self.pauses.count - 1)]
        // It may block for as long as a daemon that was stopped does not answer.
        queue.asyncAfter(deadline: .now() + pause) { [weak self] in
            if let self { OwnThread.start { self.reconnect() } }
        }
    }

    /// Whether there is something to send or to ask. A trainer that has nothing brings no daemon back.
    private static func isIdle(_ state: State) -> Bool {
        let hasLog = !state.logs.isEmpty && !state.wasRefused && !state.logIsFull
        return !hasLog && state.saves.isEmpty && state.questions.isEmpty
    }

    private func reconnect() {
        guard !isEnded else { return }
        let isIdle = state.withLock { Self.isIdle($0) }
        do throws(NoetherWriterError) { try connectAgain(startsDaemon: !isIdle) } catch {
            let (attempt, isNews) = state.withLock { state in
                state.attempt += 1
                let isNews = !isIdle && state.attempt >= Self.pauses.count && !state.hasSaidAway
                if isNews { state.hasSaidAway = true }
                return (state.attempt, isNews)
            }
            if isNews {
                let (rows, saves) = state.withLock { ($0.logs.count, $0.saves.count) }
                speaker.warn(
                    "the daemon is away (\(error)); training continues, \(rows) updates and \(saves) saves are kept and sent "
                        + "when it is back")
            }
            reconnectLater(attempt)
        }
    }

    private func connectAgain(startsDaemon: Bool) throws(NoetherWriterError) {
        let early = EarlyEvents()
        let connection: DaemonConnection
        do throws(NoetherWriterError) {
            connection = try DaemonConnection(socket: socket, startsDaemon: startsDaemon, variables) {
                early.forward($0, $1)
            }
        } catch {
            early.forget()
            throw error
        }
        do throws(NoetherWriterError) {
            var message = message
            // What was said at the first opening is not said again.
            message.configYaml = nil
            message.resumeAt = nil
            if state.withLock({ $0.hasLostLog }) { message.log = false }
            let opened = try Self.open(connection, message)
            let news: (notKept: Int, words: [String])? = state.withLock { state in
                // It has got all that it waited for meanwhile.
                guard !state.isEnded else { return nil }
                for refused in opened.refused ?? [] {
                    guard let sequence = refused.sequence, drop(sequence, &state),
                        state.refusals.count < Self.refusalsKept
                    else { continue }
                    state.refusals.append(.refused(code: refused.code, message: refused.message))
                }
                noteDamage(opened, &state)
                acknowledge(opened.lastSequence, &state)
                state.acknowledged = opened.lastSequence
                state.connection = connection
                state.events = early
                state.openSince = Clock.monotonicSeconds
                state.hasSaidAway = false
                for first in stride(from: 0, to: state.keys.count, by: Self.keysPerFrame) {
                    send(Self.define(state.keys, from: first), to: &state)
                }
                // The end of a refusal was lost with its connection: the next end is the save's own.
                for sequence in state.saves.keys {
                    state.saves[sequence]?.isRefused = false
                    state.saves[sequence]?.isSent = false
                    state.saves[sequence]?.isTaken = false
                }
                var saves = Self.ready(state)[...]
                for log in state.logs {
                    while let save = saves.first, save < log.sequence { sendSave(saves.removeFirst(), &state) }
                    send(log.frame, to: &state)
                }
                for save in saves { sendSave(save, &state) }
                for number in state.questions.keys.sorted() { post(number, state) }
                defer { (state.notKept, state.unsaid) = (0, []) }
                return (state.notKept, state.unsaid)
            }
            guard let news else {
                early.forget()
                return connection.close()
            }
            for each in news.words { speaker.warn(each) }
            if news.notKept > 0 {
                speaker.warn(
                    "the daemon is back; \(news.notKept) updates were not kept and are missing in the log")
            }
        } catch {
            early.forget()
            connection.close()
            throw error
        }
        early.connect(self)
        endIfDone()
    }
}

extension NoetherWriterError {
    /// A daemon that is on its way out, or has just gone.
    var isRetryable: Bool {
        switch self {
        case .closed, .unavailable: true
        case .refused(let code, _): code == "draining"
        default: false
        }
    }
}
