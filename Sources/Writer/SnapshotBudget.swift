// SPDX-License-Identifier: Apache-2.0
/// How much memory snapshots may hold that are not durable yet: of one run, and of all. What does not fit is not taken, which
/// the client is told; it keeps the snapshot and asks again.
import Wire

@Intake
public final class SnapshotBudget {
    private let limit: UInt64
    private let limitPerRun: UInt64
    private var held: UInt64 = 0

    /// - Parameters:
    ///   - limit: in bytes; where nothing else is held one snapshot always fits.
    ///   - limitPerRun: in bytes; a run's only snapshot always fits.
    public nonisolated init(limit: UInt64, limitPerRun: UInt64) {
        self.limit = limit
        self.limitPerRun = limitPerRun
    }

    func check(_ byteCount: UInt64, of runID: String, holding heldByRun: UInt64) throws(WireError) {
        guard heldByRun == 0 || heldByRun + byteCount <= limitPerRun else {
            throw WireError(
                .busy,
                "run \(runID) has \(heldByRun) bytes on their way to storage; \(byteCount) more would pass "
                    + "snapshot_bytes_per_run, \(limitPerRun)")
        }
        guard held == 0 || held + byteCount <= limit else {
            throw WireError(
                .busy,
                "\(held) bytes of all runs are on their way to storage; \(byteCount) more would pass snapshot_bytes, "
                    + "\(limit)")
        }
    }

    /// Without a check: what a daemon before this one had accepted is taken whatever it is.
    func take(_ byteCount: UInt64) { held += byteCount }

    func giveBack(_ byteCount: UInt64) { held -= byteCount }
}
