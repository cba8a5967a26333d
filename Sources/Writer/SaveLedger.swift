// SPDX-License-Identifier: Apache-2.0
/// What became of a run's saves: which of them are known, so that one that comes again is written once (`KnownSaves`),
/// the state of the last files (`RecentCheckpoints`), and how the files have ended (`FileOutcomes`). Owned by the
/// daemon's queue.
import Posix
import Wire

@DaemonActor
struct SaveLedger {
    private(set) var known = KnownSaves()
    private var recent = RecentCheckpoints()
    private(set) var outcomes = FileOutcomes()

    nonisolated init() {}

    /// The last checkpoints, oldest first.
    var checkpoints: [CheckpointInfo] { recent.all }

    /// The run has ended, and many ended runs are listed.
    mutating func shorten() { recent.shorten() }

    mutating func forgetFailures() { outcomes.forgetFailures() }

    mutating func begin(_ job: SaveJob) { known.begin(job) }

    /// - Returns: the state of each of its files.
    mutating func accept(_ job: SaveJob) -> [CheckpointInfo] {
        job.snapshot.targets.indices.map { recent.accepted(job, target: $0) }
    }

    /// A file's state has changed.
    /// - Parameter done: bytes that the file system has; nil for all.
    mutating func change(
        _ job: SaveJob, target: Int, to state: CheckpointInfo.State, done: UInt64?, error: PosixError? = nil
    ) -> CheckpointInfo? {
        recent.changed(job, target: target, to: state, done: done, error: error?.description)
    }

    /// A file of this save is durable under its name.
    mutating func becameDurable(_ target: Snapshot.Target, _ job: SaveJob) {
        outcomes.becameDurable()
        known.wrote(target, job)
        job.durable.append(target)
    }

    /// A file was given up.
    mutating func failed(_ path: String, _ error: PosixError) { outcomes.failed(path, error) }

    /// - Parameter count: of how many ended saves the events are kept.
    mutating func end(_ job: SaveJob, remembering count: Int) {
        outcomes.saveEnded(durableByteCount: job.durable.reduce(0) { $0 + $1.byteCount })
        known.end(job, remembering: count)
    }
}
