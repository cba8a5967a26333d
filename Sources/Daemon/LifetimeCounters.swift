// SPDX-License-Identifier: Apache-2.0
/// What is counted across restarts, in a small file of the state directory. No metrics would tell otherwise what a
/// daemon gives up while it starts or stops, since nobody asks it then. A daemon that steps aside and the next one have
/// the same file, so each change is added to what the file has. Owned by the daemon's queue; the file is read and
/// written on a queue of its own.
import Dispatch
import Posix
import Synchronization
import Wire
import Writer

@DaemonActor
final class LifetimeCounters {
    struct Counts: Codable, Sendable {
        var starts: UInt64 = 0
        /// Files that a daemon before had accepted, and that could not be restored.
        var lostAtStart: UInt64 = 0
        /// Files that were accepted and not written when the time to stop was over, and that no fd store kept.
        var lostAtStop: UInt64 = 0
        /// The paths of the files that were in the service manager's store when the last daemon left or was killed,
        /// by the name of the entry in the store.
        var stored: [String: [String]]?
    }

    private struct File {
        var counts = Counts()
        /// Whether the file has them: a count that could not be kept is still right until the next restart.
        var isKept = true
    }

    /// At most so many bytes of paths are stored: the file must not be too long to be read again.
    private static let storedBytes = TextFile.maximumByteCount / 2

    private let directory: String
    private let path: String
    private let queue = DispatchQueue(label: "noether-writer.counters")
    /// Touched on the queue.
    private nonisolated let file = Mutex(File())
    /// nil until the file is read: a counter that begins anew and then jumps would look like as many events.
    private(set) var counts: Counts?
    private var stored: [String: [String]] = [:]

    /// - Parameter directory: the state directory. Hosts that share a home directory have a file each.
    nonisolated init(in directory: String) {
        self.directory = directory
        path = "\(directory)/counters-\(ThisProcess.hostName.replacing("/", with: "_")).json"
    }

    /// Counts a start, and what was in the store of a daemon before and is there no more.
    /// - Parameters:
    ///   - kept: the names in the store now; nil if this daemon has none.
    ///   - lost: hears of each file that is gone.
    func start(kept: Set<String>?, lost: @escaping @Sendable @DaemonActor (String) -> Void) {
        change {
            $0.starts += 1
            guard let kept else { return }
            let gone = ($0.stored ?? [:]).filter { !kept.contains($0.key) }.values.joined().sorted()
            $0.stored = nil
            $0.lostAtStop += UInt64(gone.count)
            if !gone.isEmpty { DaemonActor.enter { for path in gone { lost(path) } } }
        }
    }

    func lostAtStart() { change { $0.lostAtStart += 1 } }

    /// The daemon's last act: waits a moment for the file.
    func lostAtStop(_ count: Int) {
        guard count > 0 else { return }
        change { $0.lostAtStop += UInt64(count) }
        wait()
    }

    /// Said while the daemon leaves, so that it is known too if it is killed meanwhile.
    func leaves(inStore files: [String: [String]]) {
        var bytes = 0
        let files = files.filter { _, paths in
            bytes += paths.reduce(0) { $0 + $1.utf8.count }
            return bytes <= Self.storedBytes
        }
        guard files != stored else { return }
        stored = files
        change { $0.stored = files.isEmpty ? nil : files }
    }

    /// For the last words.
    func wait() {
        let kept = DispatchSemaphore(value: 0)
        queue.async { kept.signal() }
        _ = kept.wait(timeout: .now() + 1)
    }

    /// Reads again what another daemon may have added.
    func refresh() { change { _ in } }

    private func change(_ change: @escaping @Sendable (inout Counts) -> Void) {
        queue.async { [self] in
            let counts = file.withLock { file in
                if file.isKept, let text = try? TextFile.read(path),
                    let counts = try? JSONPayload.decode(Counts.self, from: Array(text.utf8))
                {
                    file.counts = counts
                }
                let before = try? JSONPayload.encode(file.counts)
                change(&file.counts)
                if let bytes = try? JSONPayload.encode(file.counts), bytes != before || !file.isKept {
                    file.isKept = keep(bytes)
                }
                return file.counts
            }
            DaemonActor.enter { self.counts = counts }
        }
    }

    private nonisolated func keep(_ bytes: [UInt8]) -> Bool {
        _ = try? Directory.openOrCreateRoot(directory, mode: 0o700)
        do throws(PosixError) {
            try TextFile.replace(path, with: String(decoding: bytes, as: UTF8.self) + "\n", mode: 0o600)
        } catch { return false }
        return true
    }
}
