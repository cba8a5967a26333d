// SPDX-License-Identifier: Apache-2.0
/// What became of the files of a run, or of no run: how many became durable and how many were given up, with the last
/// of these. It is the one place that counts them.
import Posix
public import Wire

public struct FileOutcomes: Sendable {
    /// The last files that were given up.
    public private(set) var failures: [Waited.Failure] = []
    public private(set) var failureCount = 0
    private var forgottenFailureCount = 0
    public private(set) var durableCount = 0
    /// Bytes of durable files whose saves have ended. Until then they count among the bytes in flight.
    private(set) var durableByteCount: UInt64 = 0
    /// When the last file became durable, in monotonic seconds.
    public private(set) var lastDurableSeconds: Double?

    /// Those since `forgetFailures`: whom the earlier ones concerned has been told of them.
    public var newFailures: [Waited.Failure] { Array(failures.suffix(failureCount - forgottenFailureCount)) }
    mutating func forgetFailures() { forgottenFailureCount = failureCount }

    mutating func failed(_ path: String, _ error: PosixError) {
        failureCount += 1
        failures.append(Waited.Failure(path: path, message: error.description))
        if failures.count > Limits.failuresRemembered { failures.removeFirst() }
    }

    /// - Parameter count: of files; 0 if a name was moved or removed.
    mutating func becameDurable(count: Int = 1) {
        durableCount += count
        lastDurableSeconds = Clock.monotonicSeconds
    }

    mutating func saveEnded(durableByteCount count: UInt64) { durableByteCount += count }

    func fill(_ status: inout RunStatus.Checkpoints) {
        status.durable = durableCount
        status.failed = failureCount
        status.bytesDurable = durableByteCount
    }
}
