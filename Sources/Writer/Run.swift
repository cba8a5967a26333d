// SPDX-License-Identifier: Apache-2.0
/// One run: its log, and its checkpoints on their way to the disk. Owned by the intake queue.
///
/// Jobs of a run go to the disk one at a time, in order: two saves of `latest` can't overtake one another. Runs take
/// turns on the disk queues, so none starves another. The log's way to safety is `RunLog`'s.
import Dispatch
public import Posix
public import Wire

public typealias EventSink = @Sendable @Intake (CheckpointEvent) -> Void

@Intake
public final class Run {
    public nonisolated let name: RunName
    /// Held while the run is live or has work, and no longer: an ended run must not pin its file system.
    private var directories: Directories?
    private let disks: DiskQueues
    /// For what is shown as it comes.
    private let eventDisks: DiskQueues
    private let keeper: any SnapshotKeeper
    private let report: @Sendable (RunEvent) -> Void

    public let log: RunLog
    public private(set) var state = RunStatus.State.running {
        didSet { if state != oldValue { observe(.state) } }
    }
    private var observers: [ObjectIdentifier: any RunObserver] = [:]
    private var story = CheckpointStory()
    /// Of the job that is on a disk queue.
    private var currentTarget = 0
    /// Writes of checkpoints so far, each try of each file.
    private var writes = 0
    /// The last ones.
    public private(set) var failures: [Waited.Failure] = []
    private var failureCount = 0
    private var knownFailureCount = 0
    public private(set) var durableCount = 0
    private var durableByteCount: UInt64 = 0
    /// When the last file became durable, in monotonic seconds.
    public private(set) var lastDurableSeconds: Double?
    private var jobStalled: Waited.Failure?
    public var peer: PeerCredentials
    public var node: String
    public private(set) var openConnections = 0
    private var logBringer: LogBringer?
    /// Each rank of a job is one process.
    private var holders: [Int: Holder] = [:]
    /// Whose the names of files are: the first rank's that saved under them, as long as anybody has this run open.
    private var owners: [ByteName: Int] = [:]
    private var saves = SaveHistory()
    private var tensorboard: TensorBoardLog?
    private let retention: Retention
    /// The `open_run` of rank 0, or of the only process that has opened this run.
    private var brought: OpenRun?
    private let budget: SnapshotBudget
    private let measures: Measures

    /// The process that is a rank of this run's job.
    struct Holder {
        let process: PeerProcess
        fileprivate(set) var sessions: Set<String>
        fileprivate(set) var connections: Int

        /// Whether an `open_run` is this holder's own, on another connection.
        func isSame(as peer: PeerCredentials, session: String) -> Bool {
            process.isSame(as: peer.process) || sessions.contains(session)
        }
    }

    private enum Job {
        case checkpoint(SaveJob)
        case entries(LogFile)
    }

    /// A log on its way to its file.
    private struct LogFile: Sendable {
        let columns: LogColumns
        let owner: LogOwner?
        /// Calls back when the file may be written.
        let start: @Sendable @Intake (@escaping @Sendable @Intake () -> Void) -> Void
        let completion: @Sendable @Intake (PosixError?) -> Void
    }
    private var jobs: [Job] = []
    private var isBusy = false
    /// The way of all files but the journal: what fails there may be gone for the journal too.
    private lazy var storage = StorageJob(disks) { [weak self] in
        self?.directories?.letGo()
        self?.log.storageFailed()
    }
    private var idleWaiters: [@Sendable @Intake () -> Void] = []

    init(
        name: RunName, disks: DiskQueues, eventDisks: DiskQueues, log: RunLog, keeper: any SnapshotKeeper,
        peer: PeerCredentials, node: String, retention: Retention, budget: SnapshotBudget, measures: Measures,
        report: @escaping @Sendable (RunEvent) -> Void
    ) {
        self.budget = budget
        self.retention = retention
        self.measures = measures
        self.report = report
        self.name = name
        self.disks = disks
        self.eventDisks = eventDisks
        self.log = log
        self.keeper = keeper
        self.peer = peer
        self.node = node
        log.changed = { [weak self] in self?.logged($0) }
        log.warn = { [name, report] in report(RunEvent(runID: name.runID, what: .warning($0))) }
    }

    // MARK: Sessions

    /// A connection joins. With `found`, the journal that a daemon before this one left.
    /// - Parameter entries: what entries.th has, where the session goes on with it.
    func attach(
        _ message: OpenRun, peer: PeerCredentials, directories: Directories, found: FoundJournal?,
        entries: FoundEntries? = nil
    ) {
        let isHeld = isLive
        isAwaited = false
        openConnections += 1
        let rank = message.rank ?? 0
        if rank == 0 || holders.isEmpty {
            self.peer = peer
            brought = message
        }
        var holder = holders[rank] ?? Holder(process: peer.process, sessions: [], connections: 0)
        holder.sessions.insert(message.session)
        holder.connections += 1
        holders[rank] = holder
        state = .running
        let directories = take(directories)
        log.register(directories.tracker)
        tell(.opened(pid: peer.pid))
        guard message.log ?? true else { return }
        if let origin = found?.replayed.origin { logBringer = LogBringer(origin) }
        log.take(found: found, entries: entries, in: directories.tracker)
        guard mayBringLog(message, isHeld: isHeld) else { return }
        logBringer = LogBringer(rank: rank, process: peer.process)
        let isNewSession = message.session != log.session
        if let left = log.open(message, pid: peer.pid, in: directories.tracker) { save(left) }
        show(message, in: directories.tracker, isNewSession: isNewSession, keeping: message.resumeAt)
    }

    /// Who has brought the log last.
    private struct LogBringer {
        let rank: Int
        let process: PeerProcess

        init(rank: Int, process: PeerProcess) {
            self.rank = rank
            self.process = process
        }

        init(_ origin: JournalFormat.Origin) {
            self.init(
                rank: origin.run.rank ?? 0, process: PeerProcess(pid: origin.pid, startTicks: origin.pidStart))
        }
    }

    /// A run has one log. Its own session goes on with it; rank 0, and the rank that brings it, may take it over for a new
    /// session. A session that it was taken from does not get it back by connecting again.
    /// - Parameter isHeld: somebody else has the run open, or is waited for.
    private func mayBringLog(_ message: OpenRun, isHeld: Bool) -> Bool {
        if log.session == message.session { return true }
        if log.wasTaken(from: message.session) { return false }
        guard let logBringer, isHeld, message.rank ?? 0 != 0 else { return true }
        // A rank is one process (`holder`).
        return logBringer.rank == message.rank || logBringer.process.hasEnded
    }

    /// Those that are held already stay: what waits for the disk knows them.
    private func take(_ new: Directories) -> Directories {
        guard let directories else {
            self.directories = new
            return new
        }
        directories.home.adoptLock(of: new.home)
        return directories
    }

    /// The identity of the run's own directory, as long as the directory is held.
    var identity: OwnedFD.Identity? { directories?.home.identity }
    /// Whether this daemon has locked it.
    var isLocked: Bool { directories?.home.isLocked ?? false }

    /// Another session's log that was never made a file: it becomes one before the new one's journal takes the place of its own.
    private func save(_ left: LeftLog) {
        submit(
            .entries(
                LogFile(columns: left.columns, owner: left.owner) { start in
                    // A journal that is older than the file would be taken for a newer one.
                    if let journal = left.journal { journal.sync { _ in start() } } else { start() }
                } completion: { error in
                    self.log.leftIsEnded(isInFile: error == nil)
                }))
    }

    private func logged(_ change: RunChange) {
        switch change {
        case .rows, .added:
            // Behind a `finish` the log goes on, and becomes a file again.
            guard state == .finished, openConnections > 0 else { break }
            state = .running
            if let directories {
                tensorboard?.open(self, in: directories.tracker, isNewSession: false, keeping: nil)
            }
        case .restarted, .checkpoint, .state: break
        }
        observe(change)
    }

    /// - Parameter message: of who brings the log, and whether TensorBoard shows it.
    private func show(_ message: OpenRun, in tracker: RunDirectory, isNewSession: Bool, keeping: Int64?) {
        guard message.tensorboard == true else { return }
        let shown =
            tensorboard
            ?? TensorBoardLog(disks: eventDisks) { [name, report] in
                report(RunEvent(runID: name.runID, what: .warning($0)))
            }
        shown.open(
            self, in: tracker, isNewSession: isNewSession || tensorboard == nil,
            keeping: isNewSession ? keeping : .max)
        tensorboard = shown
        add(shown)
    }

    /// Calls back when an ended run's event files are written, or given up.
    func whenShown(_ callback: @escaping @Sendable @Intake () -> Void) {
        if let tensorboard, state != .running { tensorboard.whenDone(callback) } else { callback() }
    }

    var isShown: Bool { tensorboard?.isDone ?? true }

    /// A run that a daemon before this one had, brought back without a connection.
    /// - Parameter message: of who brought it then.
    func restore(_ directories: Directories, _ message: OpenRun, _ found: FoundJournal?) {
        brought = message
        let directories = take(directories)
        log.registration.want(true)
        log.register(directories.tracker)
        if let found {
            // Its checkpoints may have come back, and ended, before its log was read.
            state = .running
            logBringer = LogBringer(found.replayed.origin)
            log.take(found: found, entries: nil, in: directories.tracker)
            show(found.replayed.origin.run, in: directories.tracker, isNewSession: false, keeping: nil)
        }
    }

    /// The process that is this rank of the run's job.
    func holder(ofRank rank: Int) -> Holder? { holders[rank] }

    /// A connection is gone. The last one of a run with an unfinished log leaves it interrupted: its log is written.
    /// - Parameter keepsJournal: the daemon leaves, and its successor goes on with the log.
    public func detach(rank: Int, clean: Bool, keepsJournal: Bool) {
        openConnections -= 1
        if var holder = holders[rank] {
            holder.connections -= 1
            holders[rank] = holder.connections > 0 ? holder : nil
        }
        guard openConnections == 0 else { return }
        owners = [:]
        logBringer = nil
        peer.process = peer.process.noted
        isClosedCleanly = clean
        end(clean: clean, keepsJournal: keepsJournal)
    }

    /// Nobody brings this run any more.
    func end(clean: Bool, keepsJournal: Bool = false) {
        if state == .running {
            state = clean && !log.hasUnwrittenRows ? .finished : .interrupted
            if log.hasUnwrittenRows { writeEntries(keepsJournal: keepsJournal) { _ in } }
            tell(.ended(state))
        }
        letGoOfDirectories()
    }

    private func letGoOfDirectories() {
        guard openConnections == 0, jobs.isEmpty, !isAwaited else { return }
        story.shorten()
        log.letGo(of: directories?.tracker)
        directories = nil
        forgetLog()
    }

    /// An ended run is listed for long; its log, which may be large, is kept only as long as its trainer may come back with the same
    /// session after a lost connection.
    private func forgetLog() {
        guard !isLive, jobs.isEmpty, !log.hasUnwrittenRows, log.columns.keys.count > 0, !isFollowedFromBehind
        else { return }
        if log.isSettled, isClosedCleanly || log.isOrphaned {
            log.forgetRows()
            Process.giveBackFreeMemory()
        } else if !isLookingAfterLog {
            isLookingAfterLog = true
            Intake.enter(after: Self.orphanSeconds) { [weak self] in
                self?.isLookingAfterLog = false
                self?.forgetLog()
            }
        }
    }

    private static let orphanSeconds = 5.0
    private var isLookingAfterLog = false
    /// The last connection said goodbye.
    private var isClosedCleanly = false

    /// Brought back from a daemon before this one, and its trainer lives: it will connect again.
    var isAwaited = false

    public var isLive: Bool { openConnections > 0 || isAwaited }
    public var isIdle: Bool { jobs.isEmpty }
    /// Twice what saves may be: the files of logs come on top.
    var isOverloaded: Bool { jobs.count >= 2 * Limits.savesInFlightPerRun }
    public var stalled: String? { jobStalled?.message ?? log.stalled }

    /// Files that storage refuses for now: the one that others wait behind, and the log's journal.
    public var stalls: [Waited.Failure] {
        let journal = log.stalled.map {
            Waited.Failure(path: "\(name.directory)/tracker/\(Journal.fileName)", message: $0)
        }
        return [jobStalled, journal].compactMap { $0 }
    }

    private func tell(_ what: RunEvent.What) { report(RunEvent(runID: name.runID, what: what)) }

    /// Lets go of a log that is in its file, unless its trainer lives and may have lost no more than its connection.
    func forgetRows() {
        guard state == .finished || peer.process.hasEnded, !isFollowedFromBehind else { return }
        log.forgetRows()
    }

    /// Files that are not durable yet.
    public var pendingPaths: [String] {
        jobs.flatMap { job in
            switch job {
            case .checkpoint(let save):
                save.snapshot.targets.map { "\(name.directory)/checkpoints/\($0.fileName)" }
            case .entries: ["\(name.directory)/tracker/\(EntriesFile.name)"]
            }
        }
    }

    /// Failures since `forgetFailures`: those before were told to whom they concerned.
    public var newFailures: [Waited.Failure] { Array(failures.suffix(failureCount - knownFailureCount)) }
    public func forgetFailures() { knownFailureCount = failureCount }

    /// Given up.
    private func fails(_ path: String, _ error: PosixError) {
        failureCount += 1
        measures.failed(error)
        tell(.failed(path: path, reason: error.description))
        failures.append(Waited.Failure(path: path, message: error.description))
        if failures.count > Limits.failuresRemembered { failures.removeFirst() }
    }

    // MARK: Followers

    public func add(_ observer: any RunObserver) { observers[ObjectIdentifier(observer)] = observer }

    public func remove(_ observer: any RunObserver) {
        observers[ObjectIdentifier(observer)] = nil
        hasRead()
    }

    private func observe(_ change: RunChange) {
        for observer in observers.values { observer.changed(self, change) }
    }

    /// A follower has read what it was behind, or has gone: a log that was kept for it may go.
    public func hasRead() { forgetLog() }

    private var isFollowedFromBehind: Bool { observers.values.contains { $0.wantsRows } }
    var isFollowed: Bool { !observers.isEmpty }

    /// The last ones, oldest first.
    public var checkpoints: [CheckpointInfo] { story.all }

    /// The file that is on its way to the disk now, with its progress.
    public var checkpointInProgress: CheckpointInfo? {
        guard isBusy, case .checkpoint(let job)? = jobs.first, currentTarget < job.snapshot.targets.count
        else { return nil }
        let file = job.snapshot.targets[currentTarget].fileName
        var info = story.all.last { $0.sequence == job.snapshot.sequence && $0.file.isSame(as: file) }
        guard let state = info?.state, [.writing, .written, .stalled].contains(state) else { return nil }
        info?.bytesDone = job.snapshot.bytesWritten(of: currentTarget)
        return info
    }

    private func note(
        _ job: SaveJob, _ target: Int, _ state: CheckpointInfo.State, done: UInt64?,
        _ error: PosixError? = nil
    ) {
        let info = story.changed(job, target: target, to: state, done: done, error: error?.description)
        if let info { observe(.checkpoint(info)) }
    }

    // MARK: Log

    /// Answers once entries.th, and every checkpoint before it, is durable or failed.
    public func finish(
        session: String, completion: @escaping @Sendable @Intake (Result<Finished, WireError>) -> Void
    ) throws(WireError) {
        guard !isOverloaded else {
            throw WireError(
                .tooMany, "\(jobs.count) files of run \(name.runID) are on their way; wait for one")
        }
        let rows = log.columns.count
        guard rows > 0, session == log.session else {
            if openConnections == 1 { state = .finished }
            whenIdle { completion(.success(Finished(entriesPath: nil, entries: 0))) }
            return
        }
        let path = "\(name.directory)/tracker/\(EntriesFile.name)"
        writeEntries(keepsJournal: false) { error in
            if let error {
                completion(.failure(WireError(.storage, error.description, errno: error.errno)))
            } else {
                if !self.log.hasUnwrittenRows { self.state = .finished }
                completion(.success(Finished(entriesPath: path, entries: rows)))
            }
        }
    }

    private func writeEntries(
        keepsJournal: Bool, _ completion: @escaping @Sendable @Intake (PosixError?) -> Void
    ) {
        let (owner, turn) = (log.owner, log.turn)
        submit(
            .entries(
                LogFile(columns: log.columns, owner: owner) { start in
                    // The journal first: a daemon that dies behind entries.th would otherwise find an older log in it.
                    self.log.syncForFile(of: turn, start)
                } completion: { error in
                    if error == nil, !keepsJournal { self.log.isInFile(owner) }
                    completion(error)
                    self.letGoOfDirectories()
                }))
    }

    // MARK: Checkpoints

    /// Takes a snapshot, or finds that it has it already: a client that lost its connection sends again what it has not
    /// seen the end of.
    public func save(
        _ payload: SavePayload, fd: OwnedFD, session: String, rank: Int, connection: UInt64,
        events: @escaping EventSink
    ) throws(WireError) {
        guard payload.sequence > 0 else {
            throw WireError(.badSequence, "a save has the sequence 0; a session counts from 1")
        }
        if let known = saves.job(session, payload.sequence) {
            guard known.snapshot.fingerprint == payload.fingerprint else {
                throw WireError(
                    .badSequence,
                    "the sequence \(payload.sequence) is that of another save, which is on its way: that one goes on, and nothing "
                        + "of this one was taken. Each save has a number of its own")
            }
            known.events = events
            known.connection = connection
            if known.isAccepted { events(accepted(known.snapshot)) }
            return
        }
        if let ended = saves.ended(session, payload.sequence) {
            // A connection on which it has ended has heard so: what comes there is another save, whatever it looks like.
            guard ended.fingerprint == payload.fingerprint, ended.connection != connection else {
                throw WireError(
                    .badSequence,
                    "the sequence \(payload.sequence) is that of a save which has ended: nothing of this one was taken. Each save "
                        + "has a number of its own")
            }
            events(CheckpointEvent(.accepted, sequence: payload.sequence))
            for event in ended.events { events(event) }
            return
        }
        guard jobs.count < Limits.savesInFlightPerRun else {
            throw WireError(.busy, "\(jobs.count) saves of run \(name.runID) are in flight already")
        }
        let snapshot = try Snapshot(payload, in: "\(name.directory)/checkpoints", fd: fd)
        try check(snapshot.targets, by: rank)
        let held: UInt64 = jobs.reduce(0) { sum, job in
            if case .checkpoint(let save) = job { sum + save.snapshot.memoryByteCount } else { sum }
        }
        try budget.check(snapshot.memoryByteCount, of: name.runID, holding: held)
        for target in snapshot.targets { owners[ByteName(target.fileName)] = rank }
        let job = SaveJob(snapshot, session: session, connection: connection, events: events)
        budget.take(snapshot.memoryByteCount)
        saves.begin(job)
        submit(.checkpoint(job))
        keeper.keep(
            job.snapshot, payload, of: name, root: directories?.home.anchor, brought: brought, session: session,
            peer: peer
        ) { self.accept(job) }
    }

    /// Whether a save of this number is on its way: events that bear the number are its own.
    public func isSaving(_ session: String, _ sequence: UInt64) -> Bool { saves.job(session, sequence) != nil }

    /// Ranks that save different parts under one name would replace one another's file in silence.
    private func check(_ targets: [Snapshot.Target], by rank: Int) throws(WireError) {
        for target in targets {
            guard let owner = owners[ByteName(target.fileName)], owner != rank else { continue }
            throw WireError(
                .nameInUse,
                "rank \(owner) has saved \(target.fileName) in run \(name.runID), and rank \(rank) would replace it: nothing of "
                    + "rank \(rank)'s save was written. Put the rank into the name, or save on rank 0 only, or save sharded state "
                    + "with noether_writer.dcp")
        }
    }

    /// A snapshot that a daemon before this one had accepted.
    func restore(_ snapshot: Snapshot, session: String) {
        let job = SaveJob(snapshot, session: session) { _ in }
        guard saves.job(session, snapshot.sequence) == nil else { return }
        budget.take(snapshot.memoryByteCount)
        saves.begin(job)
        submit(.checkpoint(job))
        accept(job)
    }

    private func accept(_ job: SaveJob) {
        job.isAccepted = true
        job.acceptedSeconds = Clock.monotonicSeconds
        measures.saves += 1
        Faults.pass("save.accepted")
        job.events(accepted(job.snapshot))
        for target in job.snapshot.targets.indices {
            observe(.checkpoint(story.accepted(job, target: target)))
        }
        if !isBusy { startNext() }
    }

    private func accepted(_ snapshot: Snapshot) -> CheckpointEvent {
        var accepted = CheckpointEvent(.accepted, sequence: snapshot.sequence)
        accepted.bytes = snapshot.byteCount
        return accepted
    }

    public var status: RunStatus {
        var checkpoints = RunStatus.Checkpoints()
        var written: UInt64 = 0
        for case .checkpoint(let job) in jobs {
            checkpoints.inFlight += job.snapshot.targets.count
            checkpoints.bytesInFlight += job.snapshot.byteCount
            written += job.snapshot.bytesWritten
        }
        checkpoints.bytesWritten = written
        checkpoints.durable = durableCount
        checkpoints.failed = failureCount
        checkpoints.bytesDurable = durableByteCount
        var status = RunStatus(
            runID: name.runID, runDirectory: name.directory, state: state, pid: peer.pid, node: node,
            entries: log.rowCount, lastUpdate: log.lastUpdate, checkpoints: checkpoints,
            stalled: stalled)
        status.lastUpdateAt = log.lastWallTime
        (status.logWrittenUpdate, status.logDurableUpdate) = (log.writtenUpdate, log.durableUpdate)
        status.writing = checkpointInProgress
        return status
    }

    /// Calls back when everything submitted so far has ended.
    public func whenIdle(_ callback: @escaping @Sendable @Intake () -> Void) {
        if jobs.isEmpty { callback() } else { idleWaiters.append(callback) }
    }

    // MARK: The way to the disk

    private func submit(_ job: Job) {
        if case .checkpoint(let save) = job {
            // What is sent again after a reconnect goes before what came after it the first time.
            let later = jobs.indices.dropFirst(isBusy ? 1 : 0).first {
                if case .checkpoint(let other) = jobs[$0] { return other.isAfter(save) }
                return false
            }
            jobs.insert(job, at: later ?? jobs.endIndex)
        } else {
            jobs.append(job)
        }
        if !isBusy { startNext() }
    }

    private func startNext() {
        // Whoever was told of a job's end may have begun the next one already: a session that ends with its connection gone writes
        // its log. That job must not run twice.
        guard !isBusy else { return }
        guard let job = jobs.first else {
            let waiters = idleWaiters
            idleWaiters = []
            for waiter in waiters { waiter() }
            return letGoOfDirectories()
        }
        guard let directories else { preconditionFailure("a job of a run without directories") }
        switch job {
        case .checkpoint(let save):
            guard save.isAccepted else { return }
            isBusy = true
            write(save, target: 0, in: directories.checkpoints)
        case .entries(let log):
            isBusy = true
            log.start { self.write(log, in: directories.tracker) }
        }
    }

    private func endJob() {
        isBusy = false
        jobs.removeFirst()
    }

    private func end(_ job: SaveJob) {
        var released = CheckpointEvent(.released, sequence: job.snapshot.sequence)
        released.buffer = job.snapshot.buffer
        // Before the client has its buffer back: a keeper that still gave it to a next daemon would have that one write what the
        // client puts there meanwhile over a file that was good.
        keeper.forget(job.snapshot, session: job.session) { isForgotten in
            if !isForgotten { released.buffer = nil }
            job.last.append(released)
            self.budget.giveBack(job.snapshot.memoryByteCount)
            // Until now it counted among the bytes in flight.
            self.durableByteCount += job.durable.reduce(0) { $0 + $1.byteCount }
            self.saves.end(job)
            self.endJob()
            job.events(released)
            self.removeOlder(than: job.durable[...])
        }
    }

    /// What has had its time behind these files. The client has its answers; the run's next file waits, so that none is written
    /// under a name that is being removed.
    private func removeOlder(than targets: ArraySlice<Snapshot.Target>) {
        let retention = brought.map { self.retention.with($0) } ?? retention
        guard retention.keepLast > 0, let target = targets.first, let directory = directories?.checkpoints
        else { return startNext() }
        isBusy = true
        disks.run(
            at: directory.place,
            { () -> (removed: [String], problem: String?) in
                do throws(PosixError) {
                    guard let found = try directory.find(creates: false) else { return ([], nil) }
                    return retention.apply(behind: target, in: found)
                } catch {
                    return ([], "older checkpoints were not removed: \(error)")
                }
            }
        ) { result in
            self.measures.removedCheckpoints += UInt64(result.removed.count)
            for name in result.removed {
                self.tell(.removed(path: "\(directory.path)/\(name)", successor: target.fileName))
            }
            if let problem = result.problem { self.tell(.warning(problem)) }
            self.isBusy = false
            self.removeOlder(than: targets.dropFirst())
        }
    }

    /// Storage refuses, or does not answer: who waits hears why.
    private func stalls(_ path: String, _ error: PosixError) {
        jobStalled = Waited.Failure(path: path, message: error.description)
        measures.stalled(error)
        tell(.stalled(path: path, reason: error.description))
    }

    private func write(_ job: SaveJob, target index: Int, in directory: RunDirectory) {
        let snapshot = job.snapshot
        guard index < snapshot.targets.count else { return end(job) }
        let target = snapshot.targets[index]
        let path = "\(directory.path)/\(target.fileName)"
        @Sendable func event(_ kind: CheckpointEvent.Kind, _ error: PosixError? = nil) -> CheckpointEvent {
            var event = CheckpointEvent(kind, sequence: snapshot.sequence)
            (event.target, event.path, event.bytes) = (index, path, snapshot.byteCount(of: index))
            event.error = error.map { ErrorMessage(WireError(.storage, $0.description, errno: $0.errno)) }
            return event
        }
        func ended(_ event: CheckpointEvent) {
            job.last.append(event)
            job.events(event)
            write(job, target: index + 1, in: directory)
        }
        let start = Clock.monotonicSeconds
        if saves.isSuperseded(target.fileName, by: job) {
            note(job, index, .durable, done: nil)
            return ended(event(.durable))
        }
        currentTarget = index
        note(job, index, .writing, done: 0)
        writes += 1
        tellProgress(job, index, event(.progress), writes)
        storage.run(
            at: directory.place, "write \(path)",
            { () throws(PosixError) in
                try directory.use { directory throws(PosixError) in
                    try snapshot.write(index, in: directory) {
                        Intake.enter {
                            job.events(event(.written))
                            self.note(job, index, .written, done: nil)
                        }
                    }
                }
            }, progress: { snapshot.bytesWritten },
            refused: { error in
                self.note(job, index, .stalled, done: error.isSilence ? nil : 0, error)
                self.stalls(path, error)
                job.events(event(.stalled, error))
            },
            again: {
                self.write(job, target: index, in: directory)
            },
            ended: { result in
                if case .failure(let error) = result {
                    self.note(job, index, .failed, done: 0, error)
                    self.fails(path, error)
                    return ended(event(.failed, error))
                }
                self.jobStalled = nil
                self.durableCount += 1
                self.lastDurableSeconds = Clock.monotonicSeconds
                self.saves.wrote(target.fileName, job)
                self.measures.isDurable(
                    bytes: target.byteCount, acceptedSeconds: job.acceptedSeconds, startSeconds: start)
                let microseconds = UInt64((Clock.monotonicSeconds - start) * 1e6)
                self.tell(.durable(path: path, bytes: snapshot.byteCount(of: index), microseconds: microseconds))
                job.durable.append(target)
                self.note(job, index, .durable, done: nil)
                ended(event(.durable))
            })
    }

    private static let progressSeconds = 0.25

    /// As long as this write goes on; only where bytes have moved.
    private func tellProgress(_ job: SaveJob, _ index: Int, _ last: CheckpointEvent, _ write: Int) {
        Intake.enter(after: Self.progressSeconds) {
            guard self.isBusy, self.writes == write, case .checkpoint(let current)? = self.jobs.first,
                current === job
            else { return }
            let done = job.snapshot.bytesWritten(of: index)
            var event = last
            event.bytesDone = done
            if done > 0, done != last.bytesDone { job.events(event) }
            self.tellProgress(job, index, event, write)
        }
    }

    /// - Parameter hasEntries: entries.th is there, and only the summary is left.
    private func write(_ log: LogFile, in directory: RunDirectory, hasEntries: Bool = false) {
        let path = "\(directory.path)/\(hasEntries ? SummaryFile.name : EntriesFile.name)"
        storage.run(
            at: directory.place, "write \(path)",
            { () throws(PosixError) in
                try directory.use { directory throws(PosixError) in
                    if hasEntries {
                        try SummaryFile.write(log.columns, in: directory)
                    } else {
                        try EntriesFile.write(log.columns, of: log.owner, in: directory)
                    }
                }
            },
            refused: {
                self.stalls(path, $0)
            },
            again: {
                self.write(log, in: directory, hasEntries: hasEntries)
            },
            ended: { result in
                var failure: PosixError?
                if case .failure(let error) = result {
                    failure = error
                    self.fails(path, error)
                } else {
                    self.jobStalled = nil
                    guard hasEntries else {
                        self.measures.logFiles += 1
                        return self.write(log, in: directory, hasEntries: true)
                    }
                }
                self.endJob()
                // The log itself is safe without its summary.
                log.completion(hasEntries ? nil : failure)
                self.startNext()
            })
    }
}
