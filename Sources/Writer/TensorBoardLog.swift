// SPDX-License-Identifier: Apache-2.0
/// TensorBoard's event files of a run, `events.out.tfevents...` in its directory, written from the log's columns as it comes: a batch a second at
/// the most, on disk queues that nothing else uses. Owned by the daemon's queue.
///
/// They are for the eye: not synced, and a disk that refuses or hangs stops nothing; they are behind then, and catch up. How far a
/// log is shown is read from the files themselves when a session begins, so that one that goes on after a crash, or resumes at an
/// update, adds a file that takes back what lies behind that update and nothing else. A log that begins anew takes the place of all.
import Dispatch
import Posix
import TensorBoard
import Wire

public enum TensorBoardPolicy: String, Sendable {
    case onRequest = "on-request"
    case always
    case never

    /// - Parameter asked: by the run; nil where it says nothing.
    func allows(_ asked: Bool?) -> Bool {
        switch self {
        case .onRequest: asked == true
        case .always: asked != false
        case .never: false
        }
    }

    func decided(_ message: OpenRun) -> OpenRun {
        var message = message
        message.tensorboard = allows(message.tensorboard)
        return message
    }
}

@DaemonActor
final class TensorBoardLog: RunObserver {
    private static let groupSeconds = 1.0
    /// Rows are taken out of the columns on the daemon's queue: so much at once, with pauses, while trainers want their turns.
    private static let pauseSeconds = 0.1
    private static let valuesAtOnce = 30_000
    private static let rowsAtOnce = 10_000
    /// Behind a run's end they are taken on the disk queue.
    private static let valuesAtEnd = 1 << 20
    /// Behind a run's end, so often, for a minute in all; then the log in memory is not kept for this any longer.
    private static let triesAtEnd = 7

    private let disks: DiskQueues
    private let warn: @Sendable @DaemonActor (String) -> Void
    private weak var run: Run?
    /// nil: the run has ended, and nothing is left to do.
    private var directory: RunDirectory?
    /// nil: one is to be begun.
    private var file: EventFileOnDisk?
    /// Of what the files hold when one is begun, what stays: up to this update; nil: nothing.
    private var keptUpdate: Int64?
    /// The next row.
    private var position = 0
    /// The first row that is in no write, neither done nor under way.
    private var taken = 0
    /// What was added to the last one of the rows that are in one, by update.
    private var additions: [LogPayload] = []
    private var hasSummary = false
    private var isWriting = false
    private var isScheduled = false
    private lazy var storage = StorageJob(disks, .always) { [weak self] in self?.directory?.letGo() }
    private var hasComplained = false
    private var callbacks: [@Sendable @DaemonActor () -> Void] = []

    init(disks: DiskQueues, warn: @escaping @Sendable @DaemonActor (String) -> Void) {
        self.disks = disks
        self.warn = warn
    }

    /// A trainer brings the log, or a daemon before this one left it.
    /// - Parameter session: whether it is a new one, that keeps the log up to `keeping` (nil: nothing of it).
    func open(_ run: Run, in directory: RunDirectory, isNewSession: Bool, keeping: Int64?) {
        self.run = run
        self.directory = directory
        hasSummary = false
        if isNewSession {
            file = nil
            additions = []
            keptUpdate = keeping
        }
        schedule(after: Self.groupSeconds)
    }

    func changed(_ run: Run, _ change: RunChange) {
        switch change {
        case .rows: schedule(after: Self.groupSeconds)
        case .added(let values, let row):
            if row < taken { note(addition: values) }
            schedule(after: Self.groupSeconds)
        // The last rows, and the summary.
        case .state where run.state != .running: schedule(after: 0)
        case .state, .restarted, .checkpoint: break
        }
    }

    /// Of a key that comes again and again while a disk hangs, the last value is kept.
    private func note(addition: LogPayload) {
        guard var known = additions.popLast() else { return additions.append(addition) }
        guard known.update == addition.update else { return additions += [known, addition] }
        for (id, value) in zip(addition.keyIDs, addition.values) {
            if let position = known.keyIDs.firstIndex(of: id) {
                known.values[position] = value
            } else {
                known.keyIDs.append(id)
                known.values.append(value)
            }
        }
        additions.append(known)
    }

    var wantsRows: Bool {
        guard directory != nil, let run else { return false }
        guard file != nil else { return run.log.columns.count > 0 }
        return position < run.log.columns.count || !additions.isEmpty
    }

    /// Calls back when all that there is now is with the file system, or it has been given up. Of a run that has ended.
    func whenDone(_ callback: @escaping @Sendable @DaemonActor () -> Void) {
        if directory == nil { callback() } else { callbacks.append(callback) }
    }

    /// Nothing is left to do, of a run that has ended.
    var isDone: Bool { directory == nil }

    private func schedule(after seconds: Double) {
        guard directory != nil, !isWriting, !(isScheduled || storage.isWaiting) || seconds == 0 else { return }
        isScheduled = true
        DaemonActor.enter(after: seconds) {
            self.isScheduled = false
            self.write()
        }
    }

    private func close() {
        directory = nil
        file = nil
        additions = []
        // A trainer that comes again with its session goes on behind what there is.
        keptUpdate = .max
        let waiting = callbacks
        callbacks = []
        for callback in waiting { callback() }
        run?.hasRead()
    }

    // MARK: The way to the disk

    private func write() {
        guard let directory, let run, !isWriting else { return }
        guard let file else { return begin(in: directory, run) }
        let log = run.log.columns
        let hasEnded = run.state != .running
        let range = log.rows(
            from: position, holding: hasEnded ? Self.valuesAtEnd : Self.valuesAtOnce,
            atMost: hasEnded ? log.count : Self.rowsAtOnce)
        let addsSummary = hasEnded && range.upperBound == log.count && log.count > 0 && !hasSummary
        guard !range.isEmpty || !additions.isEmpty || addsSummary else {
            if hasEnded { close() }
            return
        }
        let added = additions
        additions = []
        taken = range.upperBound
        let keys = log.keys
        let rows = hasEnded ? [] : Array(log.payloads(rows: range, sequence: 0))
        let ended = hasEnded ? log : nil
        inDirectory(directory) { () throws(PosixError) in
            var bytes: [UInt8] = []
            for values in added { file.append(additional: values, keys, to: &bytes) }
            if let ended {
                for row in ended.payloads(rows: range, sequence: 0) { file.append(row, keys, to: &bytes) }
                if addsSummary { EventFileOnDisk.appendSummary(of: ended, to: &bytes) }
            } else {
                for row in rows { file.append(row, keys, to: &bytes) }
            }
            return try file.write(bytes, in: directory.open())
        } failed: {
            guard self.file?.name == file.name else { return }
            // What was added meanwhile to a row that is not written is read with it.
            let written = run.log.columns.update(before: self.position)
            self.additions = (added + self.additions).filter { $0.update <= written }
            self.taken = self.position
        } completion: { written in
            // A session that began meanwhile has reset it.
            guard self.file?.name == file.name else { return self.write() }
            guard let written else {
                // Somebody has removed or cut it: a new one, with all that the others do not show.
                self.file = nil
                self.additions = added + self.additions
                self.keptUpdate = .max
                return self.write()
            }
            self.file = written
            self.position = range.upperBound
            if addsSummary { self.hasSummary = true }
            if hasEnded {
                self.write()
            } else if self.position < run.log.columns.count || !self.additions.isEmpty {
                let isBehind = range.count == Self.rowsAtOnce || self.position < log.count
                self.schedule(after: isBehind ? Self.pauseSeconds : Self.groupSeconds)
            } else if run.state != .running {
                self.write()
            }
        }
    }

    private func begin(in directory: RunDirectory, _ run: Run) {
        let log = run.log.columns
        let (asked, hasEnded) = (keptUpdate, run.state != .running)
        // Whether a row that was added to is shown whole can't be seen: it is shown anew.
        let kept =
            asked == .max && log.hasAddedToLastRow ? log.lastUpdate.map { max($0, .min + 1) - 1 } : asked
        taken = log.count
        let updates = log.lastUpdate.map { log.update(row: 0)...$0 }
        inDirectory(directory) { () throws(PosixError) in
            try EventFileOnDisk.begin(
                in: directory.open(), keeping: kept, updates: updates, hasSummary: hasEnded)
        } completion: { begun in
            guard self.file == nil, self.keptUpdate == asked else { return self.write() }
            guard let begun else {
                // Nothing to show, nothing to take back.
                if hasEnded { return self.close() }
                if run.state != .running { return self.write() }
                if run.log.columns.lastUpdate != updates?.upperBound {
                    self.schedule(after: Self.groupSeconds)
                }
                return
            }
            self.file = begun
            let columns = run.log.columns
            self.position = columns.count - columns.rowCount(after: begun.shownUpdate)
            self.taken = self.position
            let shown = columns.update(before: self.position)
            self.additions.removeAll { $0.update > shown }
            self.write()
        }
    }

    /// - Parameters:
    ///   - failed: called where storage refuses, before it is tried again.
    ///   - completion: not called then.
    private func inDirectory<T: Sendable>(
        _ directory: RunDirectory, _ work: @escaping @Sendable () throws(PosixError) -> T,
        failed: @escaping @Sendable @DaemonActor () -> Void = {},
        completion: @escaping @Sendable @DaemonActor (T) -> Void
    ) {
        isWriting = true
        storage.run(
            at: directory.place, "write", "\(directory.path)/\(EventFileOnDisk.prefix)...", work,
            refused: { error in
                self.complain(error)
                guard !error.isSilence else { return }
                self.isWriting = false
                failed()
                if self.run?.state != .running, self.storage.refusals >= Self.triesAtEnd { self.close() }
            },
            again: {
                self.write()
            },
            ended: { result in
                self.isWriting = false
                self.hasComplained = false
                // No refusal ends it.
                if case .success(let value) = result { completion(value) }
            })
    }

    /// Once for each trouble.
    private func complain(_ error: PosixError) {
        guard !hasComplained else { return }
        hasComplained = true
        warn("TensorBoard's event file is late: \(error); the log itself is not affected")
    }
}
