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

    public init(_ path: String) throws(ListenRefusal) {
        self.path = path
        do {
            try Directory.createParent(ofSocket: path)
            let number = try syscall("open \(path).lock") {
                nw_open("\(path).lock", O_RDWR | O_CREAT | nw_o_cloexec | nw_o_nofollow, 0o600)
            }
            lock = OwnedFD(adopting: number)
        } catch { throw .system(error) }
        guard nw_lock_exclusive(lock.number) == 0 else {
            var buffer = [UInt8](repeating: 0, count: 32)
            let count = max(0, pread(lock.number, &buffer, buffer.count, 0))
            throw .alreadyServed(path: path, pid: String(decoding: buffer.prefix(count), as: UTF8.self))
        }
        do throws(PosixError) {
            let pid = Array(String(getpid()).utf8)
            ftruncate(lock.number, 0)
            _ = pwrite(lock.number, pid, pid.count, 0)
            // The lock is ours, so whoever made this socket is dead. What is no socket is somebody's file.
            if let found = FileFacts(path), !found.isSocket {
                throw PosixError(EEXIST, "listen on \(path), which is no socket and is left as it is")
            }
            unlink(path)
            socket = try UnixSocket.listen(at: path)
        } catch { throw .system(error) }
    }

    public func remove() { unlink(path) }
}
