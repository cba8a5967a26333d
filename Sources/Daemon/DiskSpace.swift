// SPDX-License-Identifier: Apache-2.0
/// How much room the file systems of runs have, for the metrics. Asking one that hangs blocks, so they are asked on a
/// queue of its own, and what is shown is what they said last. Owned by the daemon's queue.
import Dispatch
import Posix
import Writer

@DaemonActor
final class DiskSpace {
    private let queue = DispatchQueue(label: "noether-writer.space")
    private var isAsking = false
    /// By the run's directory, in bytes; when it was asked, since 1970.
    private var known: [String: (free: UInt64, at: Double)] = [:]

    /// What is known of each, and asks anew for the next time.
    func free(_ runs: [Run]) -> [String: (free: UInt64, at: Double)] {
        let places = runs.compactMap { run in run.storage.map { (run.name.directory, $0) } }
        if !isAsking, !places.isEmpty {
            isAsking = true
            queue.async {
                var found: [String: (free: UInt64, at: Double)] = [:]
                for (directory, descriptor) in places {
                    if let space = FileSystem.space(descriptor) { found[directory] = (space.free, Clock.wallSeconds) }
                }
                let answers = found
                DaemonActor.enter {
                    self.known = answers
                    self.isAsking = false
                }
            }
        }
        let wanted = Set(places.map(\.0))
        return known.filter { wanted.contains($0.key) }
    }
}
