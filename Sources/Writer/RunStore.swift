/// The daemon's runs: the live ones, those brought back from a daemon before this one, and the last ended ones for `status`.
/// Owned by the intake queue.
import Dispatch
public import Posix
public import Wire

@Intake
public final class RunStore {
    /// For how long a run that was brought back waits for its living trainer to connect, in seconds.
    public static let reconnectSeconds = 60.0

    private let disks: DiskQueues
    private let journalDisks: DiskQueues
    private let registry: RunRegistry
    public var keeper: any SnapshotKeeper = NoKeeper()
    public var report: @Sendable (RunEvent) -> Void = { _ in }
    private var runs: [RunName: Run] = [:]
    /// Names in order of opening, for listing and forgetting.
    private var order: [RunName] = []
    /// One open of a run at a time: the next ones wait here.
    private var opening: [RunName: [@Sendable @Intake () -> Void]] = [:]

    private let logBytesPerRun: Int

    public nonisolated init(diskQueues: Int, stateDirectory: String, logBytesPerRun: Int) {
        self.logBytesPerRun = logBytesPerRun
        disks = DiskQueues(count: diskQueues, name: "disk")
        journalDisks = DiskQueues(count: 2, name: "journal")
        registry = RunRegistry(path: stateDirectory + "/runs")
    }

    public var all: [Run] { order.compactMap { runs[$0] } }
    public var isIdle: Bool { runs.values.allSatisfy { $0.isIdle && !$0.isLive } }

    /// Opens the run's directories on a disk queue, then answers on the intake queue with the run attached.
    public func open(
        _ name: RunName, _ message: OpenRun, peer: PeerCredentials,
        completion: @escaping @Sendable @Intake (Result<Run, WireError>) -> Void
    ) {
        if opening[name] != nil {
            opening[name]?.append { self.open(name, message, peer: peer, completion: completion) }
            return
        }
        if let held = runs[name], let holder = held.holder(ofRank: message.rank ?? 0), holder != peer.pid {
            return completion(
                .failure(
                    WireError(
                        .runInUse,
                        "run \(name.runID) is held by process \(holder) on \(held.node); end that one, or choose "
                            + "another run id")))
        }
        if let held = runs[name], held.isOverloaded {
            // A log that storage does not take stays in memory; a client that comes and goes must not add to it for ever.
            return completion(
                .failure(
                    WireError(
                        .tooMany, "run \(name.runID) has too much that storage does not take; try again later"
                    )))
        }
        opening[name] = []
        let isNew = runs[name] == nil
        disks.run({ () -> Result<Prepared, WireError> in
            do throws(PosixError) {
                let prepared = try Prepared(name, message, isNew: isNew)
                if prepared.isHeld {
                    return .failure(
                        WireError(
                            .runInUse,
                            "the log of run \(name.runID) is held by another daemon, here or on another node; end that run, "
                                + "or choose another run id"))
                }
                return .success(prepared)
            } catch { return .failure(WireError(.badPath, error.description, errno: error.errno)) }
        }) { result in
            switch result {
            case .failure(let error): completion(.failure(error))
            case .success(let prepared):
                let run = self.runs[name] ?? self.add(name, peer: peer, node: message.node ?? "")
                run.isAwaited = false
                run.attach(message, peer: peer, directories: prepared.directories, found: prepared.found)
                completion(.success(run))
            }
            for next in self.opening.removeValue(forKey: name) ?? [] { next() }
        }
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
            name: name, disks: disks,
            log: RunLog(disks: journalDisks, registry: registry, byteLimit: logBytesPerRun), keeper: keeper,
            peer: peer, node: node, report: report)
        runs[name] = run
        order.append(name)
        forgetOldRuns()
        return run
    }

    private func forgetOldRuns() {
        guard order.count > Limits.endedRunsRemembered,
            let index = order.firstIndex(where: { runs[$0].map { !$0.isLive && $0.isIdle } ?? true })
        else { return }
        runs[order.remove(at: index)] = nil
    }

    /// What opening a run needs from the disk.
    private struct Prepared: Sendable {
        var directories: Directories
        var found: FoundJournal?
        var isHeld = false

        /// - Parameter isNew: to this daemon: only then can there be something that one before it left.
        init(_ name: RunName, _ message: OpenRun, isNew: Bool) throws(PosixError) {
            var directory = try Directory.openOrCreateRoot(name.outputRoot)
            for component in name.components { directory = try directory.child(component) }
            let tracker = try directory.child("tracker")
            directories = Directories(checkpoints: try directory.child("checkpoints"), tracker: tracker)
            if isNew, message.log ?? true {
                switch try AppendFile.open(Journal.fileName, in: tracker, create: false) {
                case .held: isHeld = true
                case .missing: break
                case .file(let file): found = try Self.replay(file)
                }
            }
            guard !isHeld else { return }
            if isNew { try directories.removeLeftovers() }
            if let config = message.configYaml {
                try DurableFile.write("config.yaml", bytes: Array(config.utf8), in: tracker)
            }
        }

        static func replay(_ file: AppendFile) throws(PosixError) -> FoundJournal? {
            let bytes = try file.read()
            // Ours has its header from the moment it has its name.
            guard bytes.isEmpty || bytes.starts(with: JournalFormat.header) else {
                throw PosixError.alreadyExists(
                    "use \(file.path), which is no journal of noether-writer (move it away)")
            }
            guard let replayed = JournalFormat.replay(bytes) else { return nil }
            // What grows again must not be followed by the rest of a torn record.
            try file.truncate(to: replayed.byteCount)
            return FoundJournal(replayed: replayed, file: file)
        }
    }

    // MARK: Recovery

    /// Brings back every run whose journal a daemon before this one left. Where its trainer is dead, the log becomes entries.th
    /// at once; where it lives, the run waits for it to connect again.
    /// - Parameter completion: with what could not be read, in words.
    public func recover(_ completion: @escaping @Sendable @Intake ([String]) -> Void) {
        typealias Found = (journal: FoundJournal, directories: Directories)
        journalDisks.run({ [registry] () -> (found: [Found], problems: [String]) in
            var found: [Found] = []
            var problems: [String] = []
            do throws(PosixError) {
                for path in try registry.all() {
                    do throws(PosixError) {
                        let tracker: Directory
                        do throws(PosixError) { tracker = try Directory.open(path) } catch {
                            // Gone with its run.
                            if error.isMissing { try registry.remove(path) }
                            throw error
                        }
                        switch try AppendFile.open(Journal.fileName, in: tracker, create: false) {
                        case .held: continue
                        case .missing: try registry.remove(path)
                        case .file(let file):
                            guard let journal = try Prepared.replay(file) else {
                                // Nothing in it was ever acknowledged.
                                try tracker.remove(Journal.fileName)
                                try registry.remove(path)
                                continue
                            }
                            let directories = try Self.directories(of: journal, at: tracker)
                            try directories.removeLeftovers()
                            found.append((journal, directories))
                        }
                    } catch { problems.append("the log in \(path): \(error)") }
                }
            } catch { problems.append("the state directory: \(error)") }
            return (found, problems)
        }) { result in
            for (journal, directories) in result.found {
                let origin = journal.replayed.origin
                guard let name = try? RunName(origin.run), self.runs[name] == nil else { continue }
                let peer = PeerCredentials(pid: origin.pid, uid: Process.userID)
                let run = self.add(name, peer: peer, node: origin.run.node ?? "")
                run.restore(directories, journal)
                self.report(RunEvent(runID: name.runID, what: .recovered(rows: journal.replayed.log.count)))
                self.wait(for: run, start: origin.pidStart)
            }
            completion(result.problems)
        }
    }

    /// The run's directories, opened below its root as they were when the run was: a symlink in the place of one of them, by which the
    /// journal was found, leads nowhere.
    private nonisolated static func directories(
        of journal: FoundJournal, at tracker: Directory
    ) throws(PosixError) -> Directories {
        let name: RunName
        do throws(WireError) { name = try RunName(journal.replayed.origin.run) } catch {
            throw PosixError.invalid("use the journal in \(tracker.path): \(error.message)")
        }
        var directory = try Directory.open(name.outputRoot)
        for component in name.components { directory = try directory.child(component, create: false) }
        let opened = try directory.child("tracker", create: false)
        guard try opened.isSame(as: tracker) else {
            throw PosixError.loop("use the journal in \(tracker.path): it is not in its run's directory")
        }
        return Directories(checkpoints: try directory.child("checkpoints"), tracker: opened)
    }

    /// A snapshot that a daemon before this one had accepted: it is written, whoever lives.
    public func restore(
        _ snapshot: Snapshot, of message: OpenRun, peer: PeerCredentials, peerStart: UInt64,
        completion: @escaping @Sendable @Intake (WireError?) -> Void
    ) {
        let name: RunName
        do throws(WireError) { name = try RunName(message) } catch { return completion(error) }
        let isNew = runs[name] == nil
        disks.run({ () -> Result<Prepared, PosixError> in
            do throws(PosixError) {
                return .success(try Prepared(name, message, isNew: isNew))
            } catch { return .failure(error) }
        }) { result in
            switch result {
            case .failure(let error): completion(WireError(.badPath, error.description, errno: error.errno))
            case .success(let prepared):
                let isNew = self.runs[name] == nil
                let run = self.runs[name] ?? self.add(name, peer: peer, node: message.node ?? "")
                if !run.isLive { run.restore(prepared.directories, nil) }
                run.restore(snapshot, session: message.session)
                if isNew { self.wait(for: run, start: peerStart) }
                completion(nil)
            }
        }
    }

    /// Ends the run when its trainer is dead, or does not come back in time.
    private func wait(for run: Run, start: UInt64) {
        run.isAwaited = true
        look(after: run, start: start, deadline: Clock.monotonicSeconds + Self.reconnectSeconds)
    }

    private func look(after run: Run, start: UInt64, deadline: Double) {
        guard run.isAwaited else { return }
        if Process.startTicks(of: run.peer.pid) == start, Clock.monotonicSeconds < deadline {
            Intake.enter(after: 0.5) { self.look(after: run, start: start, deadline: deadline) }
        } else {
            run.isAwaited = false
            run.end(clean: false)
        }
    }
}
