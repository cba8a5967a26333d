// SPDX-License-Identifier: Apache-2.0
/// The metrics as a file for node_exporter's textfile collector: written anew every few seconds, whole or not at all.
/// It goes when the daemon goes: what is left behind would be told for ever. Owned by the daemon's queue; the file is
/// touched on a queue of its own.
import Dispatch
import Posix
import Writer

@DaemonActor
final class MetricsFile {
    private let path: String
    private let seconds: Double
    private let text: @DaemonActor () -> String?
    private let queue = DispatchQueue(label: "noether-writer.metrics")
    private var isWriting = false

    /// - Parameter text: nil if the file is not this daemon's to write.
    init(_ path: String, each seconds: Double, _ text: @escaping @DaemonActor () -> String?) {
        self.path = path
        self.seconds = seconds
        self.text = text
    }

    func start() {
        // A disk that hangs has one text waiting for it.
        if !isWriting, let text = text() {
            isWriting = true
            queue.async { [path] in
                var problem: PosixError?
                do throws(PosixError) { try TextFile.replace(path, with: text, mode: 0o644) } catch {
                    problem = error
                }
                let words = problem.map { "the metrics are not written: \($0)" }
                DaemonActor.enter {
                    self.isWriting = false
                    if let words { Log.writeLimited(.warning, words, topic: .storage) }
                }
            }
        }
        DaemonActor.enter(after: seconds) { self.start() }
    }

    /// Waits a moment for a file that is being written.
    func remove() {
        let removed = DispatchSemaphore(value: 0)
        queue.async { [path] in
            try? TextFile.remove(path)
            removed.signal()
        }
        _ = removed.wait(timeout: .now() + 1)
    }
}
