// SPDX-License-Identifier: Apache-2.0
/// Where the daemon's socket is, and how one is started for this user if nothing listens.
import Posix
import Synchronization
import Wire

package enum DaemonLauncher {
    static let startSeconds = 20.0
    /// The same for as long as the process that starts it lives: on a busy node, a program takes long to load from cold
    /// network storage.
    private static let loadSeconds = 120.0
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
            throw .wrongSocket(
                "NOETHER_WRITER_SOCKET is \(path.debugDescription), and must be an absolute path, because the daemon works "
                    + "in another directory")
        }
        if let found = FileFacts(path), !found.isSocket {
            throw .wrongSocket(
                "\(path) is not a socket, and is left as it is: set NOETHER_WRITER_SOCKET to another path")
        }
        let logStart = Int(FileFacts(logPath(path))?.byteCount ?? 0)
        var pid: Int32? = try launch(path, program)
        var againAt: Double?
        let start = Clock.monotonicSeconds
        var pause = 0.002
        while Clock.monotonicSeconds - start < (pid == nil ? startSeconds : loadSeconds) {
            if let socket = try connectIfListening(path) {
                // It ends by itself as soon as its daemon serves.
                if let pid { Spawn.wait(for: pid) }
                return socket
            }
            if let child = pid, let status = Spawn.exitStatus(of: child) {
                guard status == 0 || status == DaemonExit.alreadyServed else {
                    throw .notListening(
                        socket: path,
                        reason: "and the one that was started (\(program)) exited with status \(status)"
                            + lastWords(path, logStart))
                }
                pid = nil
                if status == DaemonExit.alreadyServed { againAt = Clock.monotonicSeconds + againSeconds }
            }
            // The one that has the socket does not listen: it is on its way out, and the next one has its place.
            if let time = againAt, Clock.monotonicSeconds >= time {
                againAt = nil
                pid = try launch(path, program)
            }
            Clock.sleep(pause)
            pause = min(0.1, pause * 1.5)
        }
        throw .unavailable("noether-writerd was started for \(path) and does not answer\(lastWords(path, logStart))")
    }

    private static func logPath(_ path: String) -> String {
        "/\(FileSystem.parts(of: path).dropLast().joined(separator: "/"))/daemon.log"
    }

    /// The last words of a daemon in its log, from a place on, and where the whole log is.
    private static func lastWords(_ path: String, _ start: Int) -> String {
        let log = logPath(path)
        guard let text = try? TextFile.read(log) else { return "" }
        let said = String(decoding: text.utf8.dropFirst(start), as: UTF8.self).split(separator: "\n").compactMap {
            line in
            ["noether-writerd: ", "Error: "].first { line.hasPrefix($0) }.map { line.dropFirst($0.count) }
        }
        return "\(said.last.map { ": \($0)" } ?? "") (its log is \(log))"
    }

    /// How long a daemon that has the socket may take to listen, until it is taken for one that leaves.
    private static let againSeconds = 0.25

    /// The process that starts a daemon; it ends when that one serves.
    private static func launch(_ path: String, _ program: String) throws(NoetherWriterError) -> Int32 {
        do {
            try Directory.createParent(ofSocket: path)
            try SocketPath.checkFallback(path)
        } catch {
            throw .wrongSocket(
                "no daemon listens on \(path), and none can be started there: \(error). Set NOETHER_WRITER_SOCKET or "
                    + "XDG_RUNTIME_DIR to a place of yours")
        }
        let named = ThisProcess.environment(Variable.daemon.rawValue) ?? ""
        do throws(PosixError) {
            return try Spawn.detached(
                program, ["--detach", "--socket", path, "--exit-idle", String(exitIdleSeconds)], log: logPath(path))
        } catch {
            let reason =
                switch error.errno {
                case _ where !named.isEmpty && !Spawn.isProgram(named):
                    "and NOETHER_WRITER_DAEMON names \(named), which is not a program that can be run: "
                        + "set it to the path of noether-writerd, or unset it to use the one of PATH"
                case PosixError.missing(program).errno where named.isEmpty:
                    "and no noether-writerd was found to start. Install the noether-writer wheel or package, put "
                        + "noether-writerd on PATH, or name it in NOETHER_WRITER_DAEMON"
                default: "and \(program) cannot be started: \(error)"
                }
            throw .notListening(socket: path, reason: reason)
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

    /// nil if nothing listens.
    private static func connectIfListening(_ path: String) throws(NoetherWriterError) -> OwnedFD? {
        let socket: OwnedFD
        let peer: PeerCredentials
        do { try SocketPath.checkFallback(path) } catch {
            throw .wrongSocket(error.operation)
        }
        do {
            socket = try UnixSocket.connect(to: path)
            peer = try UnixSocket.peerCredentials(of: socket)
        } catch {
            if error.isNothingListening { return nil }
            throw .wrongSocket("\(path) is not the socket of a daemon: \(error.reason). See NOETHER_WRITER_SOCKET")
        }
        let known = [ThisProcess.userID, 0] + [observedUser.withLock { $0 }].compactMap { $0 }
        guard known.contains(peer.uid), !ThisProcess.isNobody(peer.uid) else {
            throw .wrongSocket(
                "\(path) is served by uid \(peer.uid), not by you (uid \(ThisProcess.userID)) or root: nothing was sent to "
                    + "it. Set NOETHER_WRITER_SOCKET to a socket of your own")
        }
        return socket
    }
}
