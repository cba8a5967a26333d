// SPDX-License-Identifier: Apache-2.0
/// An update finds the daemon of the release before it, which serves until somebody ends it. As
/// noether_writer/daemon_replacement.py.
internal import Posix
internal import Synchronization
internal import Wire

enum DaemonReplacement {
    /// For so long a daemon may write what it has accepted before it is asked to leave: others save to it meanwhile.
    private static let patience = 5.0
    /// How often this process may still ask a daemon to leave. If older trainers start their own daemon again each
    /// time, the two sides stop replacing each other after a few tries.
    private static let timesLeft = Mutex(3)

    /// Has the daemon finish and leave if it is older than the one that this process would start in its place.
    /// - Returns: whether it has left.
    static func handOver(
        _ connection: DaemonConnection, socket: String, say: (String) -> Void
    ) throws(NoetherWriterError) -> Bool {
        guard let welcome = connection.welcome, Release.isOlder(welcome.release, than: Release.version),
            connection.isOwn,
            let own = Spawn.firstLine(of: DaemonLauncher.program, ["--version"]),
            Release.isOlder(welcome.release, than: own),
            timesLeft.withLock({ number in
                number -= 1
                return number >= 0
            })
        else { return false }
        let found = "the daemon at \(socket) (process \(welcome.pid)) is version \(welcome.release), older than \(own)"
        guard welcome.capabilities.contains("leave") else {
            let way = welcome.service?.restart.map { "run `\($0)`" } ?? "end it in the way it was started"
            say("\(found). It is left as it is, since a service manager keeps it: to update it, \(way)")
            return false
        }
        let waited = try connection.ask(
            .wait, WaitRequest(runID: nil, timeoutSeconds: patience), Waited.self)
        guard waited.done else {
            say("\(found). It still writes, and serves this run too: to update it, run `noether-writer restart`")
            return false
        }
        say("\(found): it finishes what it has and leaves, and this process starts the next one")
        do throws(NoetherWriterError) {
            _ = try connection.ask(
                .leave, Leave(reason: "a trainer brings version \(own)"), Waited.self)
            // Not answered: the connection ends with the daemon's process.
            _ = try connection.ask(.status, [String: String](), StatusReport.self)
        } catch {
            // It is leaving all the same, or has gone.
            guard error.code == .waitTimeout || error.isRetryable else { throw error }
        }
        return true
    }
}
