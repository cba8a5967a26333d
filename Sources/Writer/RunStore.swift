// SPDX-License-Identifier: Apache-2.0
/// The daemon's runs: the live ones, those brought back from a daemon before this one, and the last ended ones for `status`.
/// Owned by the daemon's queue.
import Dispatch
public import Posix
public import Wire

@DaemonActor
public final class RunStore {
    /// For how long a run that was brought back waits for its living trainer to connect, in seconds.
    public static let reconnectSeconds = 60.0

    /// How long an open_run waits for a run that somebody else holds, and how often it looks.
    private static let patienceSeconds = 3.0
    private static let lookSeconds = 0.1

    private static let endedLogsKept = 8

    private let disks: DiskQueues
    private let journalDisks: DiskQueues
    private let eventDisks: DiskQueues
    /// Which runs have event files.
    public var tensorboard = TensorBoardPolicy.onRequest
    private let registry: RunRegistry
    private let index: RunIndex
    /// Runs that the index lacks, and whether it is being written.
    private var unindexed: [RunIndex.Entry] = []
    private var isIndexing = false
    public var keeper: any SnapshotKeeper = NoKeeper() { didSet { paths.keeper = keeper } }
    /// Whether a daemon that leaves still writes for its runs, and so holds them.
    public var hasPredecessor: @Sendable () -> Bool = { false }
    public var report: @Sendable (RunEvent) -> Void = { _ in } { didSet { paths.report = report } }
    public let measures = Measures()
    /// Files of no run.
    public let paths: PathStore
    private var runs: [RunName: Run] = [:]
    /// Names in order of opening, for listing and forgetting.
    private var order: [RunName] = []
    /// One open of a run at a time: the next ones wait here.
    private var opening: [OwnedFD.Identity: [@Sendable @DaemonActor () -> Void]] = [:]
    /// Directories whose journals are being read, and opens of their runs: these wait, and others don't.
    private var recovering: [ByteName: [@Sendable @DaemonActor () -> Void]] = [:]
    /// Snapshots that a daemon before this one had accepted, and that are in no run yet: their storage refuses for now,
    /// or does not answer. By the order in which they came.
    private var unrestored: [Int: (runID: String, why: Waited.Failure)] = [:]
    private var restoreCount = 0
    private var restoreWaiters: [(runID: String?, answer: @Sendable @DaemonActor () -> Void)] = []
    /// Opens of runs whose journals somebody holds, which may be this daemon itself, by another path.
    private var heldOpens: [@Sendable @DaemonActor () -> Void] = []

    private let logBytesPerRun: Int
    private let logBudget: LogBudget
    private let retention: Retention
    public let budget: SnapshotBudget
    public let vault: SnapshotVault
    /// The umask of runs whose `open_run` has none.
    private let fileModeMask: UInt32

    public nonisolated init(
        diskQueues: Int, stateDirectory: String, logBytesPerRun: Int, logBytes: Int = .max,
        retention: Retention,
        budget: SnapshotBudget, vault: SnapshotVault = SnapshotVault(limit: 0), fileModeMask: UInt32
    ) {
        self.fileModeMask = fileModeMask
        self.budget = budget
        self.vault = vault
        self.logBytesPerRun = logBytesPerRun
        logBudget = LogBudget(limit: logBytes)
        self.retention = retention
        disks = DiskQueues(count: diskQueues, name: "disk")
        journalDisks = DiskQueues(count: 2, name: "journal")
        eventDisks = DiskQueues(count: 1, name: "event")
        registry = RunRegistry(path: stateDirectory + "/runs")
        index = RunIndex(in: stateDirectory)
        paths = PathStore(
            disks: disks, budget: budget, vault: vault, measures: measures, fileModeMask: fileModeMask)
    }

    public func startVault() { vault.attach(to: budget) }

    /// Pieces of work at this moment, and when the running one that has been silent longest last moved (monotonic).
    public var queueDepths: [(name: String, running: Int, waiting: Int, oldestProgressSeconds: Double?)] {
        [disks, journalDisks, eventDisks].map {
            ($0.name, $0.runningCount, $0.waitingCount, $0.oldestProgressSeconds)
        }
    }

    public var all: [Run] { order.compactMap { runs[$0] } }
    /// By its id; of several, the living one, or the one opened last.
    public func find(_ runID: String, directory: String?) -> Run? {
        let found = all.filter {
            $0.name.runID.isSame(as: runID)
                && (directory ?? $0.name.directory).isSame(as: $0.name.directory)
        }
        return found.last { $0.isLive } ?? found.last
    }

    public var isIdle: Bool {
        recovering.isEmpty && unrestored.isEmpty && paths.isIdle && !vault.isWaiting
            && runs.values.allSatisfy { $0.isIdle && !$0.isLive && $0.areEventFilesWritten }
    }

    private typealias Opened = @Sendable @DaemonActor (Result<Run, WireError>) -> Void

    /// Opens the run's directories on a disk queue, then answers on the daemon's queue with the run attached. A run that somebody
    /// else holds is waited for, a short while: a trainer that is started again may come before the end of the one before it.
    /// - Parameter root: the output root as the trainer has opened it; nil: its path is all that is known.
    public func open(
        _ name: RunName, _ message: OpenRun, root: OwnedFD?, peer: PeerCredentials,
        completion: @escaping @Sendable @DaemonActor (Result<Run, WireError>) -> Void
    ) {
        find(name, message, root: root, peer: peer, until: Clock.monotonicSeconds + Self.patienceSeconds, completion)
    }

    /// Which run it is: the directory says it, not the spelling of its path.
    private func find(
        _ name: RunName, _ message: OpenRun, root: OwnedFD?, peer: PeerCredentials, until deadline: Double,
        _ completion: @escaping Opened
    ) {
        let tracker = ByteName("\(name.directory)/tracker")
        if recovering[tracker] != nil {
            recovering[tracker]?.append {
                self.find(name, message, root: root, peer: peer, until: deadline, completion)
            }
            return
        }
        disks.run(
            at: .path(name.outputRoot),
            { [mask = mask(of: message.umask)] () -> Result<Directory, WireError> in
                do throws(PosixError) { return .success(try Self.home(of: name, root: root, mask: mask)) } catch {
                    return .failure(Self.unopened(error))
                }
            }
        ) { result in
            switch result {
            case .failure(let error): completion(.failure(error))
            case .success(let home):
                self.open(
                    name.anchored(in: home), at: home, message, root: root, peer: peer, until: deadline, completion)
            }
        }
    }

    private func open(
        _ asked: RunName, at home: Directory, _ askedMessage: OpenRun, root: OwnedFD?, peer: PeerCredentials,
        until deadline: Double, _ completion: @escaping Opened
    ) {
        let again: @Sendable @DaemonActor () -> Void = {
            self.find(asked, askedMessage, root: root, peer: peer, until: deadline, completion)
        }
        if opening[home.identity] != nil {
            opening[home.identity]?.append(again)
            return
        }
        let name = known(asked, at: home.identity)
        let message = tensorboard.decided(askedMessage)
        if let refusal = holder(of: name, against: message, peer) {
            return wait(until: deadline, again) { completion(.failure(refusal)) }
        }
        if let held = runs[name], held.isOverloaded {
            // A log that storage does not take stays in memory; a client that comes and goes must not add to it for ever.
            return completion(
                .failure(
                    WireError(
                        .tooMany, "run \(name.runID) has too many writes that wait for storage; try again later"
                    )))
        }
        opening[home.identity] = []
        runs[name]?.keepRegistered()
        let isNew = runs[name] == nil
        // A run that came back for its checkpoints has no log yet.
        let wantsJournal = (message.log ?? true) && runs[name]?.log.session == nil
        // Other ranks may have another node's daemon.
        let wantsLock = (message.rank ?? 0) == 0 || (message.log ?? true)
        let locks = wantsLock && !(runs[name]?.isLocked ?? false)
        disks.run(
            at: .device(home.device),
            { [registry] () -> Result<OpenedRun, WireError> in
                do throws(PosixError) {
                    return .success(
                        try OpenedRun(
                            home, message, isNew: isNew, locks: locks,
                            journalIn: wantsJournal ? registry : nil))
                } catch { return .failure(Self.unopened(error)) }
            }
        ) { result in
            switch result {
            case .failure(let error): completion(.failure(error))
            case .success(let opened) where opened.isHeld && !self.recovering.isEmpty:
                self.heldOpens.append(again)
            case .success(let opened) where opened.isHeld:
                self.wait(until: deadline, again) {
                    if self.hasPredecessor() {
                        return completion(
                            .failure(
                                WireError(
                                    .draining,
                                    "run \(name.runID) is held by a daemon that leaves, and that storage holds up; open it again in a "
                                        + "moment")))
                    }
                    completion(
                        .failure(
                            WireError(
                                .runInUse,
                                "run \(name.runID) is held by another daemon, here or on another node; end that run, or choose "
                                    + "another run id")))
                }
            case .success where wantsLock && !locks && !(self.runs[name]?.isLocked ?? false):
                // The one that had locked it has ended meanwhile.
                again()
            case .success(let opened):
                let run = self.runs[name] ?? self.add(name, peer: peer, node: message.node ?? "")
                run.attach(
                    message, peer: peer, directories: opened.directories, found: opened.found,
                    entries: opened.entries)
                if let damage = opened.damage { run.warn(damage) }
                if wantsLock { self.noteOpened(name) }
                completion(.success(run))
            }
            for next in self.opening.removeValue(forKey: home.identity) ?? [] { next() }
        }
    }

    /// So that the run is found by its id when no daemon knows it any more. Nobody waits for it, and a disk that refuses
    /// or hangs costs some entries.
    private func noteOpened(_ name: RunName) {
        unindexed.append(RunIndex.Entry(runID: name.runID, directory: name.directory))
        unindexed.removeFirst(max(0, unindexed.count - Self.unindexedRuns))
        writeIndex()
    }

    private static let unindexedRuns = 256

    private func writeIndex() {
        guard !isIndexing, !unindexed.isEmpty else { return }
        isIndexing = true
        let entries = unindexed
        unindexed = []
        journalDisks.run(at: .path(registry.path), { [index] in _ = try? index.add(entries) }) { _ in
            self.isIndexing = false
            self.writeIndex()
        }
    }

    /// The name by which a run is known that holds this directory; else the one that was asked for.
    private func known(_ name: RunName, at directory: OwnedFD.Identity) -> RunName {
        // guard: run-of-one-directory (never: $0.identity == directory)
        runs.values.first { $0.identity == directory }?.name ?? name
    }

    /// Who else holds this rank of the run. One whose process has ended holds it until its connection is closed, a moment later.
    private func holder(of name: RunName, against message: OpenRun, _ peer: PeerCredentials) -> WireError? {
        guard let run = runs[name] else { return nil }
        let rank = message.rank ?? 0
        let process: PeerProcess
        // guard: lease (never)
        if let holder = run.holder(ofRank: rank), !holder.isSame(as: peer, session: message.session) {
            process = holder.process
        } else if run.isAwaited, rank == 0, run.log.session != message.session, run.peer.pid > 0,
            !run.peer.process.isSame(as: peer.process), !run.peer.process.hasEnded
        {
            // Its daemon died, and it has not come back yet.
            process = run.peer.process
        } else {
            return nil
        }
        return WireError(
            .runInUse,
            "run \(name.runID) is held by \(process.name) on \(run.node); end that one, or choose another run id"
        )
    }

    private func wait(
        until deadline: Double, _ again: @escaping @Sendable @DaemonActor () -> Void,
        else refuse: @DaemonActor () -> Void
    ) {
        if Clock.monotonicSeconds >= deadline { return refuse() }
        DaemonActor.enter(after: Self.lookSeconds, again)
    }

    private func mask(of umask: UInt32?) -> UInt32 { (umask ?? fileModeMask) & 0o777 }

    /// The run's own directory, made if it is missing. Blocks.
    /// - Parameter root: the output root as the trainer has opened it. If its path leads elsewhere here (a container, a job's private
    ///   mounts), that directory counts and not the path: what is called durable is where the trainer looks.
    private nonisolated static func home(
        of name: RunName, root: OwnedFD?, mask: UInt32
    ) throws(PosixError) -> Directory {
        var directory: Directory
        if let root, try !Directory.leads(name.outputRoot, to: root) {  // guard: trainers-own-view (never)
            directory = try Directory.open(root, seenAs: name.outputRoot, mask: mask)
        } else {
            directory = try Directory.openOrCreateRoot(name.outputRoot, mask: mask, syncs: true)
        }
        for component in name.components { directory = try directory.child(component) }
        return directory
    }

    /// Calls back when what is shown of ended runs is with the file systems, or the time is over.
    public func whenEventFilesAreWritten(
        within seconds: Double, _ callback: @escaping @Sendable @DaemonActor () -> Void
    ) {
        let shown = runs.values.filter { !$0.areEventFilesWritten }
        let answer = Once<Void>(counting: shown.count, callback)
        for run in shown { run.whenEventFilesAreWritten { answer.count(then: ()) } }
        answer.give(after: shown.isEmpty ? 0 : seconds) {}
    }

    /// The daemon leaves: runs whose trainers have not come back are its successor's.
    public func endAll() {
        for run in runs.values where run.isAwaited {
            run.isAwaited = false
            run.end(clean: false, keepsJournal: true)
        }
    }

    private func add(_ name: RunName, peer: PeerCredentials, node: String) -> Run {
        let run = Run(
            name: name, disks: disks, eventDisks: eventDisks,
            log: RunLog(
                disks: journalDisks, registry: registry, byteLimit: logBytesPerRun, budget: logBudget,
                measures: measures),
            keeper: keeper, peer: peer, node: node, retention: retention, budget: budget, vault: vault,
            measures: measures, report: report)
        measures.runs += 1
        logBudget.sizes = { [unowned self] in runs.values.map(\.log.columns.byteCount).filter { $0 > 0 } }
        logBudget.makeRoom = { [unowned self] in
            for run in runs.values where !run.isLive && run.isIdle { run.forgetRows() }
        }
        // Before it is listed: it has no connection yet, as one that has ended.
        forgetOldRuns()
        runs[name] = run
        order.append(name)
        return run
    }

    private func forgetOldRuns() {
        // Of ended runs the names stay, the rows of a few: a log may have millions, and is in its file.
        let ended = order.filter { runs[$0].map { !$0.isLive && $0.isIdle } ?? false }
        for name in ended.dropLast(Self.endedLogsKept) { runs[name]?.forgetRows() }
        guard order.count >= Limits.endedRunsRemembered,
            let index = order.firstIndex(where: {
                runs[$0].map { !$0.isLive && $0.isIdle && !$0.isFollowed } ?? true
            })
        else { return }
        runs[order.remove(at: index)] = nil
    }

    /// What opening a run needs from the disk.
    private struct OpenedRun: Sendable {
        var directories: Directories
        var found: FoundJournal?
        var entries: FoundEntries?
        /// In words: what of the journal could not be read.
        var damage: String?
        var isHeld = false

        /// - Parameters:
        ///   - isNew: to this daemon: only then can there be something that one before it left.
        ///   - locks: the directory, for this daemon.
        ///   - registry: where a journal that is found is noted down (one that its daemon did not live to note down goes on
        ///     in use); nil where none is looked for.
        init(
            _ home: Directory, _ message: OpenRun?, isNew: Bool, locks: Bool, journalIn registry: RunRegistry?
        ) throws(PosixError) {
            isHeld = locks && !home.lock()  // guard: run-of-one-daemon (never)
            let tracker = try home.child("tracker")
            directories = Directories(
                of: home, checkpoints: try home.child("checkpoints"), tracker: tracker,
                isLocked: locks && !isHeld)
            if let registry, !isHeld {
                switch try AppendFile.open(Journal.fileName, in: tracker, create: false) {
                case .held: isHeld = true
                case .missing: break
                case .file(let file):
                    let read = try Self.replay(file, in: tracker)
                    found = read.found  // guard: journal-found-at-opening (= nil)
                    damage = read.damage
                    if found != nil { try? registry.add(tracker.path) }
                }
                if found == nil, !isHeld, let message { entries = try EntriesFile.find(for: message, in: tracker) }
            }
            guard !isHeld else { return }
            if isNew { try directories.removeLeftovers() }
            if let config = message?.configYaml {
                try DurableFile.write("config.yaml", bytes: Array(config.utf8), in: tracker)
            }
        }

        /// - Returns: no journal where it has no whole origin.
        static func replay(
            _ file: AppendFile, in tracker: Directory
        ) throws(PosixError) -> (found: FoundJournal?, damage: String?) {
            let buffer = UnsafeMutableRawBufferPointer.allocate(
                byteCount: JournalReplay.pieceByteCount, alignment: 16)
            defer { buffer.deallocate() }
            var replay = JournalReplay()
            var (offset, kept) = (UInt64(0), 0)
            while !replay.isOver {
                try Faults.reach("journal.replay")
                let count = try file.read(
                    at: offset, into: UnsafeMutableRawBufferPointer(rebasing: buffer[kept...]))
                let piece = UnsafeRawBufferPointer(rebasing: buffer[..<(kept + count)])
                // Ours has its header from the moment it has its name.
                // guard: journal-is-ours (always)
                guard offset > 0 || piece.isEmpty || piece.starts(with: JournalFormat.header) else {
                    throw PosixError.alreadyExists(
                        "use \(file.path), which is not a journal of noether-writer (move it away)")
                }
                let used = replay.read(piece)
                kept = piece.count - used
                if count == 0 { break }
                offset += UInt64(count)
                // The rest of it, to the beginning; both may overlap.
                buffer.copyMemory(from: UnsafeRawBufferPointer(rebasing: piece[used...]))
            }
            guard !replay.isNewer else {
                throw PosixError.alreadyExists(
                    "use \(file.path), which a newer version of noether-writer has written (start that one, or move it away)"
                )
            }
            // Before its name leads to less.
            let damage = try JournalDamage.keep(file, after: replay.byteCount, in: tracker)
            guard let replayed = replay.found else { return (nil, damage) }
            // A new file: a sync of the old one may have failed, and then what the page cache shows of it may be lost, and a
            // next sync says nothing.
            do throws(PosixError) {
                let copy = try file.copied(to: Journal.fileName, in: tracker, length: replayed.byteCount)
                return (FoundJournal(replayed: replayed, file: copy), damage)
            } catch { if !error.isLackOfRoom { throw error } }
            // What grows again must not be followed by the rest of a torn record.
            try file.truncate(to: replayed.byteCount)
            // The daemon that died may not have come to it, and this one says that all of it is durable.
            try file.sync()
            try tracker.sync()
            return (FoundJournal(replayed: replayed, file: file), damage)
        }
    }

    // MARK: Recovery

    /// Brings back every run whose journal a daemon before this one left. Where its trainer is dead, the log becomes entries.th
    /// at once; where it lives, the run waits for it to connect again.
    /// - Parameter completion: with what could not be read, in words. Storage that hangs is not waited for: what it holds comes back
    ///   when it answers.
    public func recover(_ completion: @escaping @Sendable @DaemonActor ([String]) -> Void) {
        let recovery = Recovery(completion)
        recovery.answer.give(after: DiskQueues.silenceSeconds) { recovery.problemsSoFar }
        journalDisks.run(
            at: .path(registry.path),
            { [registry] () -> (found: [String], problem: PosixError?) in
                do throws(PosixError) { return try registry.all() } catch { return ([], error) }
            }
        ) { paths, problem in
            recovery.open.formUnion(paths.map(ByteName.init))
            for path in paths { self.recovering[ByteName(path)] = [] }
            for path in paths { self.recover(path, recovery) }
            recovery.ended("the state directory", problem: problem.map { "\($0)" })
            self.recoverForeign(besides: Set(paths.map(ByteName.init)))
            // What was found this time is held then, and left alone.
            if let problem, problem.isRetryable { self.recoverAgain { self.recover { _ in } } }
        }
    }

    /// Journals that daemons on other hosts have left. A daemon that lives holds its journal's lock, as far as locks
    /// reach; and as a second sign, a journal that was written to a moment ago is left alone, and looked at once more.
    private func recoverForeign(besides known: Set<ByteName>, isLast: Bool = false) {
        journalDisks.run(
            at: .path(registry.path),
            { [registry] in ((try? registry.foreign()) ?? []).filter { !known.contains(ByteName($0.tracker)) } }
        ) { notes in
            guard !notes.isEmpty else { return }
            for (path, note) in notes where self.recovering[ByteName(path)] == nil {
                self.recovering[ByteName(path)] = []
                self.recover(path, Recovery { _ in }, foreignNote: note)
            }
            if !isLast {
                DaemonActor.enter(after: Self.quietSeconds + 1) { self.recoverForeign(besides: known, isLast: true) }
            }
        }
    }

    /// How long nobody has written to a journal of another host before its daemon counts as gone.
    private nonisolated static let quietSeconds = 60.0

    /// - Parameters:
    ///   - foreignNote: the name of the note, if another host's daemon has made it.
    ///   - isLast: whether it is not looked at again if somebody holds it.
    private func recover(
        _ path: String, _ recovery: Recovery, foreignNote: String? = nil, isLast: Bool = false
    ) {
        journalDisks.run(
            at: .path(path),
            { [registry, fileModeMask] () -> Result<FoundRun, PosixError> in
                do throws(PosixError) {
                    if let foreignNote, try !Self.adopt(path, note: foreignNote, registry) {
                        return .success(FoundRun())
                    }
                    return .success(try Self.find(path, registry, mask: fileModeMask))
                } catch {
                    return .failure(error)
                }
            }
        ) { result in
            switch result {
            case .failure(let error):
                recovery.ended(path, problem: "\(error)")
                if error.isRetryable {
                    self.recoverAgain { self.recover(path, Recovery { _ in }, foreignNote: foreignNote) }
                }
            case .success(let found):
                if let run = found.run { self.restore(run) }  // guard: journal-recovered (never)
                if let damage = found.damage { self.warn(damage, ofRunAt: path) }
                // Whoever holds it may only have looked at it.
                if found.isHeld, !isLast {  // guard: held-is-looked-at-again (never)
                    self.recoverAgain { self.recover(path, Recovery { _ in }, isLast: true) }
                }
                recovery.ended(path, problem: nil)
            }
            let waiting = (self.recovering.removeValue(forKey: ByteName(path)) ?? []) + self.heldOpens
            self.heldOpens = []
            for open in waiting { open() }
            self.tellRestoreWaiters()
        }
    }

    /// Storage that refuses may be well later, and what it holds comes back then.
    private func recoverAgain(_ work: @escaping @Sendable @DaemonActor () -> Void) {
        DaemonActor.enter(after: Self.recoverAgainSeconds, work)
    }

    private static let recoverAgainSeconds = 10.0

    /// Blocks: on a disk queue.
    /// - Returns: whether the journal of another host's daemon is this one's to recover now.
    private nonisolated static func adopt(
        _ path: String, note: String, _ registry: RunRegistry
    ) throws(PosixError) -> Bool {
        guard let journal = FileFacts("\(path)/\(Journal.fileName)"), journal.isRegular,
            Clock.wallSeconds - journal.modifiedAt >= quietSeconds,
            case .file = try AppendFile.open(
                Journal.fileName, in: Directory.open(path, mask: 0o077), create: false)
        else { return false }
        try registry.adopt(path, note: note)
        return true
    }

    private typealias LeftRun = (journal: FoundJournal, directories: Directories)

    private struct FoundRun: Sendable {
        var run: LeftRun?
        var damage: String?
        /// By somebody else.
        var isHeld = false
    }

    /// Blocks: on a disk queue.
    /// - Parameter mask: of runs that bring none.
    private nonisolated static func find(
        _ path: String, _ registry: RunRegistry, mask: UInt32
    ) throws(PosixError) -> FoundRun {
        let tracker: Directory
        // Nobody else may read what is made here before it has the mode of the file that it replaces.
        do throws(PosixError) { tracker = try Directory.open(path, mask: 0o077) } catch {
            // Gone with its run.
            if error.isMissing { try registry.removeUnlessWanted(path) }
            throw error
        }
        switch try AppendFile.open(Journal.fileName, in: tracker, create: false) {
        case .held: return FoundRun(isHeld: true)
        case .missing:
            try removeLeftovers(of: path, tracker)
            try registry.removeUnlessWanted(path)
            return FoundRun()
        case .file(let file):
            let (found, damage) = try OpenedRun.replay(file, in: tracker)
            guard let journal = found else {
                // Nothing in it was ever acknowledged, or it is kept under another name.
                try tracker.remove(Journal.fileName)
                try removeLeftovers(of: path, tracker)
                try registry.removeUnlessWanted(path)
                return FoundRun(damage: damage)
            }
            guard let directories = try Self.directories(of: journal, at: tracker, mask: mask) else {
                return FoundRun(damage: damage, isHeld: true)
            }
            try directories.removeLeftovers()
            return FoundRun(run: (journal, directories), damage: damage)
        }
    }

    /// - Parameter path: of its tracker directory, all that is known of a run whose journal does not say more.
    private func warn(_ words: String, ofRunAt path: String) {
        let directory = path.split(separator: "/").dropLast().last.map(String.init) ?? path
        report(RunEvent(runID: directory, what: .warning(words)))
    }

    @discardableResult
    private nonisolated static func removeLeftovers(of path: String, _ tracker: Directory) throws(PosixError)
        -> Directories
    {
        let parent = try Directory.open(
            path.dropping(first: 0, last: path.ends(with: "/tracker") ? "/tracker".utf8.count : 0))
        let directories = Directories(
            of: parent, checkpoints: try parent.child("checkpoints"), tracker: tracker, isLocked: false)
        try directories.removeLeftovers()
        return directories
    }

    private func restore(_ found: LeftRun) {
        var found = found
        let asked = found.journal.replayed.origin.run.tensorboard
        found.journal.replayed.origin.run.tensorboard = tensorboard.allows(asked)
        let origin = found.journal.replayed.origin
        // A run that its checkpoints have brought back, or a connection that brings none, has no log yet.
        guard let asked = try? RunName(origin.run) else { return }
        let name = known(asked, at: found.directories.home.identity)
        guard runs[name].map({ $0.log.session == nil }) ?? true else { return }
        let peer = PeerCredentials(
            process: PeerProcess(pid: origin.pid, startTicks: origin.pidStart), uid: ThisProcess.userID)
        let run = runs[name] ?? add(name, peer: peer, node: origin.run.node ?? "")
        run.restore(found.directories, origin.run, found.journal)
        report(RunEvent(runID: name.runID, what: .recovered(rows: found.journal.replayed.log.count)))
        if !run.isLive { wait(for: run) }
    }

    /// Answers when all have ended, or when those that are left hang.
    @DaemonActor
    private final class Recovery {
        var open: Set<ByteName> = [ByteName("the state directory")]
        private var problems: [String] = []
        let answer: Once<[String]>

        init(_ completion: @escaping @Sendable @DaemonActor ([String]) -> Void) { answer = Once(completion) }

        func ended(_ path: String, problem: String?) {
            open.remove(ByteName(path))
            if let problem { problems.append("\(path): \(problem)") }
            if open.isEmpty { answer.give(problems) }
        }

        var problemsSoFar: [String] {
            problems
                + open.sorted().map {
                    "\($0.text): it is not read yet: a long log comes later, storage that does not answer perhaps"
                }
        }
    }

    /// A run whose directories can't be had, with what its user may not think of.
    private nonisolated static func unopened(_ error: PosixError) -> WireError {
        let hint: String =
            switch error.name {
            case "EACCES", "EPERM":
                "; the daemon writes as uid \(ThisProcess.userID): choose an output_root where that user may write"
            case "EROFS":
                "; a service of systemd writes only where its unit says ReadWritePaths=: see noether-writerd(8)"
            default: ""
            }
        return WireError(.badPath, "\(error.description)\(hint)", errno: error.errno)
    }

    /// The run's directories, opened below its root as they were when the run was: a symlink in the place of one of them, by which the
    /// journal was found, leads nowhere.
    /// - Returns: nil where another daemon holds the run.
    private nonisolated static func directories(
        of journal: FoundJournal, at tracker: Directory, mask: UInt32
    ) throws(PosixError) -> Directories? {
        let name: RunName
        do throws(WireError) { name = try RunName(journal.replayed.origin.run) } catch {
            throw PosixError.invalid("use the journal in \(tracker.path): \(error.message)")
        }
        let mask = (journal.replayed.origin.run.umask ?? mask) & 0o777
        var directory = try Directory.open(name.outputRoot, mask: mask)
        for component in name.components { directory = try directory.child(component, create: false) }
        let opened = try directory.child("tracker", create: false)
        guard opened.isSame(as: tracker) else {  // guard: journal-in-its-place (always)
            throw PosixError.loop("use the journal in \(tracker.path): it is not in its run's directory")
        }
        guard directory.lock() else { return nil }
        return Directories(
            of: directory, checkpoints: try directory.child("checkpoints"), tracker: opened, isLocked: true)
    }

    /// A snapshot that a daemon before this one had accepted: it is written, whoever lives.
    /// - Returns: whether its run's journal is still being read, which it waits for.
    @discardableResult
    public func restore(
        _ snapshot: Snapshot, of identity: RunIdentity, root: OwnedFD?, peer: PeerCredentials,
        completion: @escaping @Sendable @DaemonActor (WireError?) -> Void
    ) -> Bool {
        let name: RunName
        do throws(WireError) { name = try RunName(identity) } catch {
            completion(error)
            return false
        }
        restoreCount += 1
        let number = restoreCount
        unrestored[number] = (
            name.runID, Waited.Failure(path: name.directory, message: "storage has not opened this directory yet")
        )
        return restore(snapshot, number, of: identity, named: name, root: root, peer: peer) { error in
            self.unrestored[number] = nil
            completion(error)
            self.tellRestoreWaiters()
        }
    }

    /// What a daemon before this one has left is in its runs now: of one run, or of all and with their journals.
    public func whenRestored(runID: String?, _ answer: @escaping @Sendable @DaemonActor () -> Void) {
        restoreWaiters.append((runID, answer))
        tellRestoreWaiters()
    }

    /// What `whenRestored` waits for: snapshots and journals.
    public func notRestored(runID: String?) -> [Waited.Failure] {
        let snapshots = unrestored.sorted { $0.key < $1.key }.map(\.value).filter { each in
            runID.map { each.runID.isSame(as: $0) } ?? true
        }
        guard runID == nil else { return snapshots.map(\.why) }
        let journals = recovering.keys.sorted().map {
            Waited.Failure(path: "\($0.text)/\(Journal.fileName)", message: "this log is being read")
        }
        return snapshots.map(\.why) + journals
    }

    private func tellRestoreWaiters() {
        let ended = restoreWaiters.filter { notRestored(runID: $0.runID).isEmpty }
        restoreWaiters.removeAll { notRestored(runID: $0.runID).isEmpty }
        for waiter in ended { waiter.answer() }
    }

    private func restore(
        _ snapshot: Snapshot, _ number: Int, of identity: RunIdentity, named name: RunName, root: OwnedFD?,
        peer: PeerCredentials, completion: @escaping @Sendable @DaemonActor (WireError?) -> Void
    ) -> Bool {
        let tracker = ByteName("\(name.directory)/tracker")
        if recovering[tracker] != nil {
            recovering[tracker]?.append {
                _ = self.restore(
                    snapshot, number, of: identity, named: name, root: root, peer: peer, completion: completion)
            }
            return true
        }
        let isNew = runs[name] == nil
        disks.run(
            at: .path(name.outputRoot),
            { [mask = mask(of: identity.umask)] () -> Result<OpenedRun, PosixError> in
                do throws(PosixError) {
                    return .success(
                        try OpenedRun(
                            Self.home(of: name, root: root, mask: mask), nil, isNew: isNew, locks: false,
                            journalIn: nil))
                } catch { return .failure(error) }
            }
        ) { result in
            switch result {
            case .failure(let error) where error.isRetryable:
                // It was accepted: it waits for storage, as every save does.
                self.unrestored[number]?.why = Waited.Failure(
                    path: name.directory, message: error.description, errno: error.errno)
                self.report(
                    RunEvent(runID: name.runID, what: .stalled(path: name.directory, reason: error.description)))
                self.recoverAgain {
                    _ = self.restore(
                        snapshot, number, of: identity, named: name, root: root, peer: peer, completion: completion)
                }
            case .failure(let error): completion(Self.unopened(error))
            case .success(let opened):
                let name = self.known(
                    name.anchored(at: opened.directories.home.anchor), at: opened.directories.home.identity)
                let isNew = self.runs[name] == nil
                let run = self.runs[name] ?? self.add(name, peer: peer, node: identity.node ?? "")
                if !run.isLive { run.restore(opened.directories, identity, nil) }
                run.restore(snapshot, session: identity.session, rank: identity.rank ?? 0)
                if isNew { self.wait(for: run) }
                completion(nil)
            }
        }
        return false
    }

    /// Ends the run when its trainer is dead, or does not come back in time.
    private func wait(for run: Run) {
        run.isAwaited = true
        look(after: run, deadline: Clock.monotonicSeconds + Self.reconnectSeconds)
    }

    private func look(after run: Run, deadline: Double) {
        guard run.isAwaited else { return }
        if !run.peer.process.hasEnded, Clock.monotonicSeconds < deadline {
            DaemonActor.enter(after: 0.5) { self.look(after: run, deadline: deadline) }
        } else {
            run.isAwaited = false
            run.end(clean: false)
        }
    }
}
