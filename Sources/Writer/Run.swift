// SPDX-License-Identifier: Apache-2.0
/// One run: who brings it, its log and its checkpoints. Owned by the daemon's queue.
///
/// What is written and in which order is `SaveQueue`'s, and the log's way to safety `RunLog`'s.
import Dispatch
public import Posix
public import Wire

public typealias EventSink = @Sendable @DaemonActor (CheckpointEvent) -> Void

@DaemonActor
public final class Run {
    public nonisolated let name: RunName
    /// Held while the run is live or has work, and no longer: an ended run must not pin its file system.
    private(set) var directories: Directories?
    /// Open on the file system that takes its checkpoints; nil while the run has no work, or its storage is being found.
    public var storage: OwnedFD? { directories?.checkpoints.descriptor }
    /// For what is shown as it comes.
    private let eventDisks: DiskQueues
    private let keeper: any SnapshotKeeper
    private let report: @Sendable (RunEvent) -> Void

    public let log: RunLog
    public private(set) var state = RunStatus.State.running {
        didSet { if state != oldValue { notifyObservers(.state) } }
    }
    private var observers: [ObjectIdentifier: any RunObserver] = [:]
    private let queue: SaveQueue
    public var peer: PeerCredentials
    public var node: String
    public private(set) var openConnections = 0
    private var logBringer: LogBringer?
    /// Each rank of a job is one process.
    private var holders: [Int: Holder] = [:]
    /// Whose the names of files are: the first rank's that saved under them, as long as anybody has this run open.
    private var owners: [ByteName: Int] = [:]
    private var tensorboard: TensorBoardLog?
    private let ownRetention: Retention
    /// The `open_run` of rank 0, or of the only process that has opened this run.
    private var brought: RunIdentity?

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

    init(
        name: RunName, disks: DiskQueues, eventDisks: DiskQueues, log: RunLog, keeper: any SnapshotKeeper,
        peer: PeerCredentials, node: String, retention: Retention, budget: SnapshotBudget, vault: SnapshotVault,
        measures: Measures,
        report: @escaping @Sendable (RunEvent) -> Void
    ) {
        queue = SaveQueue(name, disks: disks, keeper: keeper, budget: budget, vault: vault, measures: measures)
        ownRetention = retention
        self.report = report
        self.name = name
        self.eventDisks = eventDisks
        self.log = log
        self.keeper = keeper
        self.peer = peer
        self.node = node
        queue.owner = self
        log.run = self
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
            brought = RunIdentity(message)
        }
        var holder = holders[rank] ?? Holder(process: peer.process, sessions: [], connections: 0)
        holder.sessions.insert(message.session)
        holder.connections += 1
        holders[rank] = holder
        state = .running
        let directories = adopt(directories)
        log.register(directories.tracker)
        emit(.opened(pid: peer.pid))
        guard message.log ?? true else { return }
        if let origin = found?.replayed.origin { logBringer = LogBringer(origin) }
        log.adopt(found: found, entries: entries)
        guard mayBringLog(message, isHeld: isHeld) else { return }
        logBringer = LogBringer(rank: rank, process: peer.process)
        let isNewSession = message.session != log.session
        // guard: left-log-becomes-a-file (= log.leftIsEnded(isInFile: true) for save(left))
        if let left = log.open(message, pid: peer.pid) { save(left) }
        openEventFiles(
            message.tensorboard, in: directories.events, isNewSession: isNewSession, keeping: message.resumeAt)
    }

    /// What a connection that has joined is told: at once, or when the rows that it resumes with are safe.
    /// - Parameters:
    ///   - connection: grows with each that is made.
    ///   - acknowledge: hears how far the log is safe, if the log is this session's.
    public func opened(
        _ message: OpenRun, on connection: UInt64, acknowledge: @escaping @Sendable @DaemonActor (LogAck) -> Void,
        _ answer: @escaping @Sendable @DaemonActor (RunOpened) -> Void
    ) {
        let isItsLog = log.session == message.session
        var opened = RunOpened(
            runDirectory: name.directory, lastSequence: isItsLog ? log.writtenSequence : 0,
            logUpdate: log.columns.lastUpdate, logEntries: log.columns.count)
        opened.log = isItsLog && message.log ?? true
        if isItsLog, !log.refused.isEmpty { opened.refused = log.refused }  // guard: refusals-are-told-again (never)
        guard opened.log == true else { return answer(opened) }
        log.acknowledge(on: connection, acknowledge)
        guard message.resumeAt != nil else { return answer(opened) }
        // The client relies on the rows that it resumes with, and does not send them again.
        log.sync(orFails: true) { answer(opened) }
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
        if log.wasTaken(from: message.session) { return false }  // guard: taken-over-stays-so (never)
        // guard: log-stays-with-its-rank (never)
        guard let logBringer, isHeld, message.rank ?? 0 != 0 else { return true }
        // A rank is one process (`holder`).
        return logBringer.rank == message.rank || logBringer.process.hasEnded
    }

    /// Those that are held already stay: what waits for the disk knows them.
    private func adopt(_ new: Directories) -> Directories {
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
        queue.submit(
            LogFile(columns: left.columns, owner: left.owner) { start in
                // A journal that is older than the file would be taken for a newer one.
                if let journal = left.journal { journal.sync { _ in start() } } else { start() }
            } completion: { error in
                self.log.leftIsEnded(isInFile: error == nil)
            })
    }

    private func logged(_ change: RunChange) {
        switch change {
        case .rows, .added:
            // Behind a `finish` the log goes on, and becomes a file again.
            guard state == .finished, openConnections > 0 else { break }
            state = .running
            if let directories {
                tensorboard?.open(self, in: directories.events, isNewSession: false, keeping: nil)
            }
        case .restarted, .checkpoint, .state: break
        }
        notifyObservers(change)
    }

    /// - Parameter isWanted: whether TensorBoard shows the log.
    private func openEventFiles(_ isWanted: Bool?, in directory: RunDirectory, isNewSession: Bool, keeping: Int64?) {
        guard isWanted == true else { return }
        let shown =
            tensorboard
            ?? TensorBoardLog(disks: eventDisks) { [name, report] in
                report(RunEvent(runID: name.runID, what: .warning($0)))
            }
        shown.open(
            self, in: directory, isNewSession: isNewSession || tensorboard == nil,
            keeping: isNewSession ? keeping : .max)
        tensorboard = shown
        add(shown)
    }

    /// Calls back when an ended run's event files are written, or given up.
    func whenEventFilesAreWritten(_ callback: @escaping @Sendable @DaemonActor () -> Void) {
        if let tensorboard, state != .running { tensorboard.whenDone(callback) } else { callback() }
    }

    var areEventFilesWritten: Bool { tensorboard?.isDone ?? true }

    /// A run that a daemon before this one had, brought back without a connection.
    /// - Parameter identity: of who brought it then.
    func restore(_ directories: Directories, _ identity: RunIdentity, _ found: FoundJournal?) {
        brought = identity
        let directories = adopt(directories)
        keepRegistered()
        log.register(directories.tracker)
        if let found {
            // Its checkpoints may have come back, and ended, before its log was read.
            state = .running
            logBringer = LogBringer(found.replayed.origin)
            log.adopt(found: found, entries: nil)
            openEventFiles(
                found.replayed.origin.run.tensorboard, in: directories.events, isNewSession: false, keeping: nil)
        }
    }

    /// What is being opened stays noted down, whatever ends meanwhile.
    func keepRegistered() { log.keepRegistered() }

    /// The process that is this rank of the run's job.
    // guard: lease-of-a-rank (= holders.values.first for holders[rank])
    func holder(ofRank rank: Int) -> Holder? { holders[rank] }

    /// A connection is gone. The last one of a run with an unfinished log leaves it interrupted: its log is written.
    /// - Parameter keepsJournal: the daemon leaves, and its successor goes on with the log.
    public func detach(rank: Int, connection: UInt64, clean: Bool, keepsJournal: Bool) {
        openConnections -= 1
        log.acknowledgeNoMore(on: connection)
        if var holder = holders[rank] {  // guard: lease-ends-with-its-holder (never)
            holder.connections -= 1
            holders[rank] = holder.connections > 0 ? holder : nil
        }
        if let logBringer, logBringer.rank == rank, holders[rank] == nil { isLogClosed = clean }
        guard openConnections == 0 else { return }
        owners = [:]
        logBringer = nil
        peer.process = peer.process.noted
        end(clean: clean, keepsJournal: keepsJournal)
    }

    /// Nobody brings this run any more.
    func end(clean: Bool, keepsJournal: Bool = false) {
        if state == .running {
            state = clean && !log.hasUnwrittenRows ? .finished : .interrupted
            if log.hasUnwrittenRows { writeEntries(keepsJournal: keepsJournal) { _ in } }
            emit(.ended(state))
        }
        letGoOfDirectories()
    }

    private func letGoOfDirectories() {
        // guard: job-outlives-connection (always: queue.isEmpty)
        guard openConnections == 0, queue.isEmpty, !isAwaited else { return }
        queue.shorten()
        log.letGo()
        forgetLog()
    }

    /// An ended run is listed for long; its log, which may be large, is kept only as long as its trainer may come back with the same
    /// session after a lost connection.
    private func forgetLog() {
        guard !isLive, queue.isEmpty, !log.hasUnwrittenRows, log.columns.keys.count > 0, !isFollowedFromBehind
        else { return }
        if log.isSettled, isLogClosed || log.isOrphaned {
            log.forgetRows()
            ThisProcess.giveBackFreeMemory()
        } else if !isLookingAfterLog {
            isLookingAfterLog = true
            DaemonActor.enter(after: Self.orphanSeconds) { [weak self] in
                self?.isLookingAfterLog = false
                self?.forgetLog()
            }
        }
    }

    private static let orphanSeconds = 5.0
    private var isLookingAfterLog = false
    /// Who brings the log said goodbye. Another rank's goodbye does not count: the log's session may only have lost its
    /// connection, and goes on with the rows that are in memory.
    private var isLogClosed = false

    /// Brought back from a daemon before this one, and its trainer lives: it will connect again.
    var isAwaited = false

    public var isLive: Bool { openConnections > 0 || isAwaited }
    public var isIdle: Bool { queue.isEmpty }
    /// Too many logs wait for storage.
    var isOverloaded: Bool { queue.logCount >= Limits.savesInFlightPerRun }
    public var stalled: String? { stalledFiles.first?.message }

    /// Files that storage refuses for now: the one that others wait behind, and the log's journal.
    public var stalledFiles: [Waited.Failure] {
        let journal = log.stalled.map {
            Waited.Failure(path: "\(name.directory)/tracker/\(Journal.fileName)", message: $0)
        }
        return queue.stalledFiles + [journal].compactMap { $0 }
    }

    func emit(_ what: RunEvent.What) { report(RunEvent(runID: name.runID, what: what)) }

    /// Lets go of a log that is in its file, unless its trainer lives and may have lost no more than its connection.
    func forgetRows() {
        guard state == .finished || peer.process.hasEnded, !isFollowedFromBehind else { return }
        log.forgetRows()
    }

    /// Files that are not durable yet.
    public var pendingPaths: [String] { queue.pendingPaths }

    /// How its files have ended.
    public var outcomes: FileOutcomes { queue.outcomes }
    public func forgetFailures() { queue.forgetFailures() }

    // MARK: Followers

    public func add(_ observer: any RunObserver) { observers[ObjectIdentifier(observer)] = observer }

    public func remove(_ observer: any RunObserver) {
        observers[ObjectIdentifier(observer)] = nil
        hasRead()
    }

    func notifyObservers(_ change: RunChange) {
        for observer in observers.values { observer.changed(self, change) }
    }

    /// A follower has read what it was behind, or has gone: a log that was kept for it may go.
    public func hasRead() { forgetLog() }

    private var isFollowedFromBehind: Bool { observers.values.contains { $0.wantsRows } }
    var isFollowed: Bool { !observers.isEmpty }

    /// The last ones, oldest first.
    public var checkpoints: [CheckpointInfo] { queue.checkpoints }
    /// A file that is on its way to the disk now, with its progress.
    public var checkpointInProgress: CheckpointInfo? { queue.checkpointInProgress }

    // MARK: Log

    /// Answers once entries.th, and every checkpoint before it, is durable or failed.
    public func finish(
        session: String, completion: @escaping @Sendable @DaemonActor (Result<Finished, WireError>) -> Void
    ) throws(WireError) {
        guard !isOverloaded else {
            throw WireError(
                .tooMany, "\(queue.logCount) logs of run \(name.runID) are on their way; wait for one")
        }
        let rows = log.columns.count
        guard rows > 0, session == log.session else {
            // Rows of a rank that is gone become a file when the last connection goes.
            if openConnections == 1, !log.hasUnwrittenRows { state = .finished }
            whenEnded { completion(.success(Finished(entriesPath: nil, entries: 0))) }
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
        keepsJournal: Bool, _ completion: @escaping @Sendable @DaemonActor (PosixError?) -> Void
    ) {
        let (owner, turn) = (log.owner, log.turn)
        queue.submit(
            LogFile(columns: log.columns, owner: owner) { start in
                // The journal first: a daemon that dies behind entries.th would otherwise find an older log in it.
                // guard: journal-before-file (= start() for self.log.syncForFile(of: turn, start))
                self.log.syncForFile(of: turn, start)
            } completion: { error in
                if error == nil, !keepsJournal { self.log.isInFile(owner) }
                completion(error)
                self.letGoOfDirectories()
            })
    }

    // MARK: Checkpoints

    /// Takes a snapshot, or finds that it has it already: a client that lost its connection sends again what it has not
    /// seen the end of.
    public func save(
        _ payload: SavePayload, fd: OwnedFD, session: String, rank: Int, connection: UInt64,
        events: @escaping EventSink
    ) throws(WireError) {
        try queue.save(
            payload, fd: fd, session: session, rank: rank, connection: connection, events: events,
            check: { targets throws(WireError) in try check(targets, by: rank) },
            keep: { snapshot, done in
                for target in snapshot.targets { owners[ByteName(target.fileName)] = rank }
                keeper.keep(
                    snapshot, payload, of: name, root: directories?.home.anchor, brought: brought, session: session,
                    rank: rank, peer: peer, done: done)
            })
    }

    /// Whether a save of this number is on its way: events that bear the number are its own.
    public func isSaving(_ session: String, _ sequence: UInt64) -> Bool {
        queue.isSaving(session, sequence)
    }

    /// Ranks that save different parts under one name would replace one another's file in silence.
    private func check(_ targets: [Snapshot.Target], by rank: Int) throws(WireError) {
        for target in targets {
            // guard: name-of-one-rank (never)
            guard let owner = owners[ByteName(target.fileName)], owner != rank else { continue }
            throw WireError(
                .nameInUse,
                "rank \(owner) has saved \(target.fileName) in run \(name.runID), and rank \(rank) would replace it: nothing of "
                    + "rank \(rank)'s save was written. Put the rank into the name, or save on rank 0 only, or save sharded state "
                    + "with noether_writer.dcp")
        }
    }

    /// A snapshot that a daemon before this one had accepted.
    func restore(_ snapshot: Snapshot, session: String, rank: Int) {
        queue.restore(snapshot, session: session, rank: rank)
    }

    public var status: RunStatus {
        var status = RunStatus(
            runID: name.runID, runDirectory: name.directory, state: state, pid: peer.pid, node: node,
            entries: log.rowCount, lastUpdate: log.lastUpdate, checkpoints: queue.status,
            stalled: stalled)
        status.lastUpdateAt = log.lastWallTime
        (status.logWrittenUpdate, status.logDurableUpdate) = (log.writtenUpdate, log.durableUpdate)
        status.writing = queue.checkpointInProgress
        return status
    }

    /// Calls back when everything submitted so far has ended.
    public func whenEnded(_ callback: @escaping @Sendable @DaemonActor () -> Void) {
        queue.whenEnded(callback)
    }
}

extension Run: RunLogOwner {
    var tracker: RunDirectory? { directories?.tracker }

    func logChanged(_ change: RunChange) { logged(change) }

    func warn(_ words: String) { emit(.warning(words)) }

    func logHasLetGo() {
        // Somebody may have come meanwhile.
        guard openConnections == 0, queue.isEmpty, !isAwaited else { return }
        directories = nil
    }
}

extension Run: SaveQueueOwner {
    var retention: Retention { brought.map { ownRetention.with($0) } ?? ownRetention }

    func storageFailed() {
        directories?.letGo()  // guard: dead-disk-let-go (skip)
        log.storageFailed()
    }

    func hasNothingToWrite() { letGoOfDirectories() }
}
