// SPDX-License-Identifier: Apache-2.0
/// The end of a process: a bounded wait (`NOETHER_WRITER_EXIT_TIMEOUT`) for what the daemon does not have yet, then
/// words about what is lost. As noether_writer/run.py, `_at_exit`.
internal import Posix
internal import Synchronization

enum Ending {
    private static let links = Mutex<[ObjectIdentifier: Link]>([:])
    private static let waitSliceSeconds = 0.02
    /// exit(3) calls this, once.
    private static let registered: Void = Process.atExit { Ending.settle() }

    /// A link that may still have something to deliver is kept, whoever lets go of its run.
    static func add(_ link: Link) {
        _ = registered
        links.withLock { $0[ObjectIdentifier(link)] = link }
    }

    static func remove(_ link: Link) { links.withLock { _ = $0.removeValue(forKey: ObjectIdentifier(link)) } }

    private static func settle() {
        // What can't be read was said when a run was to be opened.
        let limit = (try? Variables())?.exitSeconds ?? Variables.exitSeconds
        let deadline = Clock.monotonicSeconds + limit
        for link in links.withLock({ Array($0.values) }) {
            while link.hasWork, Clock.monotonicSeconds < deadline { Clock.sleep(waitSliceSeconds) }
            for words in link.lastWords() { Link.warn("run \(link.runID): \(words)") }
        }
    }
}
