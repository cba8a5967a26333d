// SPDX-License-Identifier: Apache-2.0
/// What the Writer counts of all its runs over the daemon's life. Numbers only: their names and their text are the Daemon's. No run
/// is told apart here: runs come and go. Owned by the daemon's queue.
import Posix

@DaemonActor
public final class Measures {
    private nonisolated static let secondsBounds = [
        0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300,
    ]
    /// 1 KiB to 1 TiB, each four times the one before.
    private nonisolated static let byteBounds = (5...20).map { Double(1 << (2 * $0)) }

    // Logs

    /// Updates, and values in them.
    public internal(set) var updates: UInt64 = 0
    public internal(set) var scalars: UInt64 = 0
    public internal(set) var journalBytes: UInt64 = 0
    /// From the arrival of the oldest update of a group to where it survives the daemon, and power loss.
    public internal(set) var journaled = Histogram(secondsBounds)
    public internal(set) var synced = Histogram(secondsBounds)
    /// entries.th.
    public internal(set) var logFiles: UInt64 = 0

    // Checkpoints

    public internal(set) var runs: UInt64 = 0
    public internal(set) var saves: UInt64 = 0
    public internal(set) var checkpoints: UInt64 = 0
    public internal(set) var checkpointBytes: UInt64 = 0
    public internal(set) var removedCheckpoints: UInt64 = 0
    /// From the save's acceptance, and of the writing itself.
    public internal(set) var durable = Histogram(secondsBounds)
    public internal(set) var writing = Histogram(secondsBounds)
    public internal(set) var sizes = Histogram(byteBounds)
    /// Files given up, and times that storage refused for now, by the name of the error.
    public private(set) var failures = Measures.none
    public private(set) var stalls = Measures.none

    nonisolated init() {}

    /// Each reason from the start: a series that begins with its first event has no rate there.
    private nonisolated static var none: [String: UInt64] {
        Dictionary(uniqueKeysWithValues: PosixError.names.map { ($0, 0) })
    }

    func failed(_ error: PosixError) { failures[error.name, default: 0] += 1 }
    func stalled(_ error: PosixError) { stalls[error.name, default: 0] += 1 }

    func isDurable(bytes: UInt64, acceptedSeconds: Double, startSeconds: Double) {
        let now = Clock.monotonicSeconds
        checkpoints += 1
        checkpointBytes += bytes
        durable.add(now - acceptedSeconds)
        writing.add(now - startSeconds)
        sizes.add(Double(bytes))
    }
}

/// Of a fixed size, whatever comes.
public struct Histogram: Sendable {
    /// Ascending; each is the largest value of its bucket.
    public let bounds: [Double]
    /// Of each bucket by itself.
    public private(set) var counts: [UInt64]
    public private(set) var count: UInt64 = 0
    public private(set) var sum = 0.0

    public init(_ bounds: [Double]) {
        self.bounds = bounds
        counts = [UInt64](repeating: 0, count: bounds.count)
    }

    public mutating func add(_ value: Double) {
        count += 1
        sum += value
        if let index = bounds.firstIndex(where: { value <= $0 }) { counts[index] += 1 }
    }
}
