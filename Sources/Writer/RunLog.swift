/// A run's log: the columns in memory, whose session brings it, and the journal that survives the daemon. Owned by the intake
/// queue. Making entries.th of it is the run's job.
import Dispatch
import Posix
public import Wire

/// What a daemon before this one left: its journal, held by this one now.
struct FoundJournal: Sendable {
    var replayed: JournalFormat.Replayed
    var file: AppendFile
}

@Intake
public final class RunLog {
    public private(set) var columns = LogColumns()
    /// Who brings the log; a newer session takes it over.
    public private(set) var session: String?
    /// The last row taken, so that what is sent again is dropped.
    public private(set) var lastSequence: UInt64 = 0
    /// Rows that no durable entries.th holds.
    public private(set) var hasUnwrittenRows = false

    private let disks: DiskQueues
    private let registry: RunRegistry
    private var origin: JournalFormat.Origin?
    private var tracker: Directory?
    private var journal: Journal?
    private var journaledKeyCount = 0
    /// A file operation on the journal's name is under way: making it, or removing it.
    private var isChangingFile = false
    /// Nobody brings or writes this log now; what is under way ends first.
    private var isLetGo = false
    private var waitingForFile: [@Sendable @Intake () -> Void] = []
    private var attempt = 0
    private var fileError: PosixError?
    /// Hears, in words, of what is not as safe as it should be.
    var warn: (@Sendable @Intake (String) -> Void)?
    private var hasWarned = false
    /// Hears how far the log is safe.
    public var acknowledge: (@Sendable @Intake (LogAck) -> Void)?

    private let byteLimit: Int

    init(disks: DiskQueues, registry: RunRegistry, byteLimit: Int) {
        self.byteLimit = byteLimit
        self.disks = disks
        self.registry = registry
    }

    public var stalled: String? { (journal?.stalled ?? fileError).map { "the log's journal: \($0)" } }

    // MARK: Sessions

    /// - Returns: a log of another session that is in no file yet, and must not be lost.
    func open(_ message: OpenRun, pid: Int32, in tracker: Directory, found: FoundJournal?) -> LogColumns? {
        self.tracker = tracker
        isLetGo = false
        if let found { adopt(found, in: tracker) }
        origin = JournalFormat.Origin(run: message, pid: pid, pidStart: Process.startTicks(of: pid) ?? 0)
        // config.yaml is written; the journal need not carry it.
        origin?.run.configYaml = nil
        guard session != message.session else {
            if hasUnwrittenRows { startJournal() }
            return nil
        }
        let left = hasUnwrittenRows ? columns : nil
        if let update = message.resumeAt { columns.cut(after: update) } else { columns = LogColumns() }
        session = message.session
        lastSequence = 0
        hasUnwrittenRows = columns.count > 0
        let hadFile = journal != nil
        journal?.close()
        journal = nil
        // A run that logs nothing leaves no file; but what another session left must not stay under the name.
        if hadFile || hasUnwrittenRows { startJournal() }
        return left
    }

    func adopt(_ found: FoundJournal, in tracker: Directory) {
        self.tracker = tracker
        origin = found.replayed.origin
        session = found.replayed.origin.run.session
        columns = found.replayed.log
        lastSequence = found.replayed.lastSequence
        hasUnwrittenRows = true
        use(found.file, length: found.replayed.byteCount, keyCount: columns.keys.count)
    }

    /// The run has ended: its file system is not held any more.
    func letGo() {
        isLetGo = true
        guard !isChangingFile else { return }
        if journal != nil, !hasUnwrittenRows { return removeJournal() }
        journal?.close()
        journal = nil
        tracker = nil
    }

    /// All of it is in entries.th, and nothing is under way.
    var isSettled: Bool { !hasUnwrittenRows && !isChangingFile && journal == nil }

    /// Who brought the log can't come back to go on with it: that process is dead.
    var isOrphaned: Bool {
        guard let origin, origin.pid > 0 else { return origin == nil }
        return Process.startTicks(of: origin.pid) != origin.pidStart
    }

    /// The log is in its file, and nobody goes on with it: a next session brings what it wants from there.
    func forget() {
        precondition(isSettled, "a log is forgotten before it is in a file")
        (forgottenRows, forgottenUpdate) = (rowCount, lastUpdate)
        columns = LogColumns()
        session = nil
        lastSequence = 0
    }

    private var forgottenRows = 0
    private var forgottenUpdate: Int64?
    /// For `status`: of the log that is there, or was.
    public var rowCount: Int { max(columns.count, session == nil ? forgottenRows : 0) }
    public var lastUpdate: Int64? { columns.lastUpdate ?? (session == nil ? forgottenUpdate : nil) }

    // MARK: Rows

    /// Of keys in the order given; made where they are new.
    public func columns(for keys: [String]) throws(WireError) -> [Int] { try columns.columns(for: keys) }

    /// - Parameter columnIDs: of the payload's keys, all different.
    public func append(_ payload: LogPayload, columnIDs: [Int], session: String) throws(WireError) {
        guard session == self.session else {
            throw WireError(.logTakenOver, "a newer connection brings the log of this run now")
        }
        guard payload.sequence > lastSequence else { return }
        guard columns.byteCount < byteLimit else {
            throw WireError(
                .logFull,
                "the log holds \(columns.byteCount) bytes; at most \(byteLimit) (log_bytes_per_run): nothing is added"
            )
        }
        try columns.append(update: payload.update, columnIDs: columnIDs, values: payload.values)
        lastSequence = payload.sequence
        hasUnwrittenRows = true
        guard let journal else { return startJournal() }
        journalKeys()
        var row = payload
        row.keyIDs = columnIDs.map { UInt32($0) }
        journal.append(row)
    }

    private func journalKeys() {
        guard columns.keys.count > journaledKeyCount else { return }
        journal?.append(keys: Array(columns.keys[journaledKeyCount...]), first: journaledKeyCount)
        journaledKeyCount = columns.keys.count
    }

    /// Calls back when every row so far survives power loss, in the journal or in entries.th (or there is no journal to say so).
    public func sync(_ completion: @escaping @Sendable @Intake () -> Void) {
        if let journal { return journal.sync(completion) }
        guard isChangingFile else { return completion() }
        waitingForFile.append { self.sync(completion) }
    }

    private func fileChanged() {
        isChangingFile = false
        let waiting = waitingForFile
        waitingForFile = []
        for callback in waiting { callback() }
        if isLetGo { letGo() }
    }

    // MARK: The journal's file

    /// Makes a new journal of what is in memory, under the old one's name at once.
    private func startJournal() {
        guard journal == nil, !isChangingFile, let tracker, let origin else { return }
        isChangingFile = true
        let snapshot = columns
        let sequence = lastSequence
        disks.run({
            [registry] () -> Result<(file: AppendFile, length: UInt64, unregistered: PosixError?), PosixError>
            in
            do {
                try Faults.reach("journal.create")
                let bytes = try JournalFormat.encode(origin, snapshot, lastSequence: sequence)
                let file = try AppendFile.replace(Journal.fileName, in: tracker, bytes)
                var unregistered: PosixError?
                do throws(PosixError) { try registry.add(tracker.path) } catch { unregistered = error }
                return .success((file, UInt64(bytes.count), unregistered))
            } catch let error as PosixError {
                return .failure(error)
            } catch { return .failure(PosixError(0, "the journal of a run: \(error)")) }
        }) { result in
            switch result {
            case .failure(let error):
                self.fileError = error
                let delay = Run.retryDelay(self.attempt)
                self.attempt += 1
                Intake.enter(after: delay) { [weak self] in
                    if self?.hasUnwrittenRows == true { self?.startJournal() }
                }
            case .success(let (file, length, unregistered)):
                self.fileError = nil
                if let unregistered, !self.hasWarned {
                    // The log is as safe as with it, but nobody looks for it.
                    self.hasWarned = true
                    self.warn?(
                        "not in the state directory (\(unregistered)): after a crash its log is found only when it is opened again"
                    )
                }
                self.attempt = 0
                if self.origin == origin {
                    self.use(file, length: length, keyCount: snapshot.keys.count, at: sequence, snapshot)
                    self.journalRows(from: snapshot.count)
                    self.report()
                    if !self.hasUnwrittenRows {
                        // entries.th was faster. A journal left behind would be taken for a newer log.
                        self.isChangingFile = false
                        return self.removeJournal()
                    }
                } else {
                    // Another session took over meanwhile.
                    self.isChangingFile = false
                    return self.startJournal()
                }
            }
            self.fileChanged()
        }
    }

    private func journalRows(from first: Int) {
        journalKeys()
        for row in columns.payloads(rows: first..<columns.count, sequence: lastSequence) {
            journal?.append(row)
        }
    }

    private func use(
        _ file: AppendFile, length: UInt64, keyCount: Int, at sequence: UInt64? = nil,
        _ safe: LogColumns? = nil
    ) {
        let mark = Journal.Watermark(
            sequence: sequence ?? lastSequence, update: (safe ?? columns).lastUpdate)
        journaledKeyCount = keyCount
        journal = Journal(file, length: length, at: mark, disks: disks) { [weak self] journal in
            guard let self, self.journal === journal else { return }
            if journal.isSuspect {
                // fdatasync failed: nothing of this file is trusted any more.
                journal.close()
                self.journal = nil
                self.fileError = journal.stalled
                return self.startJournal()
            }
            self.report()
        }
    }

    private func report() {
        guard let journal else { return }
        acknowledge?(
            LogAck(
                sequence: journal.written.sequence, update: journal.written.update ?? .min,
                durableUpdate: journal.synced.update))
    }

    /// entries.th holds the first `rows` rows, durably. Where these are all, the journal has done its work.
    func isInFile(rows: Int) {
        guard rows == columns.count else { return }
        hasUnwrittenRows = false
        acknowledge?(
            LogAck(
                sequence: lastSequence, update: columns.lastUpdate ?? .min, durableUpdate: columns.lastUpdate)
        )
        removeJournal()
    }

    private func removeJournal() {
        guard let journal, let tracker, !isChangingFile else { return }
        journal.close()
        self.journal = nil
        isChangingFile = true
        disks.run({ [registry] () -> PosixError? in
            do throws(PosixError) {
                try tracker.remove(Journal.fileName)
                try tracker.sync()
                try registry.remove(tracker.path)
                return nil
            } catch { return error }
        }) { error in
            if let error { self.fileError = error }
            withExtendedLifetime(journal) {}
            self.fileChanged()
            // Rows that came while the file was being removed.
            if self.hasUnwrittenRows { self.startJournal() }
        }
    }
}
