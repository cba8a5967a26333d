// SPDX-License-Identifier: Apache-2.0
/// What one process wants of files at any path, and what became of it. Owned by the daemon's queue.
import Posix
import Wire

/// The root directory as a process has opened it: its paths begin there.
struct PathRoot: Sendable {
    let fd: OwnedFD
    let identity: OwnedFD.Identity
}

/// A path below a root, as a key.
struct PathKey: Hashable {
    let root: OwnedFD.Identity
    let path: AbsolutePath
}

@DaemonActor
public final class PathSession {
    struct Ended {
        /// The last ones, for a client that has not heard them.
        var events: [CheckpointEvent]
        var fingerprint: Int
        var connection: UInt64
    }

    /// The turns that this session takes at one file system, so that others have theirs.
    private struct Turns {
        var running = 0
        var waiting: [@DaemonActor () -> Void] = []
    }

    nonisolated let id: String
    nonisolated let root: PathRoot
    /// Under which its memory is counted.
    nonisolated let name: RunName
    nonisolated let identity: RunIdentity
    nonisolated let peer: PeerCredentials
    var connections = 0
    /// Since when it has had none, in monotonic seconds.
    var leftSeconds = 0.0
    /// By number.
    var jobs: [UInt64: PathJob] = [:]
    private(set) var ended: [UInt64: Ended] = [:]
    private var order: [UInt64] = []
    /// Files that were given up, and not saved anew since: a commit of their directory fails.
    var failures: [AbsolutePath: (sequence: UInt64, error: PosixError)] = [:]
    private var turns: [DiskQueues.Place: Turns] = [:]

    init(id: String, root: PathRoot, name: RunName, identity: RunIdentity, peer: PeerCredentials) {
        self.id = id
        self.root = root
        self.name = name
        self.identity = identity
        self.peer = peer
    }

    func key(_ path: AbsolutePath) -> PathKey { PathKey(root: root.identity, path: path) }

    /// Whether what bears this number is on its way: events that bear the number are its own.
    public func isBusy(with sequence: UInt64) -> Bool { jobs[sequence] != nil }

    func end(_ job: PathJob) {
        jobs[job.sequence] = nil
        ended[job.sequence] = Ended(events: job.last, fingerprint: job.fingerprint, connection: job.connection)
        order.append(job.sequence)
        if order.count > 4 * Limits.filesInFlightPerSession { ended[order.removeFirst()] = nil }
    }

    /// Begins when it is this session's turn; `leave` ends the turn.
    func enter(_ place: DiskQueues.Place, _ work: @escaping @DaemonActor () -> Void) {
        guard turns[place, default: Turns()].running < Limits.filesAtOncePerSession else {
            turns[place]?.waiting.append(work)
            return
        }
        turns[place, default: Turns()].running += 1
        work()
    }

    func leave(_ place: DiskQueues.Place) {
        guard var found = turns[place] else { return }
        let next = found.waiting.isEmpty ? nil : found.waiting.removeFirst()
        if next == nil { found.running -= 1 }
        turns[place] = found.running > 0 ? found : nil
        next?()
    }
}

/// One save, removal or commit. A class, since the listener changes when a client reconnects.
@DaemonActor
final class PathJob {
    enum Work: Sendable {
        case save(Snapshot)
        case remove(recursively: Bool)
        /// Of the first path to the second one.
        case commit(replaces: Bool, files: [String], patienceSeconds: Double)
    }

    nonisolated let work: Work
    nonisolated let session: PathSession
    nonisolated let sequence: UInt64
    nonisolated let fingerprint: Int
    nonisolated let paths: [AbsolutePath]
    /// What is saved there must be durable first.
    nonisolated let after: [AbsolutePath]
    let storage: StorageJob
    var events: EventSink
    /// The connection that has sent it last; 0 if it comes from a daemon before this one.
    var connection: UInt64
    var isAccepted = false
    var isStarted = false
    /// When it was, in monotonic seconds.
    var acceptedSeconds = 0.0
    /// How many jobs it waits for, and which ones wait for it.
    var blockers = 0
    var dependents: [PathJob] = []
    var waiters: [@DaemonActor () -> Void] = []
    /// A commit for which files of others are missing.
    var isWaiting = false
    /// Those that do not wait for files of others.
    var ownWaiters: [@DaemonActor () -> Void] = []
    /// The events that ended it, for a client that asks again.
    var last: [CheckpointEvent] = []
    /// Tries so far, of each file.
    var writes = 0
    var target = 0
    var durableByteCount: UInt64 = 0

    init(
        _ work: Work, _ paths: [AbsolutePath], after: [AbsolutePath] = [], of session: PathSession, sequence: UInt64,
        fingerprint: Int, connection: UInt64, disks: DiskQueues, events: @escaping EventSink
    ) {
        self.work = work
        self.paths = paths
        self.after = after
        self.session = session
        self.sequence = sequence
        self.fingerprint = fingerprint
        self.connection = connection
        self.events = events
        storage = StorageJob(disks)
    }

    nonisolated var snapshot: Snapshot? {
        if case .save(let snapshot) = work { return snapshot }
        return nil
    }

    /// Whether the order of the two matters: one path is the other one's, or lies above it; or one waits for the other.
    nonisolated func concerns(_ other: PathJob) -> Bool {
        func meet(_ some: [AbsolutePath], _ others: [AbsolutePath]) -> Bool {
            some.contains { path in others.contains { $0.isWithin(path) || path.isWithin($0) } }
        }
        return session.root.identity == other.session.root.identity
            && (meet(paths, other.paths) || meet(after, other.paths) || meet(paths, other.after))
    }

    /// Whether it is a commit that waits for files such as this save brings: then the save goes first.
    func waits(for save: PathJob) -> Bool {
        isWaiting && save.snapshot != nil && save.paths.allSatisfy { $0.isWithin(paths[0]) }
    }

    nonisolated func concerns(_ path: AbsolutePath, of root: PathRoot) -> Bool {
        session.root.identity == root.identity && paths.contains { $0.isWithin(path) || path.isWithin($0) }
    }

    /// For messages: what it makes or takes away.
    nonisolated var shown: String { paths[paths.count - 1].text }
}
