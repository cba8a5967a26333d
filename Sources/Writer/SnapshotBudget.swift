// SPDX-License-Identifier: Apache-2.0
/// How much memory snapshots may hold that are not durable yet: of one run, and of all; and how many a service manager
/// keeps. What does not fit is not taken, which the client is told; it keeps the snapshot and asks again.
import Posix
import Wire

@DaemonActor
public final class SnapshotBudget {
    public let limit: UInt64
    private let limitPerRun: UInt64
    private let limitOfKeeper: Int
    private var count = 0
    public private(set) var held: UInt64 = 0
    /// Hears that saves hold more: what else is in their memory makes room.
    var isTaken: @DaemonActor () -> Void = {}
    /// Runs that found no room, by their directories: how much they asked for, when for the first time, and when last.
    private var waiting: [ByteName: (byteCount: UInt64, first: Double, last: Double)] = [:]
    /// A client asks again each second.
    private static let waitingSeconds = 3.0

    /// - Parameters:
    ///   - limit: in bytes; where nothing else is held one snapshot always fits.
    ///   - limitPerRun: in bytes; a run's only snapshot always fits.
    ///   - limitOfKeeper: how many snapshots the service manager has room for. One that it has no room for would be
    ///     accepted and lost with the daemon.
    public nonisolated init(limit: UInt64, limitPerRun: UInt64, limitOfKeeper: Int = .max) {
        self.limit = limit
        self.limitPerRun = limitPerRun
        self.limitOfKeeper = limitOfKeeper
    }

    /// What others have waited for longer is theirs, so that a run that saves without end keeps nobody out.
    func check(_ byteCount: UInt64, of run: RunName, holding heldByRun: UInt64) throws(WireError) {
        let (runID, key, now) = (run.runID, ByteName(run.directory), Clock.monotonicSeconds)
        guard heldByRun == 0 || heldByRun + byteCount <= limitPerRun else {  // guard: memory-of-a-run (always)
            throw WireError(
                .busy,
                "run \(runID) has \(heldByRun) bytes on their way to storage; \(byteCount) more would pass "
                    + "snapshot_bytes_per_run, \(limitPerRun)")
        }
        guard count < limitOfKeeper else {  // guard: room-in-the-fd-store (always)
            throw WireError(
                .busy,
                "\(count) snapshots of all runs are on their way to storage, and the fd store of systemd has no room for "
                    + "another (FileDescriptorStoreMax= of the unit, \(limitOfKeeper) snapshots)")
        }
        waiting = waiting.filter { now - $0.value.last < Self.waitingSeconds }
        let first = waiting[key]?.first ?? now
        let promised = waiting.values.reduce(0) { $1.first < first ? $0 + min($1.byteCount, limit) : $0 }
        // guard: memory-of-all-runs (always)
        guard promised == 0 ? held == 0 || held + byteCount <= limit : held + promised + byteCount <= limit else {
            waiting[key] = (byteCount, first, now)
            let others = promised == 0 ? "" : ", and other runs have waited longer for \(promised)"
            throw WireError(
                .busy,
                "\(held) bytes of all runs are on their way to storage\(others); \(byteCount) more would pass snapshot_bytes, "
                    + "\(limit)")
        }
        waiting[key] = nil
    }

    /// Without a check: what a daemon before this one had accepted is taken whatever it is.
    func reserve(_ byteCount: UInt64) {
        held += byteCount
        count += 1
        isTaken()  // guard: saves-come-before-images (skip)
    }

    func release(_ byteCount: UInt64) {
        held -= byteCount
        count -= 1
    }
}
