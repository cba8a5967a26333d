// SPDX-License-Identifier: Apache-2.0
/// A listening socket under a path of the daemon's own: one live daemon per path, decided by a lock that dies with
/// its holder, so a stale socket is told from a live one without a race.
import CLinux
import Glibc

public enum ListenRefusal: Error, Sendable {
    case alreadyServed(path: String, pid: String)
    case system(PosixError)
}

public final class ListeningPath: Sendable {
    public let socket: OwnedFD
    public let path: String
    private let lock: OwnedFD
    /// The socket's own place in the file system, which may go or change under its name.
    private let bound: OwnedFD.Identity?

    public init(_ path: String) throws(ListenRefusal) {
        self.path = path
        lock = try Self.acquireLock("\(path).lock", of: path)
        do throws(PosixError) {
            let pid = Array(String(getpid()).utf8)
            ftruncate(lock.number, 0)
            _ = pwrite(lock.number, pid, pid.count, 0)
            // The lock is ours, so whoever made this socket is dead. What is no socket is somebody's file.
            if let found = FileFacts(path), !found.isSocket {
                throw PosixError(EEXIST, "listen on \(path), which is not a socket and is left as it is")
            }
            unlink(path)
            socket = try UnixSocket.listen(at: path)
            bound = OwnedFD.Identity(of: path)
        } catch { throw .system(error) }
    }

    private static func acquireLock(_ file: String, of path: String) throws(ListenRefusal) -> OwnedFD {
        while true {
            let lock: OwnedFD
            do {
                try SocketPath.checkFallback(path)
                try Directory.createParent(ofSocket: path)
                try SocketPath.checkFallback(path)
                let number = try syscall("open \(file)") {
                    nw_open(file, O_RDWR | O_CREAT | nw_o_cloexec | nw_o_nofollow, 0o600)
                }
                lock = OwnedFD(adopting: number)
            } catch { throw .system(error) }
            guard nw_lock_exclusive(lock.number) == 0 else {
                throw .alreadyServed(path: path, pid: owner(of: lock))
            }
            // A file that was removed between the two locks nobody out.
            if let identity = try? lock.status().identity, OwnedFD.Identity(of: file) == identity { return lock }
        }
    }

    /// The process that has the lock of a path, whether it listens, begins to or leaves; nil if none does.
    public static func holder(of path: String) -> PeerProcess? {
        let number = nw_open("\(path).lock", O_RDWR | nw_o_cloexec | nw_o_nofollow, 0)
        guard number >= 0 else { return nil }
        let lock = OwnedFD(adopting: number)
        guard nw_lock_exclusive(lock.number) != 0 else { return nil }
        guard let pid = Int32(owner(of: lock)), let ticks = ThisProcess.startTicks(of: pid) else { return nil }
        return PeerProcess(pid: pid, startTicks: ticks)
    }

    private static func owner(of lock: OwnedFD) -> String {
        var buffer = [UInt8](repeating: 0, count: 32)
        let count = max(0, pread(lock.number, &buffer, buffer.count, 0))
        return String(decoding: buffer.prefix(count), as: UTF8.self)
    }

    /// Whether the path and its lock are still this daemon's. After somebody has removed or replaced one of them,
    /// trainers can't find this daemon, or another daemon may serve the same path.
    public var isHeld: Bool {
        guard let bound, OwnedFD.Identity(of: path) == bound, let locked = try? lock.status().identity else {
            return false
        }
        return OwnedFD.Identity(of: "\(path).lock") == locked
    }

    /// Removes the socket from the file system, unless something else has its name by now.
    public func remove() {
        if let bound, OwnedFD.Identity(of: path) == bound { unlink(path) }
    }
}
