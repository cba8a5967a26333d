// SPDX-License-Identifier: Apache-2.0
/// One connection to the daemon: the handshake, frames out without blocking on the daemon, frames in on a thread of its
/// own. What events mean is the run's business.
///
/// Concurrency model: `state` is under its lock; one loop, on that thread, reads the socket and sends what it did not
/// take at once. Any thread may send and ask.
import Dispatch
internal import Posix
internal import Synchronization
package import Wire

/// A connection to the daemon for questions about it as a whole. A ``Run`` and a ``Subscription`` have connections of
/// their own.
public final class DaemonConnection: Sendable {
    typealias Answer = Result<Frame, NoetherWriterError>
    typealias EventHandler = @Sendable (DaemonConnection, Result<Frame, NoetherWriterError>) -> Void

    private struct State {
        var nextRequest: UInt32 = 1
        var pending: [UInt32: @Sendable (Answer) -> Void] = [:]
        var out: [(bytes: ArraySlice<UInt8>, fd: OwnedFD?)] = []
        var outByteCount = 0
        var isClosing = false
        var lost: NoetherWriterError?
        var welcome: Welcome?
        /// That came, and that nobody has taken yet, in order.
        var descriptors: [OwnedFD] = []
        /// What `lost` will be.
        var end = NoetherWriterError.closed
    }

    /// How long an ask waits for its answer.
    package static let answerTime = Duration.seconds(60)

    private let path: String
    /// What may wait for a daemon that does not read, in bytes.
    private let queueByteCount: Int
    private let socket: OwnedFD
    private let wake: WakeEvent
    private let state = Mutex(State())
    private let onEvent: EventHandler

    /// Connects.
    /// - Parameters:
    ///   - path: of the daemon's socket.
    ///   - startsDaemon: starts a daemon for this user if none listens.
    /// - Throws: ``NoetherWriterError``.
    @available(*, noasync, message: "it blocks a thread of the tasks: await DaemonConnection.open(socket:)")
    public convenience init(
        socket path: String = defaultSocket(), startsDaemon: Bool = false
    ) throws(NoetherWriterError) {
        try self.init(socket: path, startsDaemon: startsDaemon, Variables()) { _, _ in }
    }

    /// Connects, and holds no thread of the tasks.
    /// - Parameters:
    ///   - path: of the daemon's socket.
    ///   - startsDaemon: starts a daemon for this user if none listens.
    /// - Throws: ``NoetherWriterError``.
    public static func open(
        socket path: String = defaultSocket(), startsDaemon: Bool = false
    ) async throws(NoetherWriterError) -> DaemonConnection {
        try await offTasks { () throws(NoetherWriterError) in
            try DaemonConnection(socket: path, startsDaemon: startsDaemon)
        }
    }

    /// Connects to a daemon that is there, and waits no longer than so for its welcome.
    package convenience init(
        socket path: String, welcomeWithin limit: Duration?
    ) throws(NoetherWriterError) {
        try self.init(
            socket: path, startsDaemon: false, Variables(), welcomeWithin: limit ?? Self.answerTime
        ) { _, _ in }
    }

    /// Connects to a daemon, and starts one if none listens: the program beside this one, if there is one.
    package convenience init(startingAt path: String) throws(NoetherWriterError) {
        try self.init(
            socket: path, startsDaemon: true, Variables(), program: DaemonLauncher.programBesideThis
        ) { _, _ in }
    }

    /// - Parameter onEvent: gets each frame that answers no request, and once, at the end, why the connection is gone.
    ///   Runs on the connection's thread.
    init(
        socket path: String, startsDaemon: Bool, _ variables: Variables,
        welcomeWithin limit: Duration = answerTime, program: String = DaemonLauncher.program,
        onEvent: @escaping EventHandler
    ) throws(NoetherWriterError) {
        self.path = path
        // More than a session keeps of its log: headers and saves come on top.
        queueByteCount = 2 * variables.queueByteCount
        if startsDaemon {
            socket = try DaemonLauncher.connectOrStart(path, program: program)
        } else {
            socket = try DaemonLauncher.connect(path)
        }
        let socket = socket
        wake = try NoetherWriterError.typed {
            try UnixSocket.setNonBlocking(socket)
            return try WakeEvent()
        }
        self.onEvent = onEvent
        OwnThread.start { self.loop() }
        do {
            let welcome = try ask(
                .hello, Hello(client: "noether-writer-swift/\(Release.version)"), Welcome.self, timeout: limit)
            try Self.check(welcome)
            state.withLock { $0.welcome = welcome }
        } catch {
            close()
            throw error
        }
    }

    package var welcome: Welcome? { state.withLock { $0.welcome } }

    /// Whether the daemon is of this process's own user.
    var isOwn: Bool { (try? UnixSocket.peerCredentials(of: socket))?.uid == ThisProcess.userID }

    /// Tells whether the daemon's process has ended. Made while it lives.
    package func lifeline() -> () -> Bool {
        let process = (try? UnixSocket.peerCredentials(of: socket))?.process
        return {
            // Of a process in a pid namespace that can't be seen, the end of the connection is all that shows.
            let isLost = self.state.withLock { $0.lost != nil }
            guard let process, process.pidfd != nil || process.pid > 0 else { return isLost }
            return process.hasEnded
        }
    }

    /// Sends a JSON request and waits for its answer.
    package func ask<Answer: Decodable>(
        _ type: FrameType, _ message: some Encodable, _: Answer.Type, timeout: Duration? = answerTime
    ) throws(NoetherWriterError) -> Answer {
        try ask(type, message, Answer.self, fd: nil, timeout: timeout)
    }

    /// - Parameter fd: goes with the question.
    func ask<Answer: Decodable>(
        _ type: FrameType, _ message: some Encodable, _: Answer.Type, fd: OwnedFD?, timeout: Duration? = answerTime
    ) throws(NoetherWriterError) -> Answer {
        let payload = try NoetherWriterError.typed { try JSONPayload.encode(message) }
        return try Self.decode(request(type, payload, fd: fd, timeout: timeout))
    }

    /// As `ask`, for a descriptor: on a connection that asks nothing else at the same time.
    /// - Returns: nil if the answer has none.
    func askForDescriptor(_ type: FrameType, _ message: some Encodable) throws(NoetherWriterError) -> OwnedFD? {
        let payload = try NoetherWriterError.typed { try JSONPayload.encode(message) }
        let answer = try request(type, payload, timeout: Self.answerTime)
        guard answer.header.fdCount > 0 else { return nil }
        return state.withLock { $0.descriptors.isEmpty ? nil : $0.descriptors.removeFirst() }
    }

    /// Whether the daemon knows something that older ones do not.
    func can(_ capability: String) -> Bool { welcome?.capabilities.contains(capability) ?? false }

    static func decode<Answer: Decodable>(_ frame: Frame) throws(NoetherWriterError) -> Answer {
        try NoetherWriterError.typed { try JSONPayload.decode(Answer.self, from: frame.payload) }
    }

    func request(
        _ type: FrameType, _ payload: [UInt8], fd: OwnedFD? = nil, timeout: Duration?
    ) throws(NoetherWriterError) -> Frame {
        guard let result = try ask(type, payload, fd).wait(until: .after(timeout)) else {
            throw Self.noAnswer(within: timeout)
        }
        return try result.get()
    }

    /// As `request`, and holds no thread.
    func answer(
        _ type: FrameType, _ payload: [UInt8], timeout: Duration?
    ) async throws -> Frame {
        guard let result = try await ask(type, payload).arrived(until: .after(timeout)) else {
            try Task.checkCancellation()
            throw Self.noAnswer(within: timeout)
        }
        return try result.get()
    }

    static func noAnswer(within timeout: Duration?) -> NoetherWriterError {
        let seconds = ((timeout?.seconds ?? 0) * 10).rounded() / 10
        return .timeout(
            waitingFor: "the daemon has not answered within \(seconds) s; it still works", stalled: nil)
    }

    private func ask(
        _ type: FrameType, _ payload: [UInt8], _ fd: OwnedFD? = nil
    ) throws(NoetherWriterError) -> Completion<Answer> {
        let answer = Completion<Answer>()
        try post(type, payload, fd: fd) { answer.complete($0) }
        return answer
    }

    /// Sends a question.
    /// - Parameter answered: gets the answer, or why the connection is gone, on the connection's thread.
    /// - Throws: nothing was asked then.
    func post(
        _ type: FrameType, _ payload: [UInt8], fd: OwnedFD? = nil, _ answered: @escaping @Sendable (Answer) -> Void
    ) throws(NoetherWriterError) {
        let number = state.withLock { state in
            let number = state.nextRequest
            // 0 is for events.
            state.nextRequest = number == .max ? 1 : number + 1
            state.pending[number] = answered
            return number
        }
        do throws(NoetherWriterError) {
            let frame = Frame(type, request: number, payload: payload, fdCount: fd == nil ? 0 : 1)
            try send(frame, fd: fd)
        } catch {
            // Where the connection has ended meanwhile, its end has been told.
            guard state.withLock({ $0.pending.removeValue(forKey: number) }) != nil else { return }
            throw error
        }
    }

    /// - Throws: `NoetherWriterError.refused` if the daemon speaks a version that was not offered.
    static func check(_ welcome: Welcome) throws(NoetherWriterError) {
        guard welcome.version == 1 else {
            throw .refused(
                code: WireError.Code.unsupportedVersion.rawValue,
                message: "\(welcome.daemon) speaks version \(welcome.version) of the protocol, this library 1"
            )
        }
    }

    static func refusal(_ payload: [UInt8]) -> NoetherWriterError {
        guard let error = try? JSONPayload.decode(ErrorMessage.self, from: payload) else {
            return .refused(code: "bad-frame", message: "the daemon refused, in words that do not decode")
        }
        return .refused(code: error.code, message: error.message)
    }

    /// Hands over one frame; `fd` goes with its first byte. Never waits for the daemon.
    func send(_ frame: Frame, fd: OwnedFD? = nil) throws(NoetherWriterError) {
        let bytes = frame.encoded()[...]
        let refusal: NoetherWriterError? = state.withLock { state in
            if let lost = state.lost { return lost }
            guard state.out.isEmpty || state.outByteCount + bytes.count <= queueByteCount else {
                return .refused(
                    code: "too-many",
                    message: "the daemon does not read: \(state.outByteCount) bytes wait for it already")
            }
            state.out.append((bytes, fd))
            state.outByteCount += bytes.count
            if state.out.count == 1 { flush(&state) }
            return nil
        }
        if let refusal { throw refusal }
        if state.withLock({ !$0.out.isEmpty }) { wake.signal() }
    }

    /// Says goodbye and closes, once what waits has been sent.
    public func close() {
        try? send(Frame(.close))
        state.withLock { $0.isClosing = true }
        wake.signal()
    }

    /// Closes without a goodbye: the session continues over another connection.
    func drop() {
        state.withLock { $0.isClosing = true }
        wake.signal()
    }

    // MARK: The loop

    /// An error of the socket shows when it is read.
    private func flush(_ state: inout State) {
        while let (bytes, fd) = state.out.first {
            guard let sent = try? bytes.withUnsafeBytes({ try UnixSocket.send(on: socket, $0, fd: fd) })
            else { return }
            state.outByteCount -= sent
            if sent < bytes.count {
                state.out[0] = (bytes.dropFirst(sent), sent > 0 ? nil : fd)
            } else {
                state.out.removeFirst()
            }
        }
    }

    private func loop() {
        var decoder = FrameDecoder()
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 64 << 10, alignment: 16)
        defer { buffer.deallocate() }
        reading: while true {
            do {
                let (hasOut, isDone) = state.withLock { (!$0.out.isEmpty, $0.isClosing && $0.out.isEmpty) }
                if isDone { break }
                try wake.wait(for: socket, orWriting: hasOut)
                state.withLock { flush(&$0) }
                switch try UnixSocket.receive(from: socket, into: buffer) {
                case .wouldBlock: continue
                case .end: break reading
                case .bytes(let count, let fds, let truncated):
                    if truncated { break reading }
                    state.withLock { $0.descriptors += fds }
                    decoder.feed(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
                }
                while let frame = try decoder.next() { handle(frame) }
            } catch {
                if let error = error as? WireError {
                    let words =
                        error.code == .badFrame
                        ? "what listens on \(path) does not speak the noether-writer protocol: " : ""
                    state.withLock {
                        $0.end = .refused(code: error.code.rawValue, message: words + error.message)
                    }
                }
                break
            }
        }
        let (pending, end) = state.withLock { state in
            state.lost = state.end
            defer { state.pending = [:] }
            return (state.pending.values, state.end)
        }
        for answered in pending { answered(.failure(end)) }
        onEvent(self, .failure(end))
    }

    private func handle(_ frame: Frame) {
        let number = frame.header.request
        if number == 0, frame.header.type == FrameType.error.rawValue,
            let error = try? JSONPayload.decode(ErrorMessage.self, from: frame.payload), error.fatal
        {
            state.withLock { $0.end = .refused(code: error.code, message: error.message) }
        }
        guard number != 0, frame.header.type != FrameType.checkpointEvent.rawValue else {
            return onEvent(self, .success(frame))
        }
        let isError = frame.header.type == FrameType.error.rawValue
        state.withLock { $0.pending.removeValue(forKey: number) }?(
            isError ? .failure(Self.refusal(frame.payload)) : .success(frame))
    }

    /// `$NOETHER_WRITER_SOCKET`, else the user's daemon, else the system template's, else one below the temporary
    /// directory.
    public static func defaultSocket() -> String { SocketPath.standard(ThisProcess.environment) }
}
