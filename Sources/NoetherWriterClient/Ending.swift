// SPDX-License-Identifier: Apache-2.0
/// The end of a process: a bounded wait (`NOETHER_WRITER_EXIT_TIMEOUT`) for what the daemon does not have yet, then
/// words about what is lost. As noether_writer/run.py, `_at_exit`.
internal import Posix
internal import Synchronization

enum Ending {
    private static let sessions = Mutex<[ObjectIdentifier: Session]>([:])
    private static let waitSliceSeconds = 0.02
    /// exit(3) calls this, once.
    private static let registered: Void = ThisProcess.atExit { Ending.settle() }

    /// A session that may still have something to deliver is kept, whoever lets go of its run.
    static func add(_ session: Session) {
        _ = (owner, registered)
        sessions.withLock { $0[ObjectIdentifier(session)] = session }
    }

    static func remove(_ session: Session) {
        sessions.withLock { _ = $0.removeValue(forKey: ObjectIdentifier(session)) }
    }

    /// A child that was forked has none of these sessions, though it has their memory.
    private static let owner = ThisProcess.id

    private static func settle() {
        guard ThisProcess.id == owner else { return }
        // What can't be read was said when a run was to be opened.
        let limit = (try? Variables())?.exitSeconds ?? Variables.exitSeconds
        let deadline = Clock.monotonicSeconds + limit
        for session in sessions.withLock({ Array($0.values) }) {
            while session.hasWork, Clock.monotonicSeconds < deadline { Clock.sleep(waitSliceSeconds) }
            for words in session.lastWords() { session.speaker.fail("\(session.title): \(words)") }
        }
    }
}
