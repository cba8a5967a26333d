// SPDX-License-Identifier: Apache-2.0
/// Which saves a run has and has had: so that one that a client sends again after a reconnect is written once, and an old one
/// never over a newer one.
import Posix
import Wire

/// A snapshot on its way, and who hears of it. A class, since the listener changes when a client reconnects.
@DaemonActor
final class SaveJob {
    nonisolated let snapshot: Snapshot
    nonisolated let session: String
    var events: EventSink
    /// The connection that has sent it last; 0 if it comes from a daemon before this one.
    var connection: UInt64
    /// Counts what its run's queue was given.
    var ordinal = 0
    /// Where a service manager keeps snapshots: it does now.
    var isAccepted = false
    /// When it was, in monotonic seconds.
    var acceptedSeconds = 0.0
    /// The events that ended its targets, for a client that asks again.
    var last: [CheckpointEvent] = []
    /// Targets that were written by this job.
    var durable: [Snapshot.Target] = []

    /// A daemon before this one had accepted it.
    nonisolated let isRestored: Bool
    /// Since 1970.
    nonisolated let acceptedAt: Double

    init(
        _ snapshot: Snapshot, session: String, connection: UInt64 = 0, isRestored: Bool = false,
        events: @escaping EventSink
    ) {
        self.snapshot = snapshot
        self.isRestored = isRestored
        acceptedAt = snapshot.acceptedAt ?? Clock.wallSeconds
        self.session = session
        self.connection = connection
        self.events = events
    }

    nonisolated func isAfter(_ other: SaveJob) -> Bool {
        session == other.session && snapshot.sequence > other.snapshot.sequence
    }
}

@DaemonActor
struct KnownSaves {
    private struct Key: Hashable {
        var session: String
        var sequence: UInt64
    }

    struct Ended {
        /// The last ones, for a client that has not heard them.
        var events: [CheckpointEvent]
        var fingerprint: Int
        var connection: UInt64
    }

    /// For each rank: more than a client can have in flight, so that whatever it sends again is known.
    nonisolated static let endedRemembered = 4 * Limits.savesInFlightPerRun

    private var inFlight: [Key: SaveJob] = [:]
    private var ended: [Key: Ended] = [:]
    private var order: [Key] = []
    /// Names written lately, and by which save.
    private var newest: [ByteName: (key: Key, position: Int)] = [:]
    private var written = 0
    private var remembered = endedRemembered
    /// Of files that differ in their tags of progress only: the one whose save has the highest number.
    private var latest: [Series: (sequence: UInt64, target: Snapshot.Target, position: Int)] = [:]

    private struct Series: Hashable {
        let session: String
        let beginning: ByteName
        let end: ByteName

        init(_ target: Snapshot.Target, _ job: SaveJob) {
            session = job.session
            beginning = ByteName(target.beginning)
            end = ByteName(target.end)
        }
    }

    nonisolated init() {}

    func job(_ session: String, _ sequence: UInt64) -> SaveJob? {
        inFlight[Key(session: session, sequence: sequence)]
    }

    func ended(_ session: String, _ sequence: UInt64) -> Ended? {
        ended[Key(session: session, sequence: sequence)]
    }

    mutating func begin(_ job: SaveJob) { inFlight[key(job)] = job }

    /// - Parameter count: of how many ended ones the events are kept.
    mutating func end(_ job: SaveJob, remembering count: Int) {
        remembered = count
        inFlight[key(job)] = nil
        ended[key(job)] = Ended(
            events: job.last, fingerprint: job.snapshot.fingerprint, connection: job.connection)
        order.append(key(job))
        while order.count > count { ended[order.removeFirst()] = nil }
    }

    mutating func wrote(_ target: Snapshot.Target, _ job: SaveJob) {
        written += 1
        newest[ByteName(target.fileName)] = (key(job), written)
        remember(target, job)
        if newest.count > remembered,
            let oldest = newest.min(by: { $0.value.position < $1.value.position })
        {
            newest[oldest.key] = nil
        }
    }

    private mutating func remember(_ target: Snapshot.Target, _ job: SaveJob) {
        guard Retention.Progress(target.tag) != nil else { return }
        let series = Series(target, job)
        if let found = latest[series], found.sequence > job.snapshot.sequence { return }
        latest[series] = (job.snapshot.sequence, target, written)
        if latest.count > Self.endedRemembered,
            let oldest = latest.min(by: { $0.value.position < $1.value.position })
        {
            latest[oldest.key] = nil
        }
    }

    /// The file behind which older ones go now that `target` is durable: mostly that one itself. A save that the daemon had no room
    /// for comes late, when others that were made after it are durable: then it is the last of these. One that was made later
    /// and is behind in the training (a run that went back) is none: what it goes on from stays.
    func successor(of target: Snapshot.Target, by job: SaveJob) -> Snapshot.Target {
        guard let found = latest[Series(target, job)], found.sequence > job.snapshot.sequence,
            let own = Retention.Progress(target.tag), let others = Retention.Progress(found.target.tag),
            own.scheme == others.scheme, own.isBefore(others)
        else { return target }
        return found.target
    }

    /// Whether it is known what the name holds, as far as this daemon has written it.
    func hasWritten(_ fileName: String) -> Bool { newest[ByteName(fileName)] != nil }

    /// Whether the name holds something newer of the same session.
    func isSuperseded(_ fileName: String, by job: SaveJob) -> Bool {
        guard let found = newest[ByteName(fileName)]?.key, found.session == job.session else { return false }
        return found.sequence > job.snapshot.sequence  // guard: older-save (never)
    }

    private func key(_ job: SaveJob) -> Key { Key(session: job.session, sequence: job.snapshot.sequence) }
}
