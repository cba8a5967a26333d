// SPDX-License-Identifier: Apache-2.0
/// One client's connection: bytes in and out, the handshake, and what each frame asks of its run. Owned by the daemon's
/// queue, which the daemon's poller tells when there is something to read or room to write. What a run does with a
/// frame is the Writer's.
import Posix
import Wire
import Writer

@DaemonActor
final class Connection {
    private let socket: OwnedFD
    /// Names this connection to the poller; never used again.
    let token: UInt64
    let peer: PeerCredentials
    private unowned let host: any ConnectionHost
    private let shared: ConnectionResources
    private var decoder = FrameDecoder()
    /// Descriptors that came, with the stream positions of the bytes they came with. The kernel may put bytes sent
    /// before a descriptor's own into the same recvmsg, but none sent behind them (unix(7), "Ancillary messages").
    private var receivedFDs: [(positions: Range<UInt64>, fd: OwnedFD)] = []
    private var receivedBytes: UInt64 = 0
    private var outQueue: [UInt8] = []
    /// Descriptors that go with bytes of the queue, in order, and the positions of these bytes in the stream.
    private var outDescriptors: [(position: UInt64, fd: OwnedFD)] = []
    private var sentBytes: UInt64 = 0
    /// What the socket has not taken of the frame at the beginning of the queue, if it has taken some of it.
    private var startedByteCount = 0
    /// Until when the last words may leave; nothing is taken any more.
    private var lastWordsUntil: Double?
    /// The socket was full: the poller says when it is not.
    private var isWaitingToWrite = false
    private(set) var isClosed = false
    /// It has said hello.
    private(set) var greeted = false
    private var isOpening = false
    private var closedCleanly = false
    /// Since when the frame that is not complete has been coming.
    private var incompleteSince: Double?
    private let startSeconds = Clock.monotonicSeconds
    private var answersPending = 0
    /// Charged to this connection, in bytes: what it has sent of a frame, and what it has not read.
    private(set) var heldByteCount = 0

    private var subscription: Subscription?
    private var run: Run?
    /// In the place of a run.
    private var files: PathSession?
    private(set) var session = ""
    private var wantsProgress = false
    /// It stays open until the daemon's end, and has no run.
    private(set) var hasAskedToLeave = false
    private var rank = 0
    /// The number of the last log that was taken on this connection. The next one must have a larger number.
    private var lastLogSequence: UInt64 = 0
    /// This connection's key ids, as columns of the run.
    private var columnOfKey: [Int] = []

    init(
        socket: OwnedFD, token: UInt64, peer: PeerCredentials, host: any ConnectionHost, shared: ConnectionResources
    ) {
        self.socket = socket
        self.token = token
        self.peer = peer
        self.host = host
        self.shared = shared
    }

    func start() throws(PosixError) {
        try shared.poller.add(socket, token: token)
        if let pidfd = peer.process.pidfd { try shared.poller.add(pidfd, token: token | Self.processBit) }
    }

    /// In a token, of the pidfd of the process at the other end.
    static let processBit: UInt64 = 1 << 63

    /// The process that connected has ended. What it sent is taken; what it forked may hold the socket, and says
    /// nothing on it.
    func processEnded() {
        isEmptied = false
        for _ in 0..<Self.readsAtEnd where !isClosed && !isEmptied { readable() }
        close()
    }

    private static let readsAtEnd = 64
    /// Nothing was left in the socket when it was read last.
    private var isEmptied = false

    /// What the poller has told; it tells nothing more until it is armed again.
    func ready(_ event: Poller.Event) {
        if event.isWritable {
            isWaitingToWrite = false
            flush()
        }
        if event.isReadable { readable() }
        arm()
    }

    private func arm() {
        guard !isClosed, lastWordsUntil == nil else { return }
        do { try shared.poller.arm(socket, token: token, writing: isWaitingToWrite) } catch { close() }
    }

    func close() {
        guard !isClosed else { return }
        isClosed = true
        receivedFDs = []
        decoder = FrameDecoder()
        outQueue = []
        outDescriptors = []
        account()
        endSubscription()
        run?.detach(rank: rank, connection: token, clean: closedCleanly, keepsJournal: host.isDraining)
        if let files { shared.runs.paths.detach(files, clean: closedCleanly) }
        if run != nil || files != nil { shared.runs.vault.left(session, clean: closedCleanly) }
        shared.poller.remove(socket)
        if let pidfd = peer.process.pidfd { shared.poller.remove(pidfd) }
        host.forget(self)
    }

    // MARK: Reading

    /// Reads until the socket is empty, or for so long: a client that sends without end lets the others have their
    /// turn, since the poller tells of the rest behind what it has told of them.
    private func readable() {
        guard lastWordsUntil == nil else { return }
        let buffer = shared.receiveBuffer
        for _ in 0..<Self.readsAtOnce where !isClosed {  // guard: turns (= Int.max for Self.readsAtOnce)
            do {
                switch try UnixSocket.receive(from: socket, into: buffer) {
                case .wouldBlock:
                    decoder.trim()
                    if decoder.pendingByteCount > 0, incompleteSince == nil {
                        incompleteSince = Clock.monotonicSeconds
                    }
                    isEmptied = true
                    return account()
                case .end: return close()
                case .bytes(let count, let fds, let truncated):
                    if truncated {  // guard: fds-cut-off (never)
                        return fail(
                            WireError(.badFrame, "descriptors were lost on the way: too many at once"))
                    }
                    let positions = receivedBytes..<receivedBytes + UInt64(count)
                    for fd in fds { receivedFDs.append((positions, fd)) }
                    receivedBytes += UInt64(count)
                    decoder.feed(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
                    try handleFrames()
                }
            } catch let error as WireError {
                return fail(error, request: decoder.brokenRequest)
            } catch {
                return close()
            }
        }
        account()
    }

    private static let readsAtOnce = 4

    private func handleFrames() throws(WireError) {
        while !isClosed, lastWordsUntil == nil {
            let start = decoder.frameStart
            guard let frame = try decoder.next() else { break }
            incompleteSince = nil
            do throws(WireError) { try handle(frame, claimDescriptor(of: frame, from: start)) } catch {
                refuse(frame, error)
                if error.isFatal { return }
            }
        }
        // Those of the frame that is coming; a client could send one with each of its bytes.
        guard receivedFDs.count <= Limits.fdsPerFrame else {  // guard: fds-of-one-frame (always)
            throw WireError(.badFrame, "\(receivedFDs.count) descriptors came with one frame")
        }
    }

    /// - Parameter start: the frame's position in the stream.
    private func claimDescriptor(of frame: Frame, from start: UInt64) throws(WireError) -> OwnedFD? {
        var fd: OwnedFD?
        if frame.header.fdCount > 0 {
            // guard: fd-of-another-frame (always: first.positions.contains(start))
            guard let first = receivedFDs.first, first.positions.contains(start) else {
                throw WireError(.badFrame, "the frame declares a descriptor that did not come with it")
            }
            fd = receivedFDs.removeFirst().fd
        }
        // guard: fd-undeclared (never)
        if let stray = receivedFDs.first, stray.positions.upperBound <= decoder.frameStart {
            throw WireError(.badFrame, "a descriptor came with a frame that declares none")
        }
        return fd
    }

    /// Says which frame it was: by its request, and by its number if it has one.
    private func refuse(_ frame: Frame, _ error: WireError) {
        let message = ErrorMessage(error, sequence: sequence(of: frame))
        // The number of a `bad-sequence` is that of an update that was taken.
        if frame.header.type == FrameType.log.rawValue, !error.isFatal, error.code != .badSequence {
            run?.log.noteRefusal(message, session: session)
        }
        if error.isFatal { return fail(error, request: frame.header.request, sequence: message.sequence) }
        shared.metrics.refused(error.code)
        send(.error, request: frame.header.request, message)
    }

    private func sequence(of frame: Frame) -> UInt64? {
        switch FrameType(rawValue: frame.header.type) {
        case .log, .save: (try? SavePayload.identity(of: frame.payload))?.sequence
        case .finish, .remove, .commit: (try? JSONPayload.decode(Finish.self, from: frame.payload))?.sequence
        default: nil
        }
    }

    /// Called about once a second. No timers of each connection's own: a client could make any number of them.
    func checkDeadlines() {
        let now = Clock.monotonicSeconds
        guard lastWordsUntil == nil else { return }
        // On an old kernel; elsewhere the poller tells it.
        if peer.process.pidfd == nil, peer.process.hasEnded { return processEnded() }
        if !greeted, now - startSeconds > Double(Limits.handshakeSeconds) {  // guard: handshake-deadline (never)
            fail(WireError(.handshake, "no hello came within \(Limits.handshakeSeconds) s"))
            // guard: frame-deadline (never)
        } else if let since = incompleteSince, now - since > Double(Limits.incompleteFrameSeconds) {
            fail(WireError(.badFrame, "a frame was not completed within \(Limits.incompleteFrameSeconds) s"))
        }
    }

    /// Tells the daemon what this connection holds; it may close this one or another.
    private func account() {
        let held = decoder.pendingByteCount + outQueue.count
        let change = held - heldByteCount
        heldByteCount = held
        if change != 0 { host.holds(more: change) }
    }

    /// - Parameter request: of the frame that caused it; 0 where it was none.
    func fail(_ error: WireError, request: UInt32 = 0, sequence: UInt64? = nil) {
        guard !isClosed, lastWordsUntil == nil else { return }
        shared.metrics.refused(error.code)
        Log.writeLimited(
            .warning,
            "closing the connection of process \(peer.pid): \(error.code.rawValue): \(error.message)")
        var message = ErrorMessage(error, sequence: sequence)
        message.fatal = true
        send(.error, request: request, message)
        close()
    }

    // MARK: Frames

    private func handle(_ frame: Frame, _ fd: OwnedFD?) throws(WireError) {
        let request = frame.header.request
        // guard: answer-as-question (always: type.rawValue < FrameType.welcome.rawValue)
        guard let type = FrameType(rawValue: frame.header.type), type.rawValue < FrameType.welcome.rawValue
        else {
            throw WireError(.unknownType, "frame type \(frame.header.type) is not served")
        }
        if type == .hello { return try hello(frame) }
        // guard: hello-first (always)
        guard greeted else { throw WireError(.handshake, "the first frame must be hello") }
        switch type {
        case .openRun: try openRun(JSONPayload.decode(OpenRun.self, from: frame.payload), root: fd, request)
        case .defineKeys: try defineKeys(KeyDefinitions(decoding: frame.payload))
        case .log: try log(frame.payload)
        case .save: try save(frame, fd)
        case .remove: try remove(JSONPayload.decode(Remove.self, from: frame.payload), request)
        case .commit: try commit(JSONPayload.decode(Commit.self, from: frame.payload), request)
        case .waitPath: try wait(JSONPayload.decode(WaitPath.self, from: frame.payload), request)
        case .finish: try finish(JSONPayload.decode(Finish.self, from: frame.payload), request)
        case .values: try values(JSONPayload.decode(PageRequest.self, from: frame.payload), request)
        case .entries: try entries(JSONPayload.decode(PageRequest.self, from: frame.payload), request)
        case .status: try status(request)
        case .wait: try wait(JSONPayload.decode(WaitRequest.self, from: frame.payload), request)
        case .subscribe: try subscribe(JSONPayload.decode(Subscribe.self, from: frame.payload), request)
        case .metrics:
            let wanted = try JSONPayload.decode(MetricsRequest.self, from: frame.payload)
            let text = host.metricsText(wanted.format == "prometheus" ? .prometheus : .openMetrics)
            send(Frame(.metricsText, request: request, payload: Array(text.utf8)))
        case .restore: try restore(JSONPayload.decode(Restore.self, from: frame.payload), request)
        case .leave: try leave(JSONPayload.decode(Leave.self, from: frame.payload), request)
        case .close:
            closedCleanly = true
        default: throw WireError(.unknownType, "frame type \(frame.header.type) is not served")
        }
    }

    private func hello(_ frame: Frame) throws(WireError) {
        guard !greeted else { throw WireError(.handshake, "hello came twice") }  // guard: hello-once (always)
        let hello = try JSONPayload.decode(Hello.self, from: frame.payload)
        guard hello.versions.contains(1) else {  // guard: protocol-version (always)
            throw WireError(
                .unsupportedVersion,
                "the client speaks protocol versions \(hello.versions); this daemon speaks 1")
        }
        greeted = true
        send(
            .welcome, request: frame.header.request,
            Welcome(
                daemon: "noether-writerd/\(Release.version)", pid: ThisProcess.id, service: host.commands))
    }

    private func openedRun() throws(WireError) -> Run {
        guard let run else { throw WireError(.notOpen, "this frame needs a run: send open_run first") }
        return run
    }

    /// - Parameter root: the output root, as the trainer has opened it.
    private func openRun(_ message: OpenRun, root: OwnedFD?, _ request: UInt32) throws(WireError) {
        guard run == nil, files == nil, !isOpening else {  // guard: one-run-a-connection (always: run == nil)
            throw WireError(.alreadyOpen, "this connection has a run already")
        }
        guard !host.isDraining, !host.givesWay(to: peer) else {
            throw WireError(.draining, "the daemon is leaving; connect again in a moment")
        }
        // guard: session-length (always: message.session.utf8.count == 32)
        // guard: session-digits (always: $0.isASCII && $0.isHexDigit)
        guard message.session.utf8.count == 32, message.session.allSatisfy({ $0.isASCII && $0.isHexDigit })
        else {
            throw WireError(.badName, "a session is named by 32 hexadecimal digits")
        }
        if let layout = message.layout { return try openFiles(layout, message, root, request) }
        let name = try RunName(message)
        // Who knows of no job says that it has one process, whatever its rank is.
        let (rank, worldSize) = (message.rank ?? 0, message.worldSize ?? 1)
        guard rank >= 0, worldSize >= 1, worldSize == 1 || rank < worldSize else {
            throw WireError(.badRank, "rank \(rank) of \(worldSize): ranks count from 0, and are below world_size")
        }
        if let root, (try? root.status().isDirectory) != true {
            throw WireError(.badPath, "the descriptor of open_run is no directory")
        }
        isOpening = true
        shared.runs.open(name, message, root: root, peer: peer) { result in
            // Not weakly: the run must hear that this connection is gone.
            self.isOpening = false
            switch result {
            case .failure(let error):
                self.shared.metrics.refused(error.code)
                if error.errno != nil {
                    Log.writeLimited(
                        .warning, "run \(name.runID): not opened, since storage refuses it: \(error.message)",
                        ["RUN_ID": name.runID], topic: .storage)
                }
                self.send(.error, request: request, ErrorMessage(error))
            case .success(let run):
                guard !self.isClosed else {  // guard: gone-while-opening (always)
                    return run.detach(
                        rank: message.rank ?? 0, connection: self.token, clean: false, keepsJournal: false)
                }
                self.run = run
                self.session = message.session
                self.wantsProgress = message.progress == true
                self.rank = message.rank ?? 0
                run.opened(message, on: self.token, acknowledge: { [weak self] in self?.acknowledge($0) }) { opened in
                    self.send(.runOpened, request: request, opened)
                }
            }
        }
    }

    private func openFiles(
        _ layout: String, _ message: OpenRun, _ root: OwnedFD?, _ request: UInt32
    ) throws(WireError) {
        guard layout == OpenRun.filesLayout else {
            throw WireError(
                .badLayout,
                "the layout is \(String(layout.prefix(64)).debugDescription); \(OpenRun.filesLayout) is served, or none"
            )
        }
        files = try shared.runs.paths.open(message, root: root, peer: peer)
        session = message.session
        wantsProgress = message.progress == true
        var opened = RunOpened(runDirectory: "/", lastSequence: 0, logUpdate: nil, logEntries: nil)
        opened.log = false
        send(.runOpened, request: request, opened)
    }

    private func openedFiles() throws(WireError) -> PathSession {
        guard let files else {
            throw WireError(.notOpen, "this frame needs a connection with the layout \(OpenRun.filesLayout)")
        }
        return files
    }

    private func defineKeys(_ definitions: KeyDefinitions) throws(WireError) {
        let run = try openedRun()
        guard Int(definitions.firstID) == columnOfKey.count else {  // guard: key-ids-in-order (always)
            throw WireError(
                .badKey, "key ids start at \(definitions.firstID); the next one is \(columnOfKey.count)")
        }
        // The run counts its own keys; a connection may name one again and again.
        // guard: keys-of-a-connection (always)
        guard columnOfKey.count + definitions.keys.count <= Limits.keysPerRun else {
            throw WireError(.badKey, "more than \(Limits.keysPerRun) keys on one connection")
        }
        columnOfKey += try run.log.columns(for: definitions.keys)
    }

    private func log(_ bytes: [UInt8]) throws(WireError) {
        let run = try openedRun()
        let payload = try LogPayload(decoding: bytes)
        guard payload.sequence > lastLogSequence else {  // guard: numbers-of-updates-grow (always)
            throw WireError(
                .badSequence,
                "a log has the sequence \(payload.sequence), and the one before it on this connection "
                    + "\(lastLogSequence): numbers count from 1 and grow. Nothing of it was logged")
        }
        var columns: [Int] = []
        columns.reserveCapacity(payload.keyIDs.count)
        for id in payload.keyIDs {
            // guard: key-defined (always)
            guard Int(id) < columnOfKey.count else { throw WireError(.badKey, "key id \(id) is not defined") }
            columns.append(columnOfKey[Int(id)])
        }
        guard Set(columns).count == columns.count else {  // guard: key-once (always)
            throw WireError(.badKey, "a key is twice in update \(payload.update)")
        }
        try run.log.append(payload, columnIDs: columns, session: session)
        lastLogSequence = payload.sequence
    }

    private func acknowledge(_ ack: LogAck) { send(Frame(.logAck, payload: ack.encoded())) }

    /// - Throws: where no events can answer it: nothing says which save it is, or that one is another's.
    private func save(_ frame: Frame, _ fd: OwnedFD?) throws(WireError) {
        let identity = try SavePayload.identity(of: frame.payload)
        do throws(WireError) {
            let payload = try SavePayload(decoding: frame.payload)
            if files == nil { _ = try openedRun() }
            guard let fd else { throw WireError(.badBuffer, "a save comes with one descriptor") }
            guard !host.isDraining else {
                throw WireError(.draining, "the daemon is leaving; save again in a moment")
            }
            if let files {
                try shared.runs.paths.save(payload, fd: fd, of: files, connection: token, events: events)
            } else {
                guard payload.files.isEmpty else {
                    throw WireError(
                        .badLayout, "files at any path need a connection with the layout \(OpenRun.filesLayout)")
                }
                try openedRun().save(
                    payload, fd: fd, session: session, rank: rank, connection: token, events: events)
            }
        } catch { try refuse(identity, error, frame.header.request) }
    }

    /// Weakly: what waits for the disk must not keep a closed connection's socket open.
    private var events: EventSink {
        { [weak self] event in
            guard event.event != .progress || self?.wantsProgress == true else { return }
            self?.send(.checkpointEvent, request: 0, event)
        }
    }

    /// The stream is whole: what is wrong with one save, removal or commit ends that one only.
    /// - Throws: if events that bear its number are another one's.
    private func refuse(
        _ identity: SavePayload.Identity, _ error: WireError, _ request: UInt32
    ) throws(WireError) {
        var error = error
        error.isFatal = error.code == .internal
        let isAnothers =
            run?.isSaving(session, identity.sequence) == true || files?.isBusy(with: identity.sequence) == true
        if error.isFatal || isAnothers { throw error }
        shared.metrics.refused(error.code)
        var failed = CheckpointEvent(.failed, sequence: identity.sequence)
        failed.target = 0
        failed.error = ErrorMessage(error, sequence: identity.sequence)
        send(.checkpointEvent, request: request, failed)
        var released = CheckpointEvent(.released, sequence: identity.sequence)
        released.buffer = identity.buffer
        send(.checkpointEvent, request: request, released)
    }

    private func remove(_ message: Remove, _ request: UInt32) throws(WireError) {
        do throws(WireError) {
            try shared.runs.paths.remove(message, of: takingFiles(), connection: token, events: events)
        } catch { try refuse(SavePayload.Identity(sequence: message.sequence), error, request) }
    }

    private func commit(_ message: Commit, _ request: UInt32) throws(WireError) {
        do throws(WireError) {
            try shared.runs.paths.commit(message, of: takingFiles(), connection: token, events: events)
        } catch { try refuse(SavePayload.Identity(sequence: message.sequence), error, request) }
    }

    private func takingFiles() throws(WireError) -> PathSession {
        let files = try openedFiles()
        guard !host.isDraining else {
            throw WireError(.draining, "the daemon is leaving; ask again in a moment")
        }
        return files
    }

    private func wait(_ message: WaitPath, _ request: UInt32) throws(WireError) {
        let files = try openedFiles()
        let answer = try promise()
        do throws(WireError) {
            try shared.runs.paths.whenFree(message, of: files) { [weak self] in
                answer.give(())
                self?.send(.waited, request: request, $0)
            }
        } catch {
            answer.give(())
            throw error
        }
    }

    private func restore(_ message: Restore, _ request: UInt32) throws(WireError) {
        let answer = try promise()
        let stamp = FileStamp(
            identity: .init(device: message.device, inode: message.inode), byteCount: message.bytes,
            modified: message.modifiedNs, changed: message.changedNs)
        shared.runs.vault.give(stamp) { [weak self] fd in
            answer.give(())
            self?.send(.restored, request: request, Restored(found: fd != nil), fd)
        }
    }

    private func finish(_ message: Finish, _ request: UInt32) throws(WireError) {
        let run = try openedRun()
        guard message.sequence > 0 else {
            throw WireError(.badSequence, "a finish has the sequence 0; a session counts from 1. Nothing was finished")
        }
        let answer = try promise()
        try run.finish(session: session) { [weak self] result in
            answer.give(())
            switch result {
            case .success(let finished): self?.send(.finished, request: request, finished)
            case .failure(let error):
                self?.send(.error, request: request, ErrorMessage(error, sequence: message.sequence))
            }
        }
    }

    /// An answer that is owed until `give`; both ends have limits on how many.
    private func promise() throws(WireError) -> Once<Void> {
        // guard: answers-of-a-connection (always: answersPending < Limits.answersPendingPerConnection)
        guard answersPending < Limits.answersPendingPerConnection,
            shared.answersPending < Limits.answersPending  // guard: answers-of-all (always)
        else {
            throw WireError(
                .tooMany,
                "\(answersPending) answers are pending on this connection, \(shared.answersPending) in all; wait for one"
            )
        }
        answersPending += 1
        shared.answersPending += 1
        return Once { [weak self, shared] in
            self?.answersPending -= 1
            shared.answersPending -= 1
        }
    }

    private func values(_ page: PageRequest, _ request: UInt32) throws(WireError) {
        let log = try openedRun().log.columns
        let key = page.key ?? ""
        var answer = ValuesPage(total: log.valueCount(key: key))
        for item in log.values(key: key, from: page.from, limit: min(page.limit, Limits.pageItems)) {
            guard answer.append(update: item.update, item.value) else { break }
        }
        send(Frame(.valuesPage, request: request, payload: answer.encoded()))
    }

    private func entries(_ page: PageRequest, _ request: UInt32) throws(WireError) {
        let log = try openedRun().log.columns
        var answer = EntriesPage(total: log.count)
        // Both numbers come from a client: no sum of them that could overflow.
        let first = min(max(0, page.from), log.count)
        let limit = min(max(0, page.limit), Limits.pageItems, log.count - first)
        for row in log.payloads(rows: first..<first + limit, sequence: 0) {
            guard answer.append(row, name: { log.keys[Int($0)] }) else { break }
        }
        send(Frame(.entriesPage, request: request, payload: answer.encoded()))
    }

    private func wait(_ message: WaitRequest, _ request: UInt32) throws(WireError) {
        if let runID = message.runId, shared.runs.find(runID, directory: nil) == nil { throw unknownRun(runID) }
        let answer = try promise()
        host.whenDurable(runID: message.runId, timeoutSeconds: message.timeoutS) { [weak self] in
            answer.give(())
            self?.send(.waited, request: request, $0)
        }
    }

    private func leave(_ message: Leave, _ request: UInt32) throws(WireError) {
        if let commands = host.commands {
            let way = commands.restart.map { ": \($0)" } ?? ""
            throw WireError(.unknownType, "a service manager keeps this daemon, and ends it\(way)")
        }
        guard !hasAskedToLeave, run == nil, !isOpening else {
            throw WireError(.alreadyOpen, "leave is asked once, on a connection without a run")
        }
        hasAskedToLeave = true
        let reason = message.reason.map { ": \(String($0.prefix(200)).debugDescription)" } ?? ""
        host.leave(because: "\(peer.process.name) asks for it\(reason)") { [weak self] in
            self?.send(.waited, request: request, $0)
        }
    }

    /// The live runs first, and as many as a frame holds.
    private func status(_ request: UInt32) throws(WireError) {
        send(.statusReport, request: request, try host.fittingStatus())
    }

    private func subscribe(_ message: Subscribe, _ request: UInt32) throws(WireError) {
        guard subscription == nil else {
            throw WireError(.alreadyOpen, "this connection has a subscription already")
        }
        guard shared.subscriptionCount < Limits.subscriptions else {
            throw WireError(
                .tooMany, "\(Limits.subscriptions) subscriptions are open; close one, or try again later")
        }
        var run: Run?
        if let runID = message.runId {
            run = shared.runs.find(runID, directory: message.runDirectory)
            if run == nil { throw unknownRun(runID) }
        }
        let sink = Subscription.Sink(
            unread: { [weak self] in self?.outQueue.count ?? 0 },
            send: { [weak self] in self?.send(Frame($0, request: request, payload: $1)) },
            over: { [weak self] in self?.endSubscription() })
        let made = Subscription(run: run, message, sink: sink) { [unowned host] () throws(WireError) in
            try host.fittingStatus()
        }
        subscription = made
        shared.subscriptionCount += 1
        send(.subscribed, request: request, made.answer)
        made.start()
    }

    private func unknownRun(_ runID: String) -> WireError {
        WireError(.unknownRun, "this daemon does not know the run \(String(runID.prefix(64)).debugDescription)")
    }

    private func endSubscription() {
        guard let subscription else { return }
        self.subscription = nil
        shared.subscriptionCount -= 1
        subscription.end()
    }

    // MARK: Writing

    private func send(_ type: FrameType, request: UInt32, _ message: some Encodable, _ fd: OwnedFD? = nil) {
        do throws(WireError) {
            let payload = try JSONPayload.encode(message)
            guard payload.count <= Limits.payloadBytes else {
                throw WireError(
                    .tooMany, "the answer has \(payload.count) bytes, and at most \(Limits.payloadBytes) can be sent")
            }
            send(Frame(type, request: request, payload: payload, fdCount: fd == nil ? 0 : 1), fd)
        } catch {
            Log.writeLimited(.error, "a \(type) was not sent: \(error.message)")
            if type != .error { send(.error, request: request, ErrorMessage(error)) }
        }
    }

    private func send(_ frame: Frame, _ fd: OwnedFD? = nil) {
        guard !isClosed, lastWordsUntil == nil else { return }
        if let fd { outDescriptors.append((sentBytes + UInt64(outQueue.count), fd)) }
        outQueue += frame.encoded()
        if outQueue.count > Limits.outQueueBytes { return endUnread() }  // guard: out-queue (never)
        if !isWaitingToWrite { flush() }
        account()
    }

    /// A client that does not read hears why its connection ends, if it reads on within a while: behind what its socket
    /// holds comes the rest of a frame that has begun, and then this.
    private func endUnread() {
        let error = WireError(
            .tooMany,
            "\(outQueue.count) bytes of answers and events were not read, at most \(Limits.outQueueBytes) wait: they are dropped, "
                + "and the connection ends. What was accepted is finished. Read while you send")
        shared.metrics.refused(error.code)
        Log.writeLimited(.warning, "process \(peer.pid) does not read its answers; closing its connection")
        var message = ErrorMessage(error)
        message.fatal = true
        let words = (try? JSONPayload.encode(message)).map { Frame(.error, payload: $0).encoded() } ?? []
        outQueue = Array(outQueue.prefix(startedByteCount)) + words
        // That of the frame that has begun went with its first byte.
        outDescriptors = []
        lastWordsUntil = Clock.monotonicSeconds + Double(Limits.lastWordsSeconds)
        decoder = FrameDecoder()
        receivedFDs = []
        sayLastWords()
    }

    /// Not by the poller, which would tell again and again of what is not read.
    private func sayLastWords() {
        flush()
        guard !isClosed, let lastWordsUntil else { return }
        if Clock.monotonicSeconds > lastWordsUntil { return close() }  // guard: last-words-end (never)
        DaemonActor.enter(after: Self.lookSeconds) { self.sayLastWords() }
    }

    private static let lookSeconds = 0.05

    /// Notes that this many bytes of the queue were sent, and finds out where the next whole frame begins after them.
    private func noteSent(_ count: Int) {
        var position = startedByteCount
        while position < count {
            let header = try? FrameHeader(decoding: ByteReader(outQueue[position..<position + FrameHeader.byteCount]))
            position += FrameHeader.byteCount + Int(header?.length ?? 0)
        }
        startedByteCount = position - count
    }

    /// A descriptor goes with the first byte of its frame, and in a message of its own.
    private func sendSome() throws -> Int? {
        var fd: OwnedFD?
        var count = outQueue.count
        if let first = outDescriptors.first {
            if first.position == sentBytes {
                fd = first.fd
                if outDescriptors.count > 1 { count = Int(outDescriptors[1].position - sentBytes) }
            } else {
                count = Int(first.position - sentBytes)
            }
        }
        let sent = try outQueue.withUnsafeBytes {
            try UnixSocket.send(on: socket, UnsafeRawBufferPointer(rebasing: $0[..<count]), fd: fd)
        }
        if fd != nil, sent != nil { outDescriptors.removeFirst() }
        return sent
    }

    private func flush() {
        guard !isClosed else { return }
        do {
            while !outQueue.isEmpty {
                guard let sent = try sendSome() else {
                    account()
                    isWaitingToWrite = true
                    return arm()
                }
                noteSent(sent)
                outQueue.removeFirst(sent)
                sentBytes += UInt64(sent)
            }
            if lastWordsUntil != nil { return close() }
            // An array that was large once keeps its memory.
            outQueue = []
            account()
            subscription?.wasRead()
        } catch { return close() }
    }
}
