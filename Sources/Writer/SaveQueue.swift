// SPDX-License-Identifier: Apache-2.0
/// A run's files on their way to the disk: its checkpoints, and the log when it becomes a file. Owned by the daemon's queue.
///
/// Each rank has a lane. In a lane files go to the disk one at a time, in order: two saves of `latest` can't overtake one another.
/// Lanes go side by side, as many as there are disk queues; runs take turns on these, so that none starves another. A log is
/// written after the checkpoints that came before it.
import Dispatch
import Posix
import Wire

/// What a queue needs of its run, and tells it.
@DaemonActor
protocol SaveQueueOwner: AnyObject, Sendable {
    var directories: Directories? { get }
    /// What is kept of older checkpoints, as the run's trainer has asked for.
    var retention: Retention { get }
    func emit(_ what: RunEvent.What)
    func notifyObservers(_ change: RunChange)
    /// Storage refuses for another reason than room: nothing that is open on it is trusted.
    func storageFailed()
    /// Nothing is left to do.
    func hasNothingToWrite()
}

/// A log on its way to its file.
struct LogFile: Sendable {
    let columns: LogColumns
    let owner: LogOwner?
    /// Calls back when the file may be written.
    let start: @Sendable @DaemonActor (@escaping @Sendable @DaemonActor () -> Void) -> Void
    let completion: @Sendable @DaemonActor (PosixError?) -> Void
}

@DaemonActor
final class SaveQueue {
    /// What must not be written and removed at the same time: the files that differ in their tags only.
    private struct Family: Hashable {
        var beginning: ByteName
        var end: ByteName

        init(_ target: Snapshot.Target) {
            beginning = ByteName(target.beginning)
            end = ByteName(target.end)
        }
    }

    @DaemonActor
    private final class Lane {
        var saves: [SaveJob] = []
        let storage: StorageJob
        /// The first one, if it is on its way to the disk, and which of its files is.
        var current: SaveJob?
        var target = 0
        /// Tries so far, of each file.
        var writes = 0
        /// Files of these are removed.
        var removes: Family?
        /// The number of the job whose end this follows.
        var ending: Int?
        let rank: Int

        init(_ storage: StorageJob, _ rank: Int) {
            self.storage = storage
            self.rank = rank
        }

        var isBusy: Bool { current != nil || removes != nil }

        func writes(_ family: Family) -> Bool {
            current?.snapshot.targets.contains { Family($0) == family } ?? false
        }
    }

    private final class WaitingLog {
        let log: LogFile
        let ordinal: Int
        /// Checkpoints that came before it.
        var after: [SaveJob]

        init(_ log: LogFile, _ ordinal: Int, after: [SaveJob]) {
            self.log = log
            self.ordinal = ordinal
            self.after = after
        }
    }

    private let name: RunName
    private let disks: DiskQueues
    private let keeper: any SnapshotKeeper
    private let budget: SnapshotBudget
    private let vault: SnapshotVault
    private let measures: Measures
    weak var owner: (any SaveQueueOwner)?

    private var lanes: [Int: Lane] = [:]
    private var logs: [WaitingLog] = []
    private var isWritingLog = false
    private lazy var logStorage = StorageJob(disks) { [weak self] in self?.owner?.storageFailed() }
    private var ledger = SaveLedger()
    private var lastOrdinal = 0
    /// Who waits for all up to that number.
    private var waiters: [(ordinal: Int, callback: @Sendable @DaemonActor () -> Void)] = []
    private var hasSaidUnnumbered = false

    init(
        _ name: RunName, disks: DiskQueues, keeper: any SnapshotKeeper, budget: SnapshotBudget,
        vault: SnapshotVault, measures: Measures
    ) {
        self.name = name
        self.disks = disks
        self.keeper = keeper
        self.budget = budget
        self.vault = vault
        self.measures = measures
    }

    // MARK: What there is

    private var saves: [SaveJob] { lanes.sorted { $0.key < $1.key }.flatMap(\.value.saves) }
    var isEmpty: Bool { logs.isEmpty && lanes.values.allSatisfy { $0.saves.isEmpty && !$0.isBusy } }
    /// Logs that become files.
    var logCount: Int { logs.count }

    /// Files that storage refuses for now, and that others wait for.
    var stalledFiles: [Waited.Failure] {
        let storages = lanes.sorted { $0.key < $1.key }.map(\.value.storage) + [logStorage]
        // guard: said-in-the-status (= [] for storages.compactMap(\.stall))
        return storages.compactMap(\.stall)
    }

    /// Files that are not durable yet.
    var pendingPaths: [String] {
        saves.flatMap { save in
            save.snapshot.targets.map { "\(name.directory)/checkpoints/\($0.fileName)" }
        } + logs.map { _ in "\(name.directory)/tracker/\(EntriesFile.name)" }
    }

    var status: RunStatus.Checkpoints {
        var status = RunStatus.Checkpoints()
        var written: UInt64 = 0
        for job in saves {
            status.inFlight += job.snapshot.targets.count
            status.bytesInFlight += job.snapshot.byteCount
            written += job.snapshot.bytesWritten
        }
        status.bytesWritten = written
        ledger.outcomes.fill(&status)
        return status
    }

    /// The last checkpoints, oldest first.
    var checkpoints: [CheckpointInfo] { ledger.checkpoints }

    /// How the run's files have ended.
    var outcomes: FileOutcomes { ledger.outcomes }
    func forgetFailures() { ledger.forgetFailures() }

    /// A file that is on its way to the disk now, with its progress.
    var checkpointInProgress: CheckpointInfo? {
        for (_, lane) in lanes.sorted(by: { $0.key < $1.key }) {
            guard let job = lane.current, lane.target < job.snapshot.targets.count else { continue }
            let file = job.snapshot.targets[lane.target].fileName
            var info = ledger.checkpoints.last { $0.sequence == job.snapshot.sequence && $0.file.isSame(as: file) }
            guard let state = info?.state, [.writing, .written, .stalled].contains(state) else { continue }
            info?.bytesDone = job.snapshot.bytesWritten(of: lane.target)
            return info
        }
        return nil
    }

    /// The run has ended, and many ended runs are listed.
    func shorten() { ledger.shorten() }

    /// Calls back when everything submitted so far has ended, whatever is submitted after it.
    func whenEnded(_ callback: @escaping @Sendable @DaemonActor () -> Void) {
        if isEmpty { callback() } else { waiters.append((lastOrdinal, callback)) }
    }

    /// The oldest of what has not ended.
    private var firstOrdinal: Int {
        let ofLanes = lanes.values.flatMap { lane in lane.saves.map(\.ordinal) + [lane.ending].compactMap { $0 } }
        return (ofLanes + logs.map(\.ordinal)).min() ?? .max
    }

    // MARK: What comes

    /// Takes a snapshot, or finds that it has it already: a client that lost its connection sends again what it has not
    /// seen the end of.
    /// - Parameters:
    ///   - check: refuses the names of its files.
    ///   - keep: hands it to the keeper, which calls back once it is kept.
    func save(
        _ payload: SavePayload, fd: OwnedFD, session: String, rank: Int, connection: UInt64,
        events: @escaping EventSink,
        check: ([Snapshot.Target]) throws(WireError) -> Void,
        keep: (Snapshot, @escaping @Sendable @DaemonActor () -> Void) -> Void
    ) throws(WireError) {
        guard payload.sequence > 0 else {
            throw WireError(.badSequence, "a save has the sequence 0; a session counts from 1")
        }
        if let known = ledger.known.job(session, payload.sequence) {  // guard: repeated-save-on-its-way (never)
            // guard: number-of-a-save-on-its-way (always)
            guard known.snapshot.fingerprint == payload.fingerprint else {
                throw WireError(
                    .badSequence,
                    "the sequence \(payload.sequence) is that of another save, which is on its way: that one goes on, and nothing "
                        + "of this one was taken. Each save has a number of its own")
            }
            // What is left of a connection that its client has given up may come after the first of its next one.
            guard connection >= known.connection else { return }
            known.events = events
            known.connection = connection
            if known.isAccepted { events(accepted(known.snapshot)) }
            // Files of it that have ended: who heard of that is gone.
            for event in known.last { events(event) }
            return
        }
        if let ended = ledger.known.ended(session, payload.sequence) {  // guard: repeated-save (never)
            // A connection on which it has ended has heard so: what comes there is another save, whatever it looks like.
            // guard: number-of-an-ended-save (always)
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
        let inFlight = lanes[rank]?.saves.count ?? 0
        guard inFlight < Limits.savesInFlightPerRun else {  // guard: saves-in-flight (always)
            throw WireError(.busy, "\(inFlight) saves of run \(name.runID) are in flight already")
        }
        let snapshot = try Snapshot(payload, in: "\(name.directory)/checkpoints", fd: fd)
        try check(snapshot.targets)
        let held = saves.reduce(0) { $0 + $1.snapshot.memoryByteCount }
        try budget.check(snapshot.memoryByteCount, of: name, holding: held)
        let job = SaveJob(snapshot, session: session, connection: connection, events: events)
        submit(job, rank)
        keep(snapshot) { self.accept(job) }
    }

    /// Whether a save of this number is on its way: events that bear the number are its own.
    func isSaving(_ session: String, _ sequence: UInt64) -> Bool { ledger.known.job(session, sequence) != nil }

    /// A snapshot that a daemon before this one had accepted.
    func restore(_ snapshot: Snapshot, session: String, rank: Int) {
        guard ledger.known.job(session, snapshot.sequence) == nil else { return }
        // Its client was faster: it has sent the save again, has heard of its end, and may write into the buffer.
        guard ledger.known.ended(session, snapshot.sequence) == nil else { return }
        let job = SaveJob(snapshot, session: session, isRestored: true) { _ in }
        submit(job, rank)
        accept(job)
    }

    private func submit(_ job: SaveJob, _ rank: Int) {
        budget.reserve(job.snapshot.memoryByteCount)
        ledger.begin(job)
        lastOrdinal += 1
        job.ordinal = lastOrdinal
        let lane = lane(of: job, rank)
        // What is sent again after a reconnect goes before what came after it the first time.
        let later = lane.saves.indices.dropFirst(lane.current == nil ? 0 : 1).first { lane.saves[$0].isAfter(job) }
        lane.saves.insert(job, at: later ?? lane.saves.endIndex)
    }

    /// The rank's, unless another lane has a file of the same name on its way (of a rank that is gone): then behind that one.
    private func lane(of job: SaveJob, _ rank: Int) -> Lane {
        let names = Set(job.snapshot.targets.map { ByteName($0.fileName) })
        let busy = lanes.values.first { lane in
            lane.saves.contains { $0.snapshot.targets.contains { names.contains(ByteName($0.fileName)) } }
        }
        if let lane = busy ?? lanes[rank] { return lane }
        let lane = Lane(StorageJob(disks) { [weak self] in self?.owner?.storageFailed() }, rank)
        lanes[rank] = lane
        return lane
    }

    private func accept(_ job: SaveJob) {
        job.isAccepted = true
        job.acceptedSeconds = Clock.monotonicSeconds
        measures.saves += 1
        Faults.interrupt(at: "save.accepted")
        job.events(accepted(job.snapshot))
        for info in ledger.accept(job) { owner?.notifyObservers(.checkpoint(info)) }
        startNext()
    }

    private func accepted(_ snapshot: Snapshot) -> CheckpointEvent {
        var accepted = CheckpointEvent(.accepted, sequence: snapshot.sequence)
        accepted.bytes = snapshot.byteCount
        return accepted
    }

    /// A log becomes a file.
    func submit(_ log: LogFile) {
        lastOrdinal += 1
        logs.append(WaitingLog(log, lastOrdinal, after: saves))
        startNext()
    }

    // MARK: What is next

    /// Starts whatever may start. Whoever is told of an end may begin something at once, and so come here again.
    private func startNext() {
        for lane in lanes.values where !lane.isBusy { start(lane) }
        if !isWritingLog, let next = logs.first, next.after.isEmpty, let owner {
            isWritingLog = true
            guard let directories = owner.directories else { preconditionFailure("a log of a run without directories") }
            next.log.start { self.write(next.log, in: directories.tracker) }
        }
        if !waiters.isEmpty {
            let first = firstOrdinal
            let ended = waiters.filter { $0.ordinal < first }
            waiters.removeAll { $0.ordinal < first }
            for waiter in ended { waiter.callback() }
        }
        if isEmpty { owner?.hasNothingToWrite() }
    }

    private func start(_ lane: Lane) {
        guard let job = lane.saves.first, job.isAccepted, let owner else { return }
        let families = Set(job.snapshot.targets.map(Family.init))
        guard !lanes.values.contains(where: { $0.removes.map(families.contains) ?? false }) else { return }
        guard let directories = owner.directories else { preconditionFailure("a save of a run without directories") }
        lane.current = job
        write(job, target: 0, lane, in: directories.checkpoints)
    }

    private func update(
        _ job: SaveJob, _ target: Int, _ state: CheckpointInfo.State, done: UInt64?,
        _ error: PosixError? = nil
    ) {
        let info = ledger.change(job, target: target, to: state, done: done, error: error)
        if let info { owner?.notifyObservers(.checkpoint(info)) }
    }

    /// Storage refuses, or does not answer: who waits hears why.
    private func emitStall(_ path: String, _ error: PosixError) {
        measures.stalled(error)
        owner?.emit(.stalled(path: path, reason: error.description))  // guard: said-in-the-log (skip)
    }

    /// Given up.
    private func recordFailure(_ path: String, _ error: PosixError) {
        ledger.failed(path, error)
        measures.failed(error)
        owner?.emit(.failed(path: path, reason: error.description))
    }

    // MARK: A checkpoint

    private func write(_ job: SaveJob, target index: Int, _ lane: Lane, in directory: RunDirectory) {
        let snapshot = job.snapshot
        guard index < snapshot.targets.count else { return end(job, lane) }
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
            write(job, target: index + 1, lane, in: directory)
        }
        let start = Clock.monotonicSeconds
        let isKnown = ledger.known.hasWritten(target.fileName) && !job.isRestored
        let mark = SaveMark(job)
        if ledger.known.isSuperseded(target.fileName, by: job) {
            update(job, index, .durable, done: nil)
            return ended(event(.durable))
        }
        lane.target = index
        update(job, index, .writing, done: 0)
        lane.writes += 1
        sendProgress(job, index, event(.progress), lane, lane.writes)
        // If a save has several targets, the image is made of the last one: after a tag comes `latest`.
        let draft =
            index < snapshot.targets.count - 1
            ? nil
            : vault.begin(
                .init(target, in: directory.path, rank: lane.rank), byteCount: snapshot.byteCount(of: index),
                session: job.session)
        lane.storage.run(
            at: directory.place, "write", path,
            { () throws(PosixError) -> (isWritten: Bool, stamp: FileStamp?) in
                try directory.use { directory throws(PosixError) in
                    if !isKnown, try mark.isSuperseded(target.fileName, in: directory) { return (false, nil) }
                    let file = try snapshot.write(index, in: directory, mark: mark, image: draft?.begin()) {
                        DaemonActor.enter {
                            job.events(event(.written))  // guard: durable-is-said-last (= .durable for .written)
                            self.update(job, index, .written, done: nil)
                        }
                    }
                    return (true, draft == nil ? nil : try? FileStamp(of: file))
                }
            }, progress: { snapshot.bytesWritten },
            refused: { error in
                if !error.isSilence { self.vault.drop(draft) }
                self.update(job, index, .stalled, done: error.isSilence ? nil : 0, error)
                self.emitStall(path, error)
                job.events(event(.stalled, error))  // guard: said-in-the-event (skip)
            },
            again: { self.write(job, target: index, lane, in: directory) },
            ended: { result in
                let stamp: FileStamp?
                switch result {
                case .failure(let error):
                    self.vault.drop(draft)
                    self.update(job, index, .failed, done: 0, error)
                    self.recordFailure(path, error)
                    return ended(event(.failed, error))
                case .success((false, _)):
                    self.vault.drop(draft)
                    self.update(job, index, .durable, done: nil)
                    return ended(event(.durable))
                case .success((true, let found)): stamp = found
                }
                self.vault.keep(draft, stamp)
                self.ledger.becameDurable(target, job)
                self.measures.isDurable(
                    bytes: target.byteCount, acceptedSeconds: job.acceptedSeconds, startSeconds: start)
                let microseconds = UInt64((Clock.monotonicSeconds - start) * 1e6)
                self.owner?.emit(
                    .durable(path: path, bytes: snapshot.byteCount(of: index), microseconds: microseconds))
                self.update(job, index, .durable, done: nil)
                ended(event(.durable))
            })
    }

    private func end(_ job: SaveJob, _ lane: Lane) {
        var released = CheckpointEvent(.released, sequence: job.snapshot.sequence)
        released.buffer = job.snapshot.buffer
        // Before the client has its buffer back: a keeper that still gave it to a next daemon would have that one write what the
        // client puts there meanwhile over a file that was good.
        keeper.forget(job.snapshot, session: job.session) { isForgotten in
            if !isForgotten { released.buffer = nil }
            job.last.append(released)
            self.budget.release(job.snapshot.memoryByteCount)
            self.ledger.end(job, remembering: KnownSaves.endedRemembered * self.lanes.count)
            lane.saves.removeFirst()
            lane.current = nil
            lane.ending = job.ordinal
            for log in self.logs { log.after.removeAll { $0 === job } }
            // The lane's next file waits for what is removed, so that none is written under a name that goes.
            job.events(released)
            self.removeOlder(than: job.durable.map { self.ledger.known.successor(of: $0, by: job) }[...], lane)
        }
    }

    /// What has had its time after these files. The client has its answers.
    private func removeOlder(than targets: ArraySlice<Snapshot.Target>, _ lane: Lane) {
        guard let owner, owner.retention.keepLast > 0, let target = targets.first,
            let directory = owner.directories?.checkpoints
        else {
            lane.ending = nil
            return startNext()
        }
        let (retention, family) = (owner.retention, Family(target))
        if !hasSaidUnnumbered, Retention.Progress(target.tag) == nil, !Retention.names.contains(target.tag) {
            hasSaidUnnumbered = true
            owner.emit(
                .warning(
                    "keep_last: the tag \(target.tag.debugDescription) has no number, so checkpoints with such a tag "
                        + "are never removed (this is said once)"))
        }
        guard !lanes.values.contains(where: { $0.removes == family || $0.writes(family) }) else {
            // Another rank writes such files: what is older goes after its own.
            return removeOlder(than: targets.dropFirst(), lane)
        }
        lane.removes = family
        disks.run(
            at: directory.place,
            { () -> (removed: [String], problem: String?) in
                do throws(PosixError) {
                    guard let found = try directory.find(creates: false) else { return ([], nil) }
                    return retention.apply(behind: Retention.Newest(target), in: found)
                } catch {
                    return ([], "older checkpoints were not removed: \(error)")
                }
            }
        ) { result in
            lane.removes = nil
            self.measures.removedCheckpoints += UInt64(result.removed.count)
            for name in result.removed {
                owner.emit(.removed(path: "\(directory.path)/\(name)", successor: target.fileName))
            }
            if let problem = result.problem { owner.emit(.warning(problem)) }
            self.removeOlder(than: targets.dropFirst(), lane)
        }
    }

    private static let progressSeconds = 0.25

    /// As long as this write goes on; only where bytes have moved.
    private func sendProgress(_ job: SaveJob, _ index: Int, _ last: CheckpointEvent, _ lane: Lane, _ write: Int) {
        DaemonActor.enter(after: Self.progressSeconds) {
            guard lane.current === job, lane.writes == write else { return }
            let done = job.snapshot.bytesWritten(of: index)
            var event = last
            event.bytesDone = done
            if done > 0, done != last.bytesDone { job.events(event) }
            self.sendProgress(job, index, event, lane, write)
        }
    }

    // MARK: A log

    /// - Parameter hasEntries: entries.th is there, and only the summary is left.
    private func write(_ log: LogFile, in directory: RunDirectory, hasEntries: Bool = false) {
        let path = "\(directory.path)/\(hasEntries ? SummaryFile.name : EntriesFile.name)"
        logStorage.run(
            at: directory.place, "write", path,
            { () throws(PosixError) in
                try directory.use { directory throws(PosixError) in
                    if hasEntries {
                        try SummaryFile.write(log.columns, in: directory)
                    } else {
                        try EntriesFile.write(log.columns, of: log.owner, in: directory)
                    }
                }
            },
            refused: { error in self.emitStall(path, error) },
            again: { self.write(log, in: directory, hasEntries: hasEntries) },
            ended: { result in
                var failure: PosixError?
                if case .failure(let error) = result {
                    failure = error
                    self.recordFailure(path, error)
                } else if !hasEntries {
                    self.measures.logFiles += 1
                    return self.write(log, in: directory, hasEntries: true)
                }
                self.logs.removeFirst()
                self.isWritingLog = false
                // The log itself is safe without its summary.
                log.completion(hasEntries ? nil : failure)
                self.startNext()
            })
    }
}
