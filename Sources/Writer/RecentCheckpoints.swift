// SPDX-License-Identifier: Apache-2.0
/// What became of a run's last checkpoints: for `noether-writer checkpoints` and for subscribers. Owned by the daemon's queue.
import Posix
import Wire

struct RecentCheckpoints {
    private struct Key: Hashable {
        var session: String
        var sequence: UInt64
        var target: Int
    }

    /// A story must fit into a frame.
    private static let errorLength = 256

    private var infos: [Key: CheckpointInfo] = [:]
    private var order: [Key] = []
    /// When it was accepted, in monotonic seconds.
    private var starts: [Key: Double] = [:]

    /// Oldest first.
    var all: [CheckpointInfo] { order.compactMap { infos[$0] } }

    /// - Returns: what holds now.
    mutating func accepted(_ job: SaveJob, target: Int) -> CheckpointInfo {
        let key = Key(session: job.session, sequence: job.snapshot.sequence, target: target)
        let file = job.snapshot.targets[target]
        var info = CheckpointInfo(
            sequence: job.snapshot.sequence, file: file.fileName, state: .accepted, bytes: file.byteCount)
        info.logUpdate = job.snapshot.logUpdate
        info.acceptedAt = Clock.wallSeconds
        starts[key] = Clock.monotonicSeconds
        if infos.updateValue(info, forKey: key) == nil { order.append(key) }
        keep(Limits.checkpointsRemembered)
        return info
    }

    /// The run has ended, and many ended runs are listed.
    mutating func shorten() { keep(Limits.checkpointsRememberedEnded) }

    private mutating func keep(_ count: Int) {
        while order.count > count {
            let oldest = order.removeFirst()
            infos[oldest] = nil
            starts[oldest] = nil
        }
    }

    /// - Parameter done: bytes handed to the file system; nil: all of them.
    mutating func changed(
        _ job: SaveJob, target: Int, to state: CheckpointInfo.State, done: UInt64?, error: String? = nil
    ) -> CheckpointInfo? {
        let key = Key(session: job.session, sequence: job.snapshot.sequence, target: target)
        guard var info = infos[key] else { return nil }
        info.state = state
        info.bytesDone = done ?? info.bytes
        info.error = error.map { String($0.prefix(Self.errorLength)) }
        if state == .durable || state == .failed {
            info.endedAt = Clock.wallSeconds
            info.seconds = starts[key].map { Clock.monotonicSeconds - $0 }
        }
        infos[key] = info
        return info
    }
}
