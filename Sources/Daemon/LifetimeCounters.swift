// SPDX-License-Identifier: Apache-2.0
/// What is counted across restarts, in a small file of the state directory. No metrics would tell otherwise what a
/// daemon gives up while it starts or stops, since nobody asks it then. Owned by the daemon's queue; the file is read
/// and written on a queue of its own.
import Dispatch
import Posix
import Wire
import Writer

@DaemonActor
final class LifetimeCounters {
    struct Counts: Codable, Sendable {
        var starts: UInt64 = 0
        /// Files that a daemon before had accepted, and that could not be restored.
        var lostAtStart: UInt64 = 0
        /// Files that were accepted and not written when the time to stop was over, and that no fd store keeps.
        var lostAtStop: UInt64 = 0
    }

    private let directory: String
    private let path: String
    private let queue = DispatchQueue(label: "noether-writer.counters")
    private(set) var counts = Counts()

    /// - Parameter directory: the state directory. Hosts that share a home directory have a file each.
    nonisolated init(in directory: String) {
        self.directory = directory
        path = "\(directory)/counters-\(ThisProcess.hostName.replacing("/", with: "_")).json"
    }

    /// Adds what the daemons before have counted, once the file is read.
    func start() {
        counts.starts += 1
        queue.async { [path] in
            let text = (try? TextFile.read(path)) ?? ""
            let kept = (try? JSONPayload.decode(Counts.self, from: Array(text.utf8))) ?? Counts()
            DaemonActor.enter {
                self.counts.starts += kept.starts
                self.counts.lostAtStart += kept.lostAtStart
                self.counts.lostAtStop += kept.lostAtStop
                self.keep()
            }
        }
    }

    func lostAtStart() {
        counts.lostAtStart += 1
        keep()
    }

    /// The daemon's last act: waits a moment for the file.
    func lostAtStop(_ count: Int) {
        guard count > 0 else { return }
        counts.lostAtStop += UInt64(count)
        keep()
        let kept = DispatchSemaphore(value: 0)
        queue.async { kept.signal() }
        _ = kept.wait(timeout: .now() + 1)
    }

    /// A count that cannot be kept is still right until the next restart.
    private func keep() {
        let (directory, path, counts) = (directory, path, counts)
        queue.async {
            guard let bytes = try? JSONPayload.encode(counts) else { return }
            _ = try? Directory.openOrCreateRoot(directory, mode: 0o700)
            try? TextFile.replace(path, with: String(decoding: bytes, as: UTF8.self) + "\n", mode: 0o600)
        }
    }
}
