// SPDX-License-Identifier: Apache-2.0
/// Where the daemon's socket is, and how one is started for this user where nothing listens.
import Posix
import Synchronization
import Wire

package enum DaemonLauncher {
    static let startSeconds = 20.0
    static let exitIdleSeconds = 60

    /// What is started: a path, or a name to look up on PATH.
    static var program: String {
        let named = ThisProcess.environment(Variable.daemon.rawValue) ?? ""
        return named.isEmpty ? "noether-writerd" : named
    }

    /// As the Python package, whose programs are side by side: the one beside this program wins over PATH.
    static var programBesideThis: String {
        let isNamed = !(ThisProcess.environment(Variable.daemon.rawValue) ?? "").isEmpty
        return isNamed ? program : Spawn.beside(program) ?? program
    }

    static func connectOrStart(
        _ path: String, program: String = program
    ) throws(NoetherWriterError) -> OwnedFD {
        if let socket = try connectIfListening(path) { return socket }
        guard path.hasPrefix("/") else {
            throw .notListening(socket: path, reason: "it is not an absolute path; see NOETHER_WRITER_SOCKET")
        }
        if let found = FileFacts(path), !found.isSocket {
            throw .notListening(
                socket: path, reason: "it is not a socket, and is left as it is; see NOETHER_WRITER_SOCKET")
        }
        var pid: Int32? = try start(path, program)
        var againAt: Double?
        let deadline = Clock.monotonicSeconds + startSeconds
        var pause = 0.002
        var end = "does not answer"
        while Clock.monotonicSeconds < deadline {
            if let socket = try connectIfListening(path) {
                // It ends by itself as soon as its daemon serves.
                if let pid { Spawn.wait(for: pid) }
                return socket
            }
            if let child = pid, let status = Spawn.exitStatus(of: child) {
                guard status == 0 || status == DaemonExit.alreadyServed else {
                    end = "exited with status \(status)"
                    break
                }
                pid = nil
                if status == DaemonExit.alreadyServed { againAt = Clock.monotonicSeconds + againSeconds }
            }
            // The one that has the socket does not listen: it is on its way out, and the next one has its place.
            if let time = againAt, Clock.monotonicSeconds >= time {
                againAt = nil
                pid = try start(path, program)
            }
            Clock.sleep(pause)
            pause = min(0.1, pause * 1.5)
        }
        throw .notListening(
            socket: path, reason: "a daemon was started and \(end); see daemon.log beside the socket")
    }

    /// How long a daemon that has the socket may take to listen, until it is taken for one that leaves.
    private static let againSeconds = 0.25

    /// The process that starts a daemon; it ends when that one serves.
    private static func start(_ path: String, _ program: String) throws(NoetherWriterError) -> Int32 {
        do {
            try Directory.createParent(ofSocket: path)
            try SocketPath.checkFallback(path)
            let log = path.split(separator: "/").dropLast().joined(separator: "/")
            return try Spawn.detached(
                program, ["--detach", "--socket", path, "--exit-idle", String(exitIdleSeconds)],
                log: "/\(log)/daemon.log")
        } catch {
            throw .notListening(
                socket: path,
                reason:
                    "none could be started: \(error); install noether-writerd, put it on PATH, or name it in "
                    + "NOETHER_WRITER_DAEMON")
        }
    }

    /// - Throws: `NoetherWriterError.notListening`; nothing is started.
    static func connect(_ path: String) throws(NoetherWriterError) -> OwnedFD {
        if let socket = try connectIfListening(path) { return socket }
        throw .notListening(
            socket: path, reason: "nothing trains here now, or NOETHER_WRITER_SOCKET names another socket")
    }

    private static let observedUser = Mutex<UInt32?>(nil)

    /// From now on this process, which is root's, also connects to the daemon of this user.
    package static func observe(uid: UInt32) { observedUser.withLock { $0 = uid } }

    /// nil where nothing listens.
    private static func connectIfListening(_ path: String) throws(NoetherWriterError) -> OwnedFD? {
        let socket: OwnedFD
        let peer: PeerCredentials
        do { try SocketPath.checkFallback(path) } catch {
            throw .notListening(socket: path, reason: error.operation)
        }
        do {
            socket = try UnixSocket.connect(to: path)
            peer = try UnixSocket.peerCredentials(of: socket)
        } catch {
            if error.isNothingListening { return nil }
            throw .notListening(socket: path, reason: error.reason)
        }
        let known = [ThisProcess.userID, 0] + [observedUser.withLock { $0 }].compactMap { $0 }
        guard known.contains(peer.uid), !ThisProcess.isNobody(peer.uid) else {
            throw .notListening(
                socket: path,
                reason: "it is served by uid \(peer.uid), not by you (uid \(ThisProcess.userID)) or root; see "
                    + "NOETHER_WRITER_SOCKET")
        }
        return socket
    }
}
