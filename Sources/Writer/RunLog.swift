// SPDX-License-Identifier: Apache-2.0
/// A run's log: the columns in memory, whose session brings it, and the journal that survives the daemon. Owned by the daemon's
/// queue. Making entries.th of it is the run's job.
import Dispatch
import Posix
public import Wire

/// What a daemon before this one left: its journal, held by this one now.
struct FoundJournal: Sendable {
    var replayed: JournalFormat.Replayed
    var file: AppendFile
}

/// A log of another session that is in no file yet, and must not be lost when the next one begins.
struct LeftLog: Sendable {
    var columns: LogColumns
    var owner: LogOwner?
    var journal: Journal?
}

/// What a log needs of its run, and tells it.
@DaemonActor
protocol RunLogOwner: AnyObject, Sendable {
    /// The directory of the log's files, as long as the run holds it.
    var tracker: RunDirectory? { get }
    /// Rows have come, or the log was cut.
    func logChanged(_ change: RunChange)
    /// In words: what is not as safe as it should be.
    func warn(_ words: String)
    /// Nothing of this log is under way, and it needs its directory no more.
    func logHasLetGo()
}

@DaemonActor
public final class RunLog {
    weak var run: (any RunLogOwner)?
    public private(set) var columns = LogColumns()
    /// Who brings the log; a newer session takes it over.
    public private(set) var session: String?
    /// Of an ended run whose rows are in its file only.
    private var forgotten: (count: Int, lastUpdate: Int64?, wallTime: Double?) = (0, nil, nil)
    /// The last row taken, so that what is sent again is dropped.
    public private(set) var lastSequence: UInt64 = 0
    /// Sessions that brought the log before; the last ones.
    private var takenOver: [String] = []
    private static let sessionsKept = 16
    /// What was said to this session of updates that were not taken; the last ones.
    public private(set) var refused: [ErrorMessage] = []
    /// Rows that no durable entries.th holds.
    public private(set) var hasUnwrittenRows = false

    private let disks: DiskQueues
    private let registration: Registration
    private var origin: JournalFormat.Origin?
    private var tracker: RunDirectory? { run?.tracker }
    private var journal: Journal?
    private var journaledKeyCount = 0
    /// A file operation on the journal's name is under way: making it, or removing it.
    private var isChangingFile = false
    /// Numbers of the rows that have come since; of a row that was added to, the last one.
    private var sequencesMeanwhile: [UInt64] = []
    /// The number of what was added meanwhile to the last row of before.
    private var additionMeanwhile: UInt64?
    /// Nobody brings or writes this log now; what is under way ends first.
    private var isLetGo = false
    /// Logs of sessions before this one that are on their way to their files. Until they are there the journal stays theirs: what this
    /// session logs meanwhile is not acknowledged.
    private var leftCount = 0
    private var leftJournal: Journal?
    /// Counts sessions: a log that is on its way to its file is of one of them.
    private(set) var turn = 0
    /// One of them came into no file: its journal makes room only under another name.
    private var keepsOldJournal = false
    private var waitingForFile: [@Sendable @DaemonActor () -> Void] = []
    private var hasWarned = false
    /// Who hears how far the log is safe: the newest connection of the session that brings it.
    private var listener: (connection: UInt64, acknowledge: @Sendable @DaemonActor (LogAck) -> Void)?

    private let byteLimit: Int
    private let budget: LogBudget
    private let measures: Measures
    /// In monotonic seconds.
    private var lastRowSeconds: Double?
    /// When the first row came that waits for the journal's file to be made.
    private var withoutJournalSince: Double?

    init(disks: DiskQueues, registry: RunRegistry, byteLimit: Int, budget: LogBudget, measures: Measures) {
        self.measures = measures
        self.byteLimit = byteLimit
        self.budget = budget
        self.disks = disks
        registration = Registration(registry)
    }

    /// Makes and removes the journal's file.
    private lazy var storage = StorageJob(disks, .always) { [weak self] in self?.tracker?.letGo() }
    /// Something may have the journal's name on the disk: also one that failed.
    private var mayHaveFile = false

    /// Why storage refuses the journal for now.
    var stalled: String? { (journal?.stalled ?? storage.refusal).map { "the log's journal: \($0)" } }

    // MARK: Sessions

    /// Takes on what the files hold.
    /// - Parameters:
    ///   - found: the journal that a daemon before this one left.
    ///   - entries: what entries.th has, if the session continues it.
    func adopt(found: FoundJournal?, entries: FoundEntries?) {
        if let found { adopt(found) } else if let entries, session == nil { adopt(entries) }
    }

    /// - Returns: what has to become a file; `leftIsEnded` is called when it is one.
    func open(_ message: OpenRun, pid: Int32) -> LeftLog? {
        isLetGo = false
        registration.want(true)
        if let session, session != message.session { takenOver = takenOver.suffix(Self.sessionsKept - 1) + [session] }
        origin = JournalFormat.Origin(
            run: RunIdentity(message), pid: pid, pidStart: ThisProcess.startTicks(of: pid) ?? 0)
        origin?.takenOver = takenOver.isEmpty ? nil : takenOver
        guard session != message.session else {
            if hasUnwrittenRows { startJournal() }
            return nil
        }
        forgotten = (0, nil, nil)
        let (before, beforeOwner) = (columns, owner)
        // guard: cut-in-memory (skip: columns.cut(after: update))
        if let update = message.resumeAt { columns.cut(after: update) } else { columns = LogColumns() }
        let loses = hasUnwrittenRows && columns.count < before.count
        let left = loses ? LeftLog(columns: before, owner: beforeOwner, journal: journal) : nil
        run?.logChanged(.restarted(rows: columns.count))
        session = message.session
        listener = nil
        turn += 1
        refused = []
        lastSequence = 0
        hasUnwrittenRows = columns.count > 0
        let hadFile = journal != nil
        if let left {
            leftCount += 1
            leftJournal = leftJournal ?? left.journal
        } else {
            journal?.close()
        }
        journal = nil
        // A run that logs nothing leaves no file; but what another session left must not stay under the name.
        if hadFile || hasUnwrittenRows { startJournal() }  // guard: cut-in-the-journal (never)
        return left
    }

    /// What `open` gave is in its file, or will be in none.
    func leftIsEnded(isInFile: Bool) {
        leftCount -= 1
        if !isInFile { keepsOldJournal = mayHaveFile }
        guard leftCount == 0 else { return }
        leftJournal?.close()
        leftJournal = nil
        guard !isChangingFile else { return }
        if hasUnwrittenRows { startJournal() } else { removeJournal() }
        if !isChangingFile { fileChanged() }
    }

    var owner: LogOwner? { session.map { LogOwner(session: $0, sequence: lastSequence, before: takenOver) } }

    /// Its rows are in their file, and stay there until more come.
    private func adopt(_ found: FoundEntries) {
        let isKnown = found.columns.count == forgotten.count
        forgotten = (0, nil, nil)
        columns = found.columns
        session = found.owner?.session
        takenOver = found.owner?.before ?? []
        lastSequence = found.owner?.sequence ?? 0
        hasUnwrittenRows = false
        run?.logChanged(.restarted(rows: isKnown ? columns.count : 0))
    }

    private func adopt(_ found: FoundJournal) {
        origin = found.replayed.origin
        session = found.replayed.origin.run.session
        takenOver = found.replayed.origin.takenOver ?? []  // guard: taken-over-in-the-journal (= [])
        columns = found.replayed.log
        // Rows of another daemon, perhaps.
        run?.logChanged(.restarted(rows: 0))
        lastSequence = found.replayed.lastSequence
        hasUnwrittenRows = true
        use(found.file, length: found.replayed.byteCount, keyCount: columns.keys.count)
    }

    /// The run has ended: its file system is not held any more when what is under way has ended (`logHasLetGo`).
    func letGo() {
        isLetGo = true
        guard !isChangingFile, leftCount == 0 else { return }
        if mayHaveFile, !hasUnwrittenRows, !keepsOldJournal { return removeJournal() }
        journal?.close()
        journal = nil
        if let tracker, !hasUnwrittenRows, !keepsOldJournal {
            registration.want(false)
            disks.run(at: tracker.place) {
                Self.hasJournal(tracker)
            } completion: { [registration] hasJournal in
                // One that a daemon before this one left, and that nobody has read yet.
                if hasJournal { return }
                self.inState {
                    registration.removeUnlessWanted(tracker.path)
                } completion: { _ in
                }
            }
        }
        run?.logHasLetGo()
        endWaiting()
    }

    /// Whatever ends, the run stays in the registry.
    func keepRegistered() { registration.want(true) }

    /// Blocks.
    private nonisolated static func hasJournal(_ tracker: RunDirectory) -> Bool {
        do throws(PosixError) {
            return try tracker.find(creates: false)?.has(Journal.fileName) ?? false
        } catch { return true }
    }

    /// Notes down that there is something to find in this directory.
    /// - Parameter completion: with what went wrong. A state directory that hangs is not waited for.
    func register(
        _ tracker: RunDirectory, _ completion: @escaping @Sendable @DaemonActor (PosixError?) -> Void = { _ in }
    ) {
        let answer = Once(completion)
        answer.give(after: Self.stateSeconds) {
            .silence(Self.stateSeconds, "write to \(self.registration.registry.path)")
        }
        inState { [registration] () -> PosixError? in
            do throws(PosixError) { try registration.add(tracker.path) } catch { return error }
            return nil
        } completion: {
            answer.give($0)
        }
    }

    private static let stateSeconds = 2.0

    private func inState<T: Sendable>(
        _ work: @escaping @Sendable () -> T, completion: @escaping @Sendable @DaemonActor (T) -> Void
    ) {
        disks.run(at: .path(registration.registry.path), work, completion: completion)
    }

    /// All of it is in entries.th, and nothing is under way.
    var isSettled: Bool { !hasUnwrittenRows && !isChangingFile && leftCount == 0 && journal == nil }

    /// Who brought the log can't come back to go on with it: that process is dead.
    var isOrphaned: Bool {
        guard let origin, origin.pid > 0 else { return origin == nil }
        return ThisProcess.startTicks(of: origin.pid) != origin.pidStart
    }

    /// The rows are in a durable entries.th, and nobody brings more; how many they were stays known.
    func forgetRows() {
        guard isLetGo, !isChangingFile, leftCount == 0, !hasUnwrittenRows, columns.count > 0 else { return }
        forgotten = (columns.count, columns.lastUpdate, lastWallTime)
        columns = LogColumns()
        session = nil
        lastSequence = 0
    }

    public var rowCount: Int { columns.count > 0 ? columns.count : forgotten.count }
    var lastUpdate: Int64? { columns.lastUpdate ?? forgotten.lastUpdate }
    /// Of the last row, as its trainer said.
    var lastWallTime: Double? {
        guard columns.count > 0 else { return forgotten.wallTime }
        let time = columns.wallTime(row: columns.count - 1)
        return time > 0 ? time : nil
    }
    /// Of this session, what survives the daemon. A client that connects again keeps what comes after it.
    var writtenSequence: UInt64 { hasUnwrittenRows ? min(journal?.written.sequence ?? 0, lastSequence) : lastSequence }
    /// The last update that survives the daemon; nil where none does.
    var writtenUpdate: Int64? { hasUnwrittenRows ? journal?.written.update : lastUpdate }
    /// The last update that survives power loss.
    var durableUpdate: Int64? { hasUnwrittenRows ? journal?.synced.update : lastUpdate }

    /// Since an update came from a trainer; nil where none has.
    public var lastUpdateAgeSeconds: Double? { lastRowSeconds.map { Clock.monotonicSeconds - $0 } }

    /// Rows that the daemon's death would take, and those that power loss would.
    public var rowsNotWritten: Int {
        hasUnwrittenRows ? columns.rowCount(after: journal?.written.update) : 0
    }
    public var rowsNotDurable: Int {
        hasUnwrittenRows ? columns.rowCount(after: journal?.synced.update) : 0
    }

    // MARK: Rows

    /// Of keys in the order given; made where they are new.
    public func columns(for keys: [String]) throws(WireError) -> [Int] { try columns.columns(for: keys) }

    /// - Parameter columnIDs: of the payload's keys, all different.
    public func append(_ payload: LogPayload, columnIDs: [Int], session: String) throws(WireError) {
        guard session == self.session else {  // guard: older-session (always)
            throw WireError(
                .logTakenOver,
                wasTaken(from: session)
                    ? "a newer session brings the log of this run now, and what this one brought before is kept in a file: nothing of "
                        + "this update was logged. Log there, or open the run anew"
                    : "this connection does not bring the log of this run: it was opened without it, or another rank brings it, and "
                        + "only that one and rank 0 may begin another. Nothing of this update was logged. Log on rank 0, or open "
                        + "the run anew")
        }
        // It was sent again after a reconnect, and is here; its acknowledgement may be lost.
        guard payload.sequence > lastSequence else { return acknowledgeSoon() }  // guard: repeated-update (always)
        guard columns.byteCount < byteLimit else {  // guard: bytes-of-a-log (always)
            throw WireError(
                .logFull,
                "the log has \(columns.byteCount) bytes, and at most \(byteLimit) are allowed: what it holds is kept, nothing is added. Raise "
                    + "log_bytes_per_run in the daemon's settings, or log less often"
            )
        }
        try budget.check(own: columns.byteCount)
        let byteCount = columns.byteCount
        // Only to a row of this session: what a session resumes with is as it was.
        // guard: adds-to-its-own-rows (always: lastSequence > 0)
        let isAddition = payload.update == columns.lastUpdate && lastSequence > 0
        if isAddition {
            try columns.addToLastRow(columnIDs: columnIDs, values: payload.values)
        } else {
            try columns.append(
                update: payload.update, columnIDs: columnIDs, values: payload.values,
                wallTime: payload.wallTime)
        }
        budget.added(columns.byteCount - byteCount)
        lastSequence = payload.sequence
        // Refused at first, and sent again in another form.
        if !refused.isEmpty { refused.removeAll { $0.sequence == payload.sequence } }
        hasUnwrittenRows = true
        lastRowSeconds = Clock.monotonicSeconds
        measures.updates += isAddition ? 0 : 1
        measures.scalars += UInt64(payload.values.count)
        var row = payload
        row.keyIDs = columnIDs.map { UInt32($0) }
        defer { run?.logChanged(isAddition ? .added(row, row: columns.count - 1) : .rows) }
        guard let journal else {
            withoutJournalSince = withoutJournalSince ?? lastRowSeconds
            if isChangingFile { noteMeanwhile(payload.sequence, isAddition: isAddition) }
            return startJournal()
        }
        journalKeys()
        journal.append(row)
    }

    /// Whether another session has taken this one's log over.
    func wasTaken(from session: String) -> Bool { takenOver.contains(session) }

    /// An update of this session was not taken, which it may not hear if its connection ends now.
    public func noteRefusal(_ error: ErrorMessage, session: String) {
        guard session == self.session else { return }
        if refused.count >= Limits.failuresRemembered { refused.removeFirst() }
        refused.append(error)
    }

    private func noteMeanwhile(_ sequence: UInt64, isAddition: Bool) {
        if !isAddition {
            sequencesMeanwhile.append(sequence)
        } else if sequencesMeanwhile.isEmpty {
            additionMeanwhile = sequence
        } else {
            sequencesMeanwhile[sequencesMeanwhile.count - 1] = sequence
        }
    }

    private func journalKeys() {
        guard columns.keys.count > journaledKeyCount else { return }
        journal?.append(keys: Array(columns.keys[journaledKeyCount...]), first: journaledKeyCount)
        journaledKeyCount = columns.keys.count
    }

    /// Calls back when the journal of a log that is about to become entries.th says no less than that file will, or when no
    /// journal can be made now.
    /// - Parameter turn: of that log. Another session may have begun since, and left it: the new one's journal waits for the
    ///   files of those before it, so that none of these may wait for it.
    func syncForFile(of turn: Int, _ completion: @escaping @Sendable @DaemonActor () -> Void) {
        guard turn != self.turn, leftCount > 0 else {
            // Another session may begin before the answer: then that is not waited for.
            return sync(orFails: true, again: { self.syncForFile(of: turn, completion) }, completion)
        }
        if let leftJournal { leftJournal.sync { _ in completion() } } else { completion() }
    }

    /// Calls back when every row so far survives power loss, in the journal or in entries.th.
    /// - Parameter orFails: also where no journal can be made now: entries.th does not wait for one.
    public func sync(orFails: Bool = false, _ completion: @escaping @Sendable @DaemonActor () -> Void) {
        sync(orFails: orFails, again: { self.sync(orFails: orFails, completion) }, completion)
    }

    /// - Parameter again: asks once more, when there may be another answer.
    private func sync(
        orFails: Bool, again: @escaping @Sendable @DaemonActor () -> Void,
        _ completion: @escaping @Sendable @DaemonActor () -> Void
    ) {
        if let journal { return journal.sync { isSynced in if isSynced { completion() } else { again() } } }
        if orFails, storage.refusal != nil { return completion() }
        guard isChangingFile || leftCount > 0 || (hasUnwrittenRows && !isLetGo) else { return completion() }
        waitingForFile.append(again)
    }

    private func fileChanged() {
        isChangingFile = false
        endWaiting()
        if isLetGo { letGo() }
    }

    private func endWaiting() {
        let waiting = waitingForFile
        waitingForFile = []
        for callback in waiting { callback() }
    }

    // MARK: The journal's file

    private typealias Made = (file: AppendFile, length: UInt64)

    /// Makes a new journal of what is in memory, under the old one's name at once.
    private func startJournal() {
        // guard: journal-stays-for-the-left-log (always: leftCount == 0)
        guard journal == nil, !isChangingFile, leftCount == 0, !storage.isWaiting, let tracker, let origin
        else { return }
        isChangingFile = true
        // First, so that a daemon that dies behind it leaves nothing that nobody finds.
        register(tracker) { unregistered in
            if let unregistered, !self.hasWarned {
                // The log is as safe as with it, but nobody looks for it.
                self.hasWarned = true
                self.run?.warn(
                    "not in the state directory (\(unregistered)): after a crash its log is found only when it is opened again"
                )
            }
            self.makeJournal(in: self.tracker ?? tracker, self.origin ?? origin)
        }
    }

    private func makeJournal(in tracker: RunDirectory, _ origin: JournalFormat.Origin) {
        mayHaveFile = true
        sequencesMeanwhile = []
        additionMeanwhile = nil
        let snapshot = columns
        let (sequence, keepsOld) = (lastSequence, keepsOldJournal)
        storage.run(
            at: tracker.place, "create the journal in", tracker.path,
            { () throws(PosixError) -> Made in
                try Faults.reach("journal.create")
                let bytes: [UInt8]
                do { bytes = try JournalFormat.encode(origin, snapshot, lastSequence: sequence) } catch {
                    throw PosixError(0, "the journal of a run: \(error)")
                }
                let file = try tracker.use { directory throws(PosixError) in
                    if keepsOld {
                        // Never under two names at once: a daemon that finds such a journal does not append to it.
                        try directory.keepBeside(Journal.fileName, leavesName: false) { "entries.\($0).journal" }
                    }
                    return try AppendFile.replace(Journal.fileName, in: directory, bytes)
                }
                return (file, UInt64(bytes.count))
            },
            refused: { error in if !error.isSilence { self.fileChanged() } },
            // guard: journal-made-again (never: self.hasUnwrittenRows)
            again: { if self.hasUnwrittenRows { self.startJournal() } },
            ended: { result in
                // No refusal ends it.
                if case .success(let (file, length)) = result {
                    if keepsOld { self.keepsOldJournal = false }
                    self.measures.journalBytes += length
                    if let since = self.withoutJournalSince {
                        self.measures.journaled.add(Clock.monotonicSeconds - since)
                        self.measures.synced.add(Clock.monotonicSeconds - since)
                    }
                    self.withoutJournalSince = nil
                    if self.origin == origin {
                        self.use(file, length: length, keyCount: snapshot.keys.count, at: sequence, snapshot)
                        self.journalRows(from: snapshot.count)
                        self.acknowledgeJournaled()
                        if !self.hasUnwrittenRows {
                            // entries.th was faster. A journal left behind would be taken for a newer log.
                            self.isChangingFile = false
                            return self.removeJournal()
                        }
                    } else {
                        // Another session took over meanwhile.
                        self.isChangingFile = false
                        self.startJournal()
                        if !self.isChangingFile { self.fileChanged() }
                        return
                    }
                }
                self.fileChanged()
            })
    }

    /// Rows that came while the file was made, each under its own number: a journal that is cut behind one of them says so.
    private func journalRows(from first: Int) {
        journalKeys()
        // The row as it is now: what of it the file has already takes the same values again.
        if let sequence = additionMeanwhile, first > 0 {  // guard: added-while-the-journal-is-made (never)
            journal?.append(columns.payload(row: first - 1, sequence: sequence))
        }
        additionMeanwhile = nil
        let rows = columns.payloads(rows: first..<columns.count, sequence: 0)
        for (var row, sequence) in zip(rows, sequencesMeanwhile) {
            row.sequence = sequence
            journal?.append(row)
        }
        sequencesMeanwhile = []
    }

    private func use(
        _ file: AppendFile, length: UInt64, keyCount: Int, at sequence: UInt64? = nil,
        _ safe: LogColumns? = nil
    ) {
        let mark = Journal.Watermark(
            sequence: sequence ?? lastSequence, update: (safe ?? columns).lastUpdate)
        journaledKeyCount = keyCount
        mayHaveFile = true
        guard let tracker else { preconditionFailure("a journal in no directory") }
        journal = Journal(
            file, length: length, at: mark, in: tracker, disks: disks, measures: measures
        ) { [weak self] journal in
            guard let self else { return }
            guard self.journal === journal else {
                if journal.isSuspect { journal.abandon() }
                return
            }
            if journal.isSuspect {
                return self.storageFailed()
            }
            self.acknowledgeJournaled()
        }
    }

    /// Nothing of the journal's file is trusted any more, and it is held no longer: a new one comes of what is in memory.
    func storageFailed() {
        leftJournal?.abandon()
        leftJournal = nil
        guard let journal else { return }
        self.journal = nil
        let again: @Sendable @DaemonActor () -> Void = { if self.hasUnwrittenRows { self.startJournal() } }
        if let error = journal.stalled { storage.refuse(error, again: again) } else { storage.pause(again) }
        tracker?.letGo()
        journal.abandon()
    }

    /// The connection hears how far the log is safe, unless a newer one does: what is left of one that its client has
    /// given up may come after the first of its next one.
    func acknowledge(on connection: UInt64, _ acknowledge: @escaping @Sendable @DaemonActor (LogAck) -> Void) {
        guard connection >= listener?.connection ?? 0 else { return }
        listener = (connection, acknowledge)
    }

    func acknowledgeNoMore(on connection: UInt64) {
        if listener?.connection == connection { listener = nil }
    }

    private func acknowledgeJournaled() {
        guard let journal else { return }
        listener?.acknowledge(
            LogAck(
                sequence: journal.written.sequence, update: journal.written.update ?? .min,
                durableUpdate: journal.synced.update))
    }

    private func acknowledgeInFile() {
        listener?.acknowledge(
            LogAck(
                sequence: lastSequence, update: columns.lastUpdate ?? .min, durableUpdate: columns.lastUpdate))
    }

    private var isAcknowledgementDue = false

    /// Once for many updates that come again.
    private func acknowledgeSoon() {
        guard !isAcknowledgementDue else { return }
        isAcknowledgementDue = true
        DaemonActor.enter(after: Journal.groupSeconds) {
            self.isAcknowledgementDue = false
            // Without a journal for rows that are in no file yet, its making reports them.
            if self.hasUnwrittenRows { self.acknowledgeJournaled() } else { self.acknowledgeInFile() }
        }
    }

    /// entries.th holds a session's log up to a number, durably. Where that is all, the journal has done its work.
    func isInFile(_ written: LogOwner?) {
        guard written == owner else { return }  // guard: journal-stays-for-later-rows (always)
        hasUnwrittenRows = false
        acknowledgeInFile()
        removeJournal()
    }

    private func removeJournal() {
        guard mayHaveFile, !keepsOldJournal, let tracker, !isChangingFile, leftCount == 0 else { return }
        let file = journal?.file
        journal?.close()
        journal = nil
        removeFile(in: tracker, file)
    }

    /// - Parameter file: the lock on it is held until it is gone.
    private func removeFile(in tracker: RunDirectory, _ file: AppendFile?) {
        isChangingFile = true
        storage.run(
            at: tracker.place, "remove the journal in", tracker.path,
            { () throws(PosixError) in
                guard let tracker = try tracker.find(creates: false) else { return }
                do throws(PosixError) { try tracker.remove(Journal.fileName) } catch {
                    if !error.isMissing { throw error }
                }
                try tracker.sync()
            },
            again: {
                // Left behind, it would be taken for a log that is in no file.
                self.removeFile(in: tracker, file)
            },
            ended: { _ in
                withExtendedLifetime(file) {}
                self.mayHaveFile = false
                self.fileChanged()
                // Rows that came while the file was being removed.
                if self.hasUnwrittenRows { self.startJournal() }
            })
    }
}
