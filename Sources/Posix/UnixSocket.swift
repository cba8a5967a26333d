// SPDX-License-Identifier: Apache-2.0
/// Unix stream sockets, with descriptors passed beside the bytes. Non-blocking throughout.
import CLinux
import Glibc

public struct PeerCredentials: Sendable {
    public var process: PeerProcess
    public var uid: UInt32
    public var pid: Int32 { process.pid }

    public init(process: PeerProcess, uid: UInt32) {
        self.process = process
        self.uid = uid
    }
}

public enum UnixSocket {
    public enum Received {
        case bytes(Int, fds: [OwnedFD], truncatedFDs: Bool)
        case wouldBlock
        case end
    }

    static func make() throws(PosixError) -> OwnedFD {
        OwnedFD(
            adopting: try syscall("socket") {
                socket(AF_UNIX, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
            })
    }

    public static func connect(to path: String) throws(PosixError) -> OwnedFD {
        // In C it would end there, and name another socket.
        guard !path.utf8.contains(0) else { throw PosixError(EINVAL, "connect to \(path.debugDescription)") }
        let socket = try make()
        try syscall("connect to \(path)") { nw_unix_connect(socket.number, path) }
        return socket
    }

    /// Who listens on a path, found by connecting; nil if nobody does. Waits for nobody.
    static func listener(at path: String) throws(PosixError) -> PeerCredentials? {
        let socket = try make()
        try setNonBlocking(socket)
        do { try syscall("connect to \(path)") { nw_unix_connect(socket.number, path) } } catch {
            if error.isNothingListening { return nil }
            // A listener that has more connections waiting than it takes is one.
            guard error.errno == EAGAIN else { throw error }
            return PeerCredentials(process: PeerProcess(pid: 0, startTicks: 0), uid: ThisProcess.userID)
        }
        return try peerCredentials(of: socket)
    }

    /// The path that a socket is bound to; nil if that is not in the file system.
    public static func path(of socket: OwnedFD) -> String? {
        var buffer = [CChar](repeating: 0, count: 128)
        guard nw_unix_path(socket.number, &buffer, buffer.count) == 0, buffer[0] != 0 else { return nil }
        return String(decoding: buffer.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    /// Binds and listens; the socket file gets mode 0600 before anyone can connect.
    public static func listen(at path: String) throws(PosixError) -> OwnedFD {
        let socket = try make()
        let old = umask(0o177)  // guard: socket-is-private (= 0 for 0o177)
        defer { umask(old) }
        try syscall("bind \(path)") { nw_unix_bind(socket.number, path) }
        try syscall("listen on \(path)") { Glibc.listen(socket.number, SOMAXCONN) }
        try setNonBlocking(socket)
        return socket
    }

    public static func setNonBlocking(_ socket: OwnedFD) throws(PosixError) {
        try syscall("fcntl") { nw_set_nonblocking(socket.number) }
    }

    /// The next connection, or nil if none waits.
    public static func accept(on listener: OwnedFD) throws(PosixError) -> OwnedFD? {
        do {
            let number = try syscall("accept") { nw_accept(listener.number) }
            return OwnedFD(adopting: number)
        } catch {
            if error.errno == EAGAIN || error.errno == ECONNABORTED { return nil }
            throw error
        }
    }

    public static func peerCredentials(of socket: OwnedFD) throws(PosixError) -> PeerCredentials {
        var pid = pid_t()
        var uid = uid_t()
        try syscall("SO_PEERCRED") { nw_peer_credentials(socket.number, &pid, &uid) }
        return PeerCredentials(process: PeerProcess(of: socket, pid: pid), uid: uid)
    }

    /// One recvmsg: it never crosses from one descriptor set into the next (unix(7)).
    public static func receive(
        from socket: OwnedFD, into buffer: UnsafeMutableRawBufferPointer
    ) throws(PosixError) -> Received {
        var numbers = [Int32](repeating: -1, count: Int(NW_MAX_RECEIVED_FDS))
        var count: Int32 = 0
        var flags: Int32 = 0
        do {
            let received = try syscall("recvmsg") {
                numbers.withUnsafeMutableBufferPointer {
                    nw_receive(
                        socket.number, buffer.baseAddress, buffer.count, $0.baseAddress, &count, &flags)
                }
            }
            let fds = numbers.prefix(Int(count)).map { OwnedFD(adopting: $0) }
            if received == 0, fds.isEmpty { return .end }  // guard: end-of-stream (never)
            return .bytes(received, fds: fds, truncatedFDs: flags & Int32(MSG_CTRUNC) != 0)
        } catch {
            if error.errno == EAGAIN { return .wouldBlock }
            if error.errno == ECONNRESET { return .end }
            throw error
        }
    }

    /// Bytes sent, or nil if the socket is full. A descriptor goes with the first byte.
    public static func send(
        on socket: OwnedFD, _ bytes: UnsafeRawBufferPointer, fd: OwnedFD? = nil
    ) throws(PosixError) -> Int? {
        do {
            return try syscall("sendmsg") {
                nw_send(socket.number, bytes.baseAddress, bytes.count, fd?.number ?? -1)
            }
        } catch {
            if error.errno == EAGAIN { return nil }
            throw error
        }
    }
}

/// Where the daemon listens, unless someone says otherwise. Clients and the daemon must come to the same answer.
public enum SocketPath {
    /// `$NOETHER_WRITER_SOCKET`, or else the socket that the system keeps for this user (the template unit), or else
    /// the one in the user's runtime directory, or else (containers and batch jobs may have none of these) one below
    /// /tmp, whatever TMPDIR says: others that look for it may have another one.
    /// - Parameter environment: looks a variable up.
    public static func standard(_ environment: (String) -> String?) -> String {
        if let path = environment("NOETHER_WRITER_SOCKET"), !path.isEmpty { return path }
        // Before the runtime directory, which every login has: whoever set up the template wants it to be used.
        let own = Users.name(of: geteuid())
        let names = [named(environment), own].compactMap { $0 }
        for path in names.map(templateSocket) where isTemplates(path, of: geteuid()) { return path }
        if let directory = environment("XDG_RUNTIME_DIR"), directory.hasPrefix("/"), isOurs(directory) {
            return "\(directory)/noether-writer/socket"
        }
        let user = names.first ?? "\(ThisProcess.userID)"
        let system = templateSocket(user)
        var status = stat()
        if stat("\(templates)/\(user)", &status) == 0 || access("/run", W_OK) == 0 { return system }
        return "\(fallbackDirectory(of: geteuid()))/socket"
    }

    /// The name in USER, unless it is another user's: after `su` and `sudo -E`, root still has the name of the user who
    /// became root, and files that root makes in that user's directory would lock that user out.
    private static func named(_ environment: (String) -> String?) -> String? {
        guard let name = environment("USER"), !name.isEmpty, !name.contains("/") else { return nil }
        return Users.uid(of: name).map { $0 == geteuid() } ?? true ? name : nil
    }

    /// For root, who looks at a user's daemon: the first of that user's places where somebody listens, or else where
    /// there is a socket. What root has set up for the user, by the template or a batch system's prolog, comes first.
    /// The environment of that user is not known here.
    public static func ofUser(_ name: String, uid: UInt32) -> String {
        let runtime = "/run/user/\(uid)/noether-writer/socket"
        let places = [templateSocket(name), runtime, "\(fallbackDirectory(of: uid))/socket"].filter {
            isSocket($0, of: uid)
        }
        return places.first { (try? UnixSocket.listener(at: $0)) != nil } ?? places.first ?? runtime
    }

    private static let templates = "/run/noether-writer"
    private static func templateSocket(_ user: String) -> String { "\(templates)/\(user)/socket" }

    /// The manager's directory is root's, and all may enter it (DirectoryMode= of the unit). The one that a trainer of
    /// root's makes there, if it has no runtime directory, is closed to others.
    private static func isTemplates(_ path: String, of uid: UInt32) -> Bool {
        var status = stat()
        let directory = String(path.dropLast("/socket".count))
        return isSocket(path, of: uid) && lstat(directory, &status) == 0 && status.st_uid == 0
            && status.st_mode & 0o005 == 0o005
    }

    private static func isSocket(_ path: String, of uid: UInt32) -> Bool {
        var status = stat()
        return lstat(path, &status) == 0 && status.st_mode & S_IFMT == S_IFSOCK && status.st_uid == uid
    }

    private static func fallbackDirectory(of uid: UInt32) -> String { "/tmp/noether-writer-\(uid)" }

    /// Root does not use the runtime directory of the user who has become root: what root makes there would lock that
    /// user out. One that is not there is used if this user can make it: a batch job has the variable of another node's
    /// login, and a program that outlives its login that of a directory that is gone.
    private static func isOurs(_ directory: String) -> Bool {
        var status = stat()
        if stat(directory, &status) == 0 { return status.st_uid == geteuid() }
        guard errno == ENOENT else { return false }
        var parts = FileSystem.parts(of: directory)
        var parent: String { "/" + parts.joined(separator: "/") }
        repeat { parts.removeLast() } while !parts.isEmpty && stat(parent, &status) != 0
        return access(parent, W_OK | X_OK) == 0
    }

    /// Anybody may make names in /tmp. Called before anything in the directory there is opened.
    public static func checkFallback(_ path: String) throws(PosixError) {
        let directory = fallbackDirectory(of: geteuid())
        var status = stat()
        guard path == "\(directory)/socket", lstat(directory, &status) == 0 else { return }
        let problem: String? =
            if status.st_mode & S_IFMT != S_IFDIR {
                "is not a directory"
            } else if status.st_uid != geteuid() {
                "belongs to uid \(status.st_uid)"
            } else if status.st_mode & 0o077 != 0 {
                "can be entered by others"
            } else { nil }
        guard let problem else { return }
        throw PosixError(
            EPERM,
            "use \(directory), which \(problem) (remove it, or set NOETHER_WRITER_SOCKET or XDG_RUNTIME_DIR to a place of "
                + "yours)")
    }
}

/// Users by name and number, as the system's databases know them.
public enum Users {
    private static let byteCount = 16 << 10

    /// nil if the databases have none, as in many containers.
    public static func name(of uid: UInt32) -> String? {
        find(
            { getpwuid_r(uid, $0, $1, $2, $3) },
            read: { String(cString: $0.pw_name) })
    }

    public static func uid(of name: String) -> UInt32? {
        find(
            { getpwnam_r(name, $0, $1, $2, $3) },
            read: { $0.pw_uid })
    }

    public static func home(of name: String) -> String? {
        find(
            { getpwnam_r(name, $0, $1, $2, $3) },
            read: { String(cString: $0.pw_dir) })
    }

    private static func find<Value>(
        _ call: (
            UnsafeMutablePointer<passwd>, UnsafeMutablePointer<CChar>, Int,
            UnsafeMutablePointer<UnsafeMutablePointer<passwd>?>
        ) -> Int32, read: (passwd) -> Value
    ) -> Value? {
        var entry = passwd()
        var result: UnsafeMutablePointer<passwd>?
        return withUnsafeTemporaryAllocation(of: CChar.self, capacity: byteCount) { buffer in
            guard let base = buffer.baseAddress, call(&entry, base, byteCount, &result) == 0, result != nil else {
                return nil
            }
            return read(entry)
        }
    }
}
