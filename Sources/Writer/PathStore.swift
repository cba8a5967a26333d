// SPDX-License-Identifier: Apache-2.0
/// Files at any path, of all processes: saves, removals, and directories that get another name. Owned by the daemon's queue.
///
/// What concerns one path happens in the order in which it was accepted, whoever has asked for it, and so does what
/// concerns a directory and a path below it. Everything else goes side by side.
public import Posix
public import Wire

@DaemonActor
public final class PathStore {
    private let disks: DiskQueues
    private let budget: SnapshotBudget
    private let vault: SnapshotVault
    private let measures: Measures
    /// The umask of saves that bring none.
    private let fileModeMask: UInt32
    private let directories = PathDirectories()
    var keeper: any SnapshotKeeper = NoKeeper()
    var report: @Sendable (RunEvent) -> Void = { _ in }

    private var sessions: [String: PathSession] = [:]
    /// Those whose connections have gone, in the order of their going.
    private var left: [String] = []
    private var isUsed = false
    /// In the order in which they come about.
    private var jobs: [PathJob] = []
    /// Who wrote a path last.
    private var newest: [PathKey: (session: String, sequence: UInt64, isTree: Bool, position: Int)] = [:]
    /// Why the last save of a path has failed.
    private var failed: [PathKey: (error: PosixError, session: String, position: Int)] = [:]
    private var position = 0

    public private(set) var outcomes = FileOutcomes()
    nonisolated init(
        disks: DiskQueues, budget: SnapshotBudget, vault: SnapshotVault, measures: Measures, fileModeMask: UInt32
    ) {
        self.disks = disks
        self.budget = budget
        self.vault = vault
        self.measures = measures
        self.fileModeMask = fileModeMask
    }

    // MARK: What there is

    public var isIdle: Bool { jobs.isEmpty }

    /// nil: nobody has saved such files.
    public var status: FilesStatus? {
        guard isUsed else { return nil }
        var status = FilesStatus()
        status.processes = sessions.values.count { $0.connections > 0 }
        var written: UInt64 = 0
        for job in jobs {
            status.checkpoints.inFlight += job.snapshot?.targets.count ?? 1
            status.checkpoints.bytesInFlight += job.snapshot?.byteCount ?? 0
            written += job.snapshot?.bytesWritten ?? 0
        }
        status.checkpoints.bytesWritten = written
        outcomes.fill(&status.checkpoints)
        status.stalled = stalledFiles.first?.message
        return status
    }

    /// What storage refuses for now, and what others wait for.
    public var stalledFiles: [Waited.Failure] { jobs.compactMap(\.storage.stall) }
    /// What is not durable yet.
    public var pendingPaths: [String] { jobs.flatMap { $0.paths.map(\.text) } }
    public func forgetFailures() { outcomes.forgetFailures() }

    /// Calls back when everything that was submitted so far has ended, but for commits that wait for files of others: if
    /// the daemon leaves, their clients send them again.
    public func whenEnded(_ callback: @escaping @Sendable @DaemonActor () -> Void) {
        let jobs = jobs.filter { !$0.isWaiting }
        guard !jobs.isEmpty else { return callback() }
        let all = Once<Void>(counting: jobs.count, callback)
        for job in jobs { job.ownWaiters.append { all.count(then: ()) } }
    }

    /// Answers when what was accepted so far for this path, for what is below it and for what is above it has ended, or
    /// when the time is over.
    public func whenFree(
        _ message: WaitPath, of session: PathSession, _ answer: @escaping @Sendable @DaemonActor (Waited) -> Void
    ) throws(WireError) {
        let path = try AbsolutePath(message.path)
        let found = jobs.filter { $0.isAccepted && $0.concerns(path, of: session.root) }
        let key = session.key(path)
        let reply = Once<Bool>(counting: 1) { [weak self] done in
            var failed: [Waited.Failure] = []
            // Its own ones this session was told.
            if let failure = self?.failed[key], failure.session != session.id {
                failed.append(
                    Waited.Failure(
                        path: path.text, message: failure.error.description, errno: failure.error.errno))
            }
            let left = found.filter { !$0.last.contains { $0.event == .released } }
            answer(
                Waited(
                    done: done, pending: left.count, failed: failed,
                    stalled: done ? [] : left.compactMap(\.storage.stall)))
        }
        after(found) { reply.give(true) }
        if let seconds = message.timeoutS { reply.give(after: min(max(0, seconds), 1e9)) { false } }
    }

    private func after(_ jobs: [PathJob], _ callback: @escaping @Sendable @DaemonActor () -> Void) {
        guard !jobs.isEmpty else { return callback() }
        let all = Once<Void>(counting: jobs.count, callback)
        for job in jobs { job.waiters.append { all.count(then: ()) } }
    }

    // MARK: Sessions

    /// - Parameter root: the root directory, as the trainer has opened it.
    public func open(_ message: OpenRun, root: OwnedFD?, peer: PeerCredentials) throws(WireError) -> PathSession {
        guard let root, let status = try? root.status(), status.isDirectory else {
            throw WireError(
                .badPath, "the layout \(OpenRun.filesLayout) needs a descriptor of the root directory with open_run")
        }
        if let known = sessions[message.session] {
            known.connections += 1
            left.removeAll { $0 == known.id }
            return known
        }
        let session = try add(
            RunIdentity(message), root: PathRoot(fd: root, identity: status.identity), peer: peer)
        session.connections += 1
        return session
    }

    private func add(_ identity: RunIdentity, root: PathRoot, peer: PeerCredentials) throws(WireError) -> PathSession {
        var identity = identity
        (identity.outputRoot, identity.runId) = ("/", "files of \(peer.process.name)")
        (identity.stageName, identity.debug) = (nil, nil)
        let session = PathSession(
            id: identity.session, root: root, name: try RunName(identity), identity: identity, peer: peer)
        sessions[session.id] = session
        isUsed = true
        return session
    }

    private static let lookSeconds = 0.5

    /// A connection has gone.
    /// - Parameter clean: it has said goodbye.
    public func detach(_ session: PathSession, clean: Bool) {
        session.connections -= 1
        forget(session, atOnce: clean)
    }

    /// A session whose process lives may come back. One that does not must not hold its root directory for long: that
    /// may be the last thing that is left of a container.
    private func forget(_ session: PathSession, atOnce: Bool = false) {
        guard session.connections <= 0, session.jobs.isEmpty, sessions[session.id] === session else { return }
        if !left.contains(session.id) { session.leftSeconds = Clock.monotonicSeconds }
        left.removeAll { $0 == session.id }
        if atOnce || session.peer.process.hasEnded {
            sessions[session.id] = nil
            return
        }
        left.append(session.id)
        while left.count > Limits.fileSessionsRemembered { sessions[left.removeFirst()] = nil }
        // A process that dies closes its socket a moment before it has ended.
        DaemonActor.enter(after: Self.lookSeconds) { [weak self, weak session] in
            guard let self, let session, self.left.contains(session.id) else { return }
            let isOver = Clock.monotonicSeconds - session.leftSeconds >= RunStore.reconnectSeconds
            self.forget(session, atOnce: isOver)
        }
    }

    // MARK: What comes

    /// Takes a snapshot, or finds that it has it already: a client that lost its connection sends again what it has not
    /// seen the end of.
    public func save(
        _ payload: SavePayload, fd: OwnedFD, of session: PathSession, connection: UInt64,
        events: @escaping EventSink
    ) throws(WireError) {
        guard !payload.files.isEmpty else {
            throw WireError(
                .badLayout, "a connection with the layout \(OpenRun.filesLayout) saves files, and no targets")
        }
        if try isKnown(payload.sequence, payload.fingerprint, session, connection, events) { return }
        let snapshot = try Snapshot(payload, in: "/", fd: fd)
        let held = session.jobs.values.reduce(0) { $0 + ($1.snapshot?.memoryByteCount ?? 0) }
        try budget.check(snapshot.memoryByteCount, of: session.name, holding: held)
        let job = try makeJob(snapshot, payload, of: session, connection: connection, events: events)
        submit(job)
        keeper.keep(
            snapshot, payload, of: session.name, root: session.root.fd, brought: session.identity, session: session.id,
            rank: 0, peer: session.peer
        ) { self.accept(job) }
    }

    private func makeJob(
        _ snapshot: Snapshot, _ payload: SavePayload, of session: PathSession, connection: UInt64,
        events: @escaping EventSink
    ) throws(WireError) -> PathJob {
        var paths: [AbsolutePath] = []
        for file in payload.files { paths.append(try AbsolutePath(file.path)) }
        return PathJob(
            .save(snapshot), paths, of: session, sequence: payload.sequence, fingerprint: payload.fingerprint,
            connection: connection, disks: disks, events: events)
    }

    public func remove(
        _ message: Remove, of session: PathSession, connection: UInt64, events: @escaping EventSink
    ) throws(WireError) {
        let path = try AbsolutePath(message.path)
        guard path.name != nil else { throw WireError(.badPath, "the root directory cannot be removed") }
        var after: [AbsolutePath] = []
        for text in message.after ?? [] { after.append(try AbsolutePath(text)) }
        var hasher = Hasher()
        hasher.combine(path)
        hasher.combine(message.recursive)
        for path in after { hasher.combine(path) }
        try enqueue(
            .remove(recursively: message.recursive ?? false), [path], after: after, message.sequence,
            hasher.finalize(), session, connection, events)
    }

    public func commit(
        _ message: Commit, of session: PathSession, connection: UInt64, events: @escaping EventSink
    ) throws(WireError) {
        let (from, to) = (try AbsolutePath(message.from), try AbsolutePath(message.to))
        guard !from.isWithin(to), !to.isWithin(from) else {
            throw WireError(
                .badPath,
                "a directory cannot get a name that lies below its own, or above it: "
                    + "\(AbsolutePath.quoted(message.from)) and \(AbsolutePath.quoted(message.to))")
        }
        var hasher = Hasher()
        for path in [from, to] { hasher.combine(path) }
        hasher.combine(message.replace)
        for file in message.files ?? [] { hasher.combine(ByteName(file)) }
        try enqueue(
            .commit(
                replaces: message.replace ?? false, files: message.files ?? [],
                patienceSeconds: message.patienceS ?? 0),
            [from, to], message.sequence, hasher.finalize(), session, connection, events)
    }

    private func enqueue(
        _ work: PathJob.Work, _ paths: [AbsolutePath], after: [AbsolutePath] = [], _ sequence: UInt64,
        _ fingerprint: Int, _ session: PathSession, _ connection: UInt64, _ events: @escaping EventSink
    ) throws(WireError) {
        if try isKnown(sequence, fingerprint, session, connection, events) { return }
        let job = PathJob(
            work, paths, after: after, of: session, sequence: sequence, fingerprint: fingerprint,
            connection: connection, disks: disks, events: events)
        submit(job)
        accept(job)
    }

    /// Whether it was taken before: then its events come again.
    /// - Throws: if the number is another one's, or if there is no room for more.
    private func isKnown(
        _ sequence: UInt64, _ fingerprint: Int, _ session: PathSession, _ connection: UInt64,
        _ events: @escaping EventSink
    ) throws(WireError) -> Bool {
        guard sequence > 0 else { throw WireError(.badSequence, "the sequence is 0; a session counts from 1") }
        func refusal(_ state: String) -> WireError {
            WireError(
                .badSequence,
                "the sequence \(sequence) is that of another one, which \(state): nothing of this one was taken. Each save, "
                    + "removal and commit has a number of its own")
        }
        if let known = session.jobs[sequence] {
            guard known.fingerprint == fingerprint else { throw refusal("is on its way") }
            known.events = events
            known.connection = connection
            if known.isAccepted { events(accepted(known)) }
            // Files of it that have ended: who heard of that is gone.
            for event in known.last { events(event) }
            return true
        }
        if let ended = session.ended[sequence] {
            guard ended.fingerprint == fingerprint, ended.connection != connection else { throw refusal("has ended") }
            events(CheckpointEvent(.accepted, sequence: sequence))
            for event in ended.events { events(event) }
            return true
        }
        guard session.jobs.count < Limits.filesInFlightPerSession else {
            throw WireError(.busy, "\(session.jobs.count) saves of \(session.name.runID) are in flight already")
        }
        return false
    }

    /// A snapshot that a daemon before this one had accepted.
    public func restore(
        _ payload: SavePayload, fd: OwnedFD, of identity: RunIdentity, root: OwnedFD?, peer: PeerCredentials
    ) throws(WireError) {
        guard let root, let status = try? root.status() else {
            throw WireError(.badPath, "the root directory of its trainer is not there any more")
        }
        let snapshot = try Snapshot(payload, in: "/", fd: fd)
        let session: PathSession
        if let known = sessions[identity.session] {
            session = known
        } else {
            session = try add(identity, root: PathRoot(fd: root, identity: status.identity), peer: peer)
        }
        guard session.jobs[payload.sequence] == nil, session.ended[payload.sequence] == nil else { return }
        let job = try makeJob(snapshot, payload, of: session, connection: 0) { _ in }
        submit(job)
        accept(job)
    }

    private func submit(_ job: PathJob) {
        let session = job.session
        session.jobs[job.sequence] = job
        if let snapshot = job.snapshot { budget.reserve(snapshot.memoryByteCount) }
        // What is sent again after a reconnect goes before what came after it the first time.
        let place =
            jobs.firstIndex {
                !$0.isStarted && $0.session === session && $0.sequence > job.sequence && $0.concerns(job)
            } ?? jobs.endIndex
        for (index, other) in jobs.enumerated() where other.concerns(job) && !other.waits(for: job) {
            let (first, second) = index < place || other.isStarted ? (other, job) : (job, other)
            first.dependents.append(second)
            second.blockers += 1  // guard: files-in-order (skip)
        }
        jobs.insert(job, at: place)
    }

    private func accept(_ job: PathJob) {
        job.isAccepted = true
        job.acceptedSeconds = Clock.monotonicSeconds
        if job.snapshot != nil { measures.saves += 1 }
        Faults.interrupt(at: "save.accepted")
        job.events(accepted(job))
        start(job)
    }

    private func accepted(_ job: PathJob) -> CheckpointEvent {
        var accepted = CheckpointEvent(.accepted, sequence: job.sequence)
        accepted.bytes = job.snapshot?.byteCount
        return accepted
    }

    // MARK: What is done

    private func start(_ job: PathJob) {
        guard job.isAccepted, job.blockers == 0, !job.isStarted else { return }
        job.isStarted = true
        switch job.work {
        case .save(let snapshot): write(job, snapshot, target: 0)
        case .remove(let recursively): remove(job, recursively: recursively)
        case .commit(let replaces, let files, let seconds):
            commit(job, replaces: replaces, files: files, until: job.acceptedSeconds + seconds)
        }
    }

    private func event(_ kind: CheckpointEvent.Kind, of job: PathJob, _ error: PosixError? = nil) -> CheckpointEvent {
        var event = CheckpointEvent(kind, sequence: job.sequence)
        event.target = job.target
        event.path = job.snapshot == nil ? job.shown : job.paths[job.target].text
        event.bytes = job.snapshot?.byteCount(of: job.target)
        event.error = error.map { ErrorMessage(WireError(.storage, $0.description, errno: $0.errno)) }
        return event
    }

    /// Work on storage, when it is its session's turn there, as often as that may help.
    private func run<Value: Sendable>(
        _ job: PathJob, at place: DiskQueues.Place, _ operation: String, _ subject: String,
        _ work: @escaping @Sendable () throws(PosixError) -> Value, progress: @escaping @Sendable () -> UInt64,
        ended: @escaping @Sendable @DaemonActor (Result<Value, PosixError>) -> Void
    ) {
        let session = job.session
        session.enter(place) {
            job.storage.run(
                at: place, operation, subject, work, progress: progress,
                refused: { error in
                    self.stall(job, error)
                    // Else it still runs, and is silent.
                    if job.storage.isWaiting { session.leave(place) }
                },
                again: { self.run(job, at: place, operation, subject, work, progress: progress, ended: ended) },
                ended: { result in
                    session.leave(place)
                    ended(result)
                })
        }
    }

    private func stall(_ job: PathJob, _ error: PosixError) {
        let event = event(.stalled, of: job, error)
        measures.stalled(error)
        emit(.stalled(path: event.path ?? "", reason: error.description), job)
        job.events(event)
    }

    private func emit(_ what: RunEvent.What, _ job: PathJob) {
        report(RunEvent(runID: job.session.name.runID, what: what))
    }

    /// What the job, or one of its files, has come to.
    /// - Parameter fileCount: how many files became durable with it.
    private func conclude(_ job: PathJob, _ error: PosixError?, fileCount: Int = 0) {
        let event = event(error == nil ? .durable : .failed, of: job, error)
        let path = job.snapshot == nil ? job.paths[job.paths.count - 1] : job.paths[job.target]
        if let error {
            outcomes.failed(path.text, error)
            measures.failed(error)
            emit(.failed(path: path.text, reason: error.description), job)
            recordFailure(error, of: job.session, at: path)
            if case .remove = job.work {} else { job.session.failures[path] = (job.sequence, error) }
        } else {
            outcomes.becameDurable(count: fileCount)
            if job.snapshot == nil {
                let gone = job.paths[0]
                job.session.failures = job.session.failures.filter {
                    $0.key != path && !$0.key.isWithin(gone)
                }
                let root = job.session.root.identity
                failed = failed.filter { key, _ in
                    key.root != root || !job.paths.contains { key.path.isWithin($0) }
                }
            } else {
                failed[job.session.key(path)] = nil
                job.session.failures[path] = nil
            }
        }
        job.last.append(event)
        job.events(event)
    }

    private func recordFailure(_ error: PosixError, of session: PathSession, at path: AbsolutePath) {
        position += 1
        failed[session.key(path)] = (error, session.id, position)
        if failed.count > Limits.pathsRemembered, let oldest = failed.min(by: { $0.value.position < $1.value.position })
        {
            failed[oldest.key] = nil
        }
    }

    private func noteNewest(_ path: AbsolutePath, _ job: PathJob, isTree: Bool) {
        position += 1
        newest[job.session.key(path)] = (job.session.id, job.sequence, isTree, position)
        if newest.count > Limits.pathsRemembered, let oldest = newest.min(by: { $0.value.position < $1.value.position })
        {
            newest[oldest.key] = nil
        }
    }

    /// Whether the path holds, or was removed by, something newer of the same session.
    private func isSuperseded(_ path: AbsolutePath, by job: PathJob) -> Bool {
        path.way.contains { above in
            guard let found = newest[job.session.key(above)], found.session == job.session.id else { return false }
            return found.sequence > job.sequence && (above == path || found.isTree)  // guard: files-late-save (never)
        }
    }

    private func end(_ job: PathJob) {
        var released = CheckpointEvent(.released, sequence: job.sequence)
        guard let snapshot = job.snapshot else { return finish(job, released) }
        released.buffer = snapshot.buffer
        // Before the client has its buffer back, as for a run's saves.
        keeper.forget(snapshot, session: job.session.id) { isForgotten in
            if !isForgotten { released.buffer = nil }
            self.budget.release(snapshot.memoryByteCount)
            self.outcomes.saveEnded(durableByteCount: job.durableByteCount)
            self.finish(job, released)
        }
    }

    private func finish(_ job: PathJob, _ released: CheckpointEvent) {
        job.last.append(released)
        job.session.end(job)
        jobs.removeAll { $0 === job }
        job.events(released)
        let (dependents, waiters) = (job.dependents, job.waiters + job.ownWaiters)
        (job.dependents, job.waiters, job.ownWaiters) = ([], [], [])
        for next in dependents {
            next.blockers -= 1
            start(next)
        }
        for waiter in waiters { waiter() }
        forget(job.session)
    }

    // MARK: A save

    private func write(_ job: PathJob, _ snapshot: Snapshot, target index: Int) {
        guard index < snapshot.targets.count, let file = snapshot.targets[index].file else { return end(job) }
        job.target = index
        let (path, target) = (job.paths[index], snapshot.targets[index])
        if isSuperseded(path, by: job) {
            conclude(job, nil)
            return write(job, snapshot, target: index + 1)
        }
        job.writes += 1
        sendProgress(job, snapshot, job.writes, nil)
        let place = file.device.map { DiskQueues.Place.device($0) } ?? .path(path.directory)
        let start = Clock.monotonicSeconds
        let (directories, root, mask) = (directories, job.session.root, (file.umask ?? fileModeMask) & 0o777)
        let written = event(.written, of: job)
        // What a daemon before this one has written there, the file says.
        let isKnown = newest[job.session.key(path)] != nil
        let mark = SaveMark(session: job.session.id, sequence: job.sequence)
        let draft =
            index < snapshot.targets.count - 1
            ? nil
            : vault.begin(
                .file(job.session.key(path)), byteCount: snapshot.byteCount(of: index), session: job.session.id)
        run(
            job, at: place, "write", path.text,
            { () throws(PosixError) -> FileStamp? in
                try directories.use(path, of: root, mask: mask, device: file.device) { directory throws(PosixError) in
                    if !isKnown, try mark.isSuperseded(target.fileName, in: directory) { return nil }
                    let file = try snapshot.write(index, in: directory, mark: mark, image: draft?.begin()) {
                        DaemonActor.enter { job.events(written) }
                    }
                    return draft == nil ? nil : try? FileStamp(of: file)
                }
            }, progress: { snapshot.bytesWritten },
            ended: { result in
                var failure: PosixError?
                switch result {
                case .failure(let error):
                    failure = error
                    self.vault.drop(draft)
                case .success(let stamp):
                    self.vault.keep(draft, stamp)
                    job.durableByteCount += target.byteCount
                    self.noteNewest(path, job, isTree: false)
                    self.measures.isDurable(
                        bytes: target.byteCount, acceptedSeconds: job.acceptedSeconds, startSeconds: start)
                    let microseconds = UInt64((Clock.monotonicSeconds - start) * 1e6)
                    self.emit(
                        .durable(path: path.text, bytes: snapshot.byteCount(of: index), microseconds: microseconds), job
                    )
                }
                self.conclude(job, failure, fileCount: failure == nil ? 1 : 0)
                self.write(job, snapshot, target: index + 1)
            })
    }

    private static let progressSeconds = 0.25

    /// As long as this write goes on; only where bytes have moved.
    private func sendProgress(_ job: PathJob, _ snapshot: Snapshot, _ write: Int, _ before: UInt64?) {
        DaemonActor.enter(after: Self.progressSeconds) {
            guard job.session.jobs[job.sequence] === job, job.writes == write else { return }
            let done = snapshot.bytesWritten(of: job.target)
            if done > 0, done != before {
                var event = self.event(.progress, of: job)
                event.bytesDone = done
                job.events(event)
            }
            self.sendProgress(job, snapshot, write, done)
        }
    }

    // MARK: A removal

    private func remove(_ job: PathJob, recursively: Bool) {
        let path = job.paths[0]
        if isSuperseded(path, by: job) {
            conclude(job, nil)
            return end(job)
        }
        // Those that it waits for have ended.
        let lost = job.session.failures.filter { failure in
            failure.value.sequence < job.sequence && job.after.contains { failure.key.isWithin($0) }
        }
        if let (missing, failure) = lost.min(by: { $0.value.sequence < $1.value.sequence }) {
            conclude(
                job,
                PosixError(
                    failure.error.errno,
                    "remove \(path.text), which stays, since \(missing.text) is missing: \(failure.error.operation)"))
            return end(job)
        }
        let (directories, root, moved) = (directories, job.session.root, Moved())
        run(
            job, at: .path(path.directory), "remove", path.text,
            { () throws(PosixError) in
                try directories.remove(path, of: root, recursively: recursively, moved)
            }, progress: { moved.count },
            ended: { result in
                var failure: PosixError?
                switch result {
                case .failure(let error): failure = error
                case .success:
                    self.noteNewest(path, job, isTree: true)
                    self.vault.forget(within: path, of: root.identity)
                }
                self.conclude(job, failure)
                self.end(job)
            })
    }

    // MARK: A commit

    private static let missingPauses = 0.05...1.0

    /// - Parameter until: for how long files that are missing are waited for, in monotonic seconds: others save them,
    ///   perhaps by another node's daemon.
    private func commit(
        _ job: PathJob, replaces: Bool, files: [String], until: Double, pause: Double = missingPauses.lowerBound
    ) {
        func tryAgain() {
            DaemonActor.enter(after: pause) {
                self.commit(
                    job, replaces: replaces, files: files, until: until,
                    pause: min(2 * pause, Self.missingPauses.upperBound))
            }
        }
        guard !jobs.contains(where: { job.waits(for: $0) }) else { return tryAgain() }
        let (from, to) = (job.paths[0], job.paths[1])
        // Those that came before it have ended: it waits for them.
        // guard: files-commit-of-a-lost-file (never: $0.value.sequence < job.sequence)
        let lost = job.session.failures.filter { $0.key.isWithin(from) && $0.value.sequence < job.sequence }
        if let (path, failure) = lost.min(by: { $0.value.sequence < $1.value.sequence }) {
            conclude(
                job,
                PosixError(
                    failure.error.errno,
                    "rename \(from.text) to \(to.text), since \(path.text) is missing: \(failure.error.operation)"))
            return end(job)
        }
        let (directories, root, moved) = (directories, job.session.root, Moved())
        let mark = "\(job.session.id) \(job.sequence)"
        run(
            job, at: .path(to.directory), "rename", "\(from.text) to \(to.text)",
            { () throws(PosixError) -> String? in
                try directories.commit(from, to: to, of: root, replaces: replaces, files: files, mark: mark, moved)
            }, progress: { moved.count },
            ended: { result in
                switch result {
                case .failure(let error): self.conclude(job, error)
                case .success(nil):
                    self.vault.rename(from, to: to, of: root.identity)
                    self.conclude(job, nil)
                case .success(let missing?):
                    let failure = self.failed.first { key, _ in
                        key.root == root.identity && key.path.text == "\(from.text)/\(missing)"
                    }
                    guard failure == nil, Clock.monotonicSeconds < until else {
                        let reason = failure.map { ": \($0.value.error.operation)" } ?? ""
                        self.conclude(
                            job,
                            PosixError(
                                failure?.value.error.errno ?? PosixError.missing("").errno,
                                "rename \(from.text) to \(to.text), since \(from.text)/\(missing) is not there\(reason)"
                            ))
                        break
                    }
                    self.letSavesGoFirst(job)
                    return tryAgain()
                }
                self.end(job)
            })
    }

    /// What comes after a commit may be what it waits for: a client that has lost its daemon sends it again.
    private func letSavesGoFirst(_ job: PathJob) {
        job.isWaiting = true
        let first = job.dependents.filter { job.waits(for: $0) }
        job.dependents.removeAll { job.waits(for: $0) }
        for next in first {
            next.blockers -= 1
            start(next)
        }
        let waiters = job.ownWaiters
        job.ownWaiters = []
        for waiter in waiters { waiter() }
    }
}
