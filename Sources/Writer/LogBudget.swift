// SPDX-License-Identifier: Apache-2.0
/// How much memory the logs of all runs may take together. When that is reached, a run that has more than its share logs no
/// more; a run that has less continues up to its share, so that one run does not end the logs of all.
import Posix
import Wire

@DaemonActor
final class LogBudget {
    private static let countSeconds = 0.25

    private let limit: Int
    /// Of the logs that are in memory, in bytes each.
    var sizes: () -> [Int] = { [] }
    /// Forgets what is in its file and needed by nobody who lives.
    var makeRoom: () -> Void = {}

    private var held = 0
    private var share = Int.max
    private var countedSeconds = -Double.infinity

    nonisolated init(limit: Int) { self.limit = limit }

    /// - Parameter own: of the log that is to be added to, in bytes.
    func check(own: Int) throws(WireError) {
        // Between two counts only what is added is known.
        if Clock.monotonicSeconds - countedSeconds >= Self.countSeconds { count() }
        guard held >= limit, own >= share else { return }  // guard: memory-of-all-logs (never)
        throw WireError(
            .logFull,
            "the logs of all runs have \(held) bytes, and at most \(limit) are allowed together: what this one holds is kept, "
                + "nothing is added. Raise log_bytes in the daemon's settings, or log less often")
    }

    func added(_ byteCount: Int) { held += byteCount }

    private func count() {
        countedSeconds = Clock.monotonicSeconds
        var sizes = sizes()
        if sizes.reduce(0, +) >= limit {
            makeRoom()
            sizes = self.sizes()
        }
        held = sizes.reduce(0, +)
        share = limit / max(1, sizes.count)
    }
}
