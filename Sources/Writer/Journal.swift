// SPDX-License-Identifier: Apache-2.0
/// A run's journal on its way to the disk: rows go out in groups, are acknowledged once they are with the file system, and
/// become durable about once a second. Owned by the daemon's queue; the file itself is touched on the journal queues only, which
/// are apart from those of checkpoints, so that an acknowledgement does not wait for gigabytes.
import Dispatch
import Posix
import Wire

@DaemonActor
final class Journal {
    nonisolated static let fileName = "entries.journal"
    /// Rows that come within this time are written together.
    static let groupSeconds = 0.02
    static let syncSeconds = 1.0
    private static let lookSeconds = 2.0

    struct Watermark: Sendable {
        var sequence: UInt64
        var update: Int64?
    }

    let file: AppendFile
    private let disks: DiskQueues
    private let measures: Measures
    /// When the first row came that is not with the file system, and the first that is not durable, in monotonic seconds.
    private var unwrittenSince: Double?
    private var unsyncedSince: Double?
    private let directory: RunDirectory
    /// What is with the file system, in bytes.
    private var length: UInt64
    private var pending: [UInt8] = []
    private var appended: Watermark
    /// With the file system: survives the daemon.
    private(set) var written: Watermark
    /// Survives power loss.
    private(set) var synced: Watermark
    private var isWriting = false
    private var isScheduled = false
    private var isClosed = false
    private var lastSync = Clock.monotonicSeconds
    /// Called when a watermark has moved, and when storage refuses.
    private let progress: @Sendable @DaemonActor (Journal) -> Void
    /// If only room is missing, the same bytes are written to the same place later.
    private lazy var storage = StorageJob(disks)
    /// Why nothing of the file is trusted any more: fdatasync failed, and what was written since the last good one may be gone,
    /// whatever a next one says; the file can't be written any more, for another reason than room; or its name is gone. Who hears
    /// of it makes a whole new one.
    private var suspicion: PosixError?
    var isSuspect: Bool { suspicion != nil }
    var stalled: PosixError? { suspicion ?? storage.refusal }
    /// With whether it is so: an abandoned journal says no.
    private var whenSynced: [(sequence: UInt64, callback: @Sendable @DaemonActor (Bool) -> Void)] = []

    /// - Parameter length: of what the file holds, all of it durable.
    init(
        _ file: AppendFile, length: UInt64, at watermark: Watermark, in directory: RunDirectory,
        disks: DiskQueues, measures: Measures,
        progress: @escaping @Sendable @DaemonActor (Journal) -> Void
    ) {
        self.file = file
        self.length = length
        self.disks = disks
        self.directory = directory
        self.measures = measures
        self.progress = progress
        appended = watermark
        written = watermark
        synced = watermark
        look()
    }

    func append(keys: [String], first: Int) { JournalFormat.append(keys: keys, first: first, to: &pending) }

    func append(_ row: LogPayload) {
        JournalFormat.append(row, to: &pending)
        appended = Watermark(sequence: row.sequence, update: row.update)
        if unwrittenSince == nil { unwrittenSince = Clock.monotonicSeconds }
        schedule()
    }

    /// Calls back when everything appended so far is durable, or the journal is closed.
    func sync(_ completion: @escaping @Sendable @DaemonActor (Bool) -> Void) {
        guard !isClosed, synced.sequence < appended.sequence else { return completion(true) }
        whenSynced.append((appended.sequence, completion))
        if !isWriting { write() }
    }

    /// Nothing more is written: the log is safe elsewhere, or the file goes on without this object.
    func close() {
        isClosed = true
        endWaiting()
    }

    /// Nothing more is written, and what was is not safe.
    func abandon() {
        isClosed = true
        endWaiting(isSynced: false)
    }

    private func endWaiting(isSynced: Bool = true) {
        let waiting = whenSynced
        whenSynced = []
        for (_, callback) in waiting { callback(isSynced) }
    }

    /// Of those who wait for what is durable by now; rows that came later are no concern of theirs.
    private func tellSynced() {
        let ended = whenSynced.filter { $0.sequence <= synced.sequence }
        whenSynced.removeAll { $0.sequence <= synced.sequence }
        for (_, callback) in ended { callback(true) }
    }

    private func schedule() {
        guard !isScheduled, !isWriting else { return }
        isScheduled = true
        DaemonActor.enter(after: Self.groupSeconds) {
            self.isScheduled = false
            if !self.isWriting { self.write() }
        }
    }

    private func write() {
        guard !isClosed else { return }
        let bytes = pending
        let mark = appended
        let wantsSync = !whenSynced.isEmpty || Clock.monotonicSeconds - lastSync >= Self.syncSeconds
        guard !bytes.isEmpty || wantsSync else { return }
        pending = []
        isWriting = true
        let since = unwrittenSince
        unwrittenSince = nil
        unsyncedSince = unsyncedSince ?? since
        let offset = length
        storage.run(
            at: directory.place, "write", file.path,
            { [file, directory] () throws(PosixError) -> PosixError? in
                do throws(PosixError) {
                    try Faults.reach("journal.write")
                    try file.write(bytes, at: offset)  // guard: journal-written (skip)
                } catch {
                    if error.isLackOfRoom { throw error }
                    return error
                }
                do throws(PosixError) {
                    if wantsSync { try file.sync() }
                    return try Self.isInPlace(file, directory) ? nil : Self.lost(file)
                } catch { return error }
            },
            refused: { error in
                guard !error.isSilence, !self.isClosed else { return }
                self.putBack(bytes, since)
                self.progress(self)
            },
            again: {
                self.isWriting = false
                self.write()  // guard: journal-written-again (skip)
            },
            ended: { result in
                self.isWriting = false
                guard !self.isClosed, case .success(let suspicion) = result else { return }
                if suspicion != nil {
                    self.suspicion = suspicion
                    self.putBack(bytes, since)
                    return self.progress(self)
                }
                self.length += UInt64(bytes.count)
                self.written = mark
                Heap.noteFreed(bytes.count)
                self.measures.journalBytes += UInt64(bytes.count)
                let now = Clock.monotonicSeconds
                if let since { self.measures.journaled.add(now - since) }
                if wantsSync {  // guard: durable-behind-sync (always)
                    if let since = self.unsyncedSince { self.measures.synced.add(now - since) }
                    self.unsyncedSince = nil
                    self.synced = mark
                    self.lastSync = Clock.monotonicSeconds
                    self.tellSynced()
                }
                self.progress(self)
                if !self.pending.isEmpty || !self.whenSynced.isEmpty {
                    self.schedule()
                } else if self.synced.sequence < self.written.sequence {
                    self.scheduleSync()  // guard: synced-within-a-second (skip)
                }
            })
    }

    /// Whether its name leads to it. One that somebody has removed or moved is no safety: a daemon after this one would not
    /// find it. Blocks.
    private nonisolated static func isInPlace(_ file: AppendFile, _ directory: RunDirectory) throws(PosixError) -> Bool
    {
        guard let found = try directory.find(creates: false) else { return false }
        return try file.isNamed(fileName, in: found)  // guard: journal-under-its-name (= true)
    }

    private nonisolated static func lost(_ file: AppendFile) -> PosixError {
        .missing("find \(file.path), which somebody has removed or moved")
    }

    /// Also while nothing comes: what was acknowledged before must stay safe.
    private func look() {
        DaemonActor.enter(after: Self.lookSeconds) { [weak self] in
            guard let self, !self.isClosed else { return }
            self.disks.run(at: self.directory.place) { [file, directory] () -> Bool in
                // Storage that refuses says so when there is something to write.
                (try? Self.isInPlace(file, directory)) ?? true
            } completion: { isInPlace in
                guard !self.isClosed else { return }
                if isInPlace { return self.look() }
                self.suspicion = Self.lost(self.file)
                self.progress(self)
            }
        }
    }

    private func scheduleSync() {
        let wait = max(0, Self.syncSeconds - (Clock.monotonicSeconds - lastSync))
        DaemonActor.enter(after: wait) { [weak self] in
            guard let self, !self.isWriting, self.synced.sequence < self.written.sequence else { return }
            self.lastSync = 0
            self.write()
        }
    }

    /// Bytes that are not written.
    private func putBack(_ bytes: [UInt8], _ since: Double?) {
        pending = bytes + pending
        unwrittenSince = since ?? unwrittenSince
    }
}
