import Dispatch
/// One run: its log, and its checkpoints on their way to the disk. Owned by the intake queue.
///
/// Jobs of a run go to the disk one at a time, in order: two saves of `latest` can't overtake one another. Runs take
/// turns on the disk queues, so none starves another.
public import Posix
public import Wire

public typealias EventSink = @Sendable @Intake (CheckpointEvent) -> Void

struct Directories: Sendable {
    var checkpoints: Directory
    var tracker: Directory
}

@Intake
public final class Run {
    public nonisolated let name: RunName
    /// Held while the run is live or has work, and no longer: an ended run must not pin its file system.
    private var directories: Directories?
    private let disks: DiskQueues

    public private(set) var log = LogColumns()
    public private(set) var state = RunStatus.State.running
    public private(set) var failures: [Waited.Failure] = []
    public private(set) var durableCount = 0
    public private(set) var stalled: String?
    public var peer: PeerCredentials
    public var node: String
    /// Last sequence number taken, by session: what is sent again after a reconnect is dropped.
    private var lastSequences: [String: UInt64] = [:]
    private var logSession: String?
    private var openConnections = 0
    private var hasUnwrittenLog = false

    private enum Job {
        case checkpoint(Snapshot, EventSink)
        case entries(LogColumns, @Sendable @Intake (PosixError?) -> Void)
    }
    private var jobs: [Job] = []
    private var isBusy = false
    private var idleWaiters: [@Sendable @Intake () -> Void] = []

    /// For how long the next try after a refusal waits, in seconds.
    private static let retrySeconds = [0.5, 1, 2, 4, 8, 15, 30]

    init(name: RunName, disks: DiskQueues, peer: PeerCredentials, node: String) {
        self.name = name
        self.disks = disks
        self.peer = peer
        self.node = node
    }

    // MARK: Sessions

    public func lastSequence(of session: String) -> UInt64 { lastSequences[session] ?? 0 }

    func attach(session: String, bringsLog: Bool, directories: Directories) {
        openConnections += 1
        self.directories = directories
        state = .running
        guard bringsLog, logSession != session else { return }
        logSession = session
        log = LogColumns()
        hasUnwrittenLog = false
    }

    /// A connection is gone. The last one of a run with an unfinished log leaves it interrupted: its log is written.
    public func detach(clean: Bool) {
        openConnections -= 1
        guard openConnections == 0 else { return }
        if state == .running {
            state = clean && !hasUnwrittenLog ? .finished : .interrupted
            if hasUnwrittenLog { writeEntries { _ in } }
        }
        letGoOfDirectories()
    }

    private func letGoOfDirectories() {
        if openConnections == 0, jobs.isEmpty { directories = nil }
    }

    /// Whether this number is new; remembers it.
    private func take(_ sequence: UInt64, of session: String) -> Bool {
        guard sequence > lastSequence(of: session) else { return false }
        lastSequences[session] = sequence
        return true
    }

    public var isLive: Bool { openConnections > 0 }
    public var isIdle: Bool { jobs.isEmpty }

    // MARK: Log

    public func column(for key: String) throws(WireError) -> Int { try log.column(for: key) }

    /// - Parameter columnIDs: of the payload's keys.
    public func append(_ payload: LogPayload, columnIDs: [Int], session: String) throws(WireError) {
        guard session == logSession else {
            throw WireError(.logTakenOver, "a newer connection brings the log of run \(name.runID) now")
        }
        guard take(payload.sequence, of: session) else { return }
        try log.append(update: payload.update, columnIDs: columnIDs, values: payload.values)
        hasUnwrittenLog = true
    }

    /// Answers once entries.th, and every checkpoint before it, is durable or failed.
    public func finish(
        sequence: UInt64, session: String,
        completion: @escaping @Sendable @Intake (Result<Finished, WireError>) -> Void
    ) {
        _ = take(sequence, of: session)
        let rows = log.count
        guard rows > 0, session == logSession else {
            state = .finished
            whenIdle { completion(.success(Finished(entriesPath: nil, entries: 0))) }
            return
        }
        let path = "\(name.directory)/tracker/\(EntriesFile.name)"
        writeEntries { error in
            if let error {
                completion(.failure(WireError(.storage, error.description, errno: error.errno)))
            } else {
                self.state = .finished
                completion(.success(Finished(entriesPath: path, entries: rows)))
            }
        }
    }

    private func writeEntries(_ completion: @escaping @Sendable @Intake (PosixError?) -> Void) {
        hasUnwrittenLog = false
        submit(.entries(log, completion))
    }

    // MARK: Checkpoints

    public func save(_ snapshot: Snapshot, session: String, events: @escaping EventSink) throws(WireError) {
        guard jobs.count < Limits.savesInFlightPerRun else {
            throw WireError(.tooMany, "\(jobs.count) saves of run \(name.runID) are in flight; wait for one")
        }
        var accepted = CheckpointEvent(.accepted, sequence: snapshot.sequence)
        accepted.bytes = snapshot.targets.reduce(0) { $0 + $1.byteCount }
        guard take(snapshot.sequence, of: session) else { return events(accepted) }
        submit(.checkpoint(snapshot, events))
        events(accepted)
    }

    public var status: RunStatus {
        var checkpoints = RunStatus.Checkpoints()
        for case .checkpoint(let snapshot, _) in jobs {
            checkpoints.inFlight += snapshot.targets.count
            checkpoints.bytesInFlight += snapshot.targets.reduce(0) { $0 + $1.byteCount }
        }
        checkpoints.durable = durableCount
        checkpoints.failed = failures.count
        return RunStatus(
            runID: name.runID, runDirectory: name.directory, state: state, pid: peer.pid, node: node,
            entries: log.count, lastUpdate: log.lastUpdate, checkpoints: checkpoints, stalled: stalled)
    }

    /// Calls back when everything submitted so far has ended.
    public func whenIdle(_ callback: @escaping @Sendable @Intake () -> Void) {
        if jobs.isEmpty { callback() } else { idleWaiters.append(callback) }
    }

    // MARK: The way to the disk

    private func submit(_ job: Job) {
        jobs.append(job)
        if !isBusy { startNext() }
    }

    private func startNext() {
        guard let job = jobs.first else {
            let waiters = idleWaiters
            idleWaiters = []
            for waiter in waiters { waiter() }
            return letGoOfDirectories()
        }
        guard let directories else { preconditionFailure("a job of a run without directories") }
        isBusy = true
        switch job {
        case .checkpoint(let snapshot, let events):
            write(snapshot, target: 0, attempt: 0, in: directories.checkpoints, events)
        case .entries(let log, let completion): write(log, attempt: 0, in: directories.tracker, completion)
        }
    }

    private func endJob() {
        isBusy = false
        jobs.removeFirst()
        startNext()
    }

    private func write(
        _ snapshot: Snapshot, target index: Int, attempt: Int, in directory: Directory,
        _ events: @escaping EventSink
    ) {
        guard index < snapshot.targets.count else {
            var released = CheckpointEvent(.released, sequence: snapshot.sequence)
            released.buffer = snapshot.buffer
            endJob()
            return events(released)
        }
        let target = snapshot.targets[index]
        let path = "\(directory.path)/\(target.fileName)"
        @Sendable func event(_ kind: CheckpointEvent.Kind) -> CheckpointEvent {
            var event = CheckpointEvent(kind, sequence: snapshot.sequence)
            (event.target, event.path, event.bytes) = (index, path, target.byteCount)
            return event
        }
        disks.run({ () -> PosixError? in
            do throws(PosixError) {
                try snapshot.write(index, in: directory) { Intake.enter { events(event(.written)) } }
                return nil
            } catch { return error }
        }) { error in
            guard let error else {
                self.stalled = nil
                self.durableCount += 1
                events(event(.durable))
                return self.write(snapshot, target: index + 1, attempt: 0, in: directory, events)
            }
            var report = event(error.mayPass ? .stalled : .failed)
            report.error = ErrorMessage(WireError(.storage, error.description, errno: error.errno))
            events(report)
            if error.mayPass {
                self.retry(attempt, error) {
                    self.write(snapshot, target: index, attempt: attempt + 1, in: directory, events)
                }
            } else {
                self.failures.append(Waited.Failure(path: path, message: error.description))
                self.write(snapshot, target: index + 1, attempt: 0, in: directory, events)
            }
        }
    }

    private func write(
        _ log: LogColumns, attempt: Int, in directory: Directory,
        _ completion: @escaping @Sendable @Intake (PosixError?) -> Void
    ) {
        disks.run({ () -> PosixError? in
            do throws(PosixError) {
                try EntriesFile.write(log, in: directory)
                return nil
            } catch { return error }
        }) { error in
            if let error, error.mayPass {
                return self.retry(attempt, error) {
                    self.write(log, attempt: attempt + 1, in: directory, completion)
                }
            }
            if let error {
                self.failures.append(
                    Waited.Failure(
                        path: "\(directory.path)/\(EntriesFile.name)", message: error.description))
            } else {
                self.stalled = nil
            }
            self.endJob()
            completion(error)
        }
    }

    private func retry(_ attempt: Int, _ error: PosixError, _ again: @escaping @Sendable @Intake () -> Void) {
        stalled = error.description
        let delay = Self.retrySeconds[min(attempt, Self.retrySeconds.count - 1)]
        Intake.queue.asyncAfter(deadline: .now() + delay) { Intake.assumeIsolated(again) }
    }
}
