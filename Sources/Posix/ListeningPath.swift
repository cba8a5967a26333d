// SPDX-License-Identifier: Apache-2.0
/// A listening socket under a path of the daemon's own: one live daemon per path, decided by a lock that dies with
/// its holder, so a stale socket is told from a live one without a race. Whoever listens without the lock, as a service
/// manager does for a daemon that it has not started yet, is found by connecting.
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

    /// A service manager's, which outlives this daemon.
    private let isAdopted: Bool

    /// Binds, and replaces the socket of a daemon that has died.
    public init(_ path: String) throws(ListenRefusal) {
        self.path = path
        isAdopted = false
        do throws(ListenRefusal) { lock = try Self.acquireLock("\(path).lock", of: path) } catch {
            // In a directory of the service manager's this user can't make a lock, and needs none.
            if case .system(let reason) = error, reason.isForbidden, let living = try? UnixSocket.listener(at: path) {
                throw .alreadyServed(path: path, pid: String(living.pid))
            }
            throw error
        }
        let living: PeerCredentials?
        do throws(PosixError) {
            // What is no socket is somebody's file.
            if let found = FileFacts(path), !found.isSocket {  // guard: socket-in-its-place (never)
                throw PosixError(EEXIST, "listen on \(path), which is not a socket and is left as it is")
            }
            living = try Self.clear(path)
        } catch { throw .system(error) }
        if let living { throw .alreadyServed(path: path, pid: String(living.pid)) }
        do throws(PosixError) { socket = try UnixSocket.listen(at: path) } catch { throw .system(error) }
        bound = OwnedFD.Identity(of: path)
    }

    /// A service manager has bound this socket: its path is locked for this daemon all the same, so that another one
    /// which is started by hand finds it held.
    /// - Returns: nil if another daemon holds the lock.
    /// - Throws: `PosixError` if there can be no lock.
    public init?(adopting socket: OwnedFD, at path: String) throws(PosixError) {
        do throws(ListenRefusal) { lock = try Self.acquireLock("\(path).lock", of: path) } catch {
            switch error {
            case .alreadyServed: return nil
            case .system(let error): throw error
            }
        }
        self.path = path
        self.socket = socket
        // The socket that is handed over may have lost its name, and a dead one may have it.
        bound = try UnixSocket.listener(at: path) == nil ? nil : OwnedFD.Identity(of: path)
        isAdopted = true
    }

    private init(_ path: String, lock: OwnedFD, socket: OwnedFD, isAdopted: Bool) {
        self.path = path
        self.lock = lock
        self.socket = socket
        self.isAdopted = isAdopted
        bound = OwnedFD.Identity(of: path)
    }

    /// Takes back what somebody has removed: makes the lock file, and binds another socket if no file has the path.
    /// - Returns: nil if something else has the path, or another daemon the lock.
    /// - Throws: `PosixError` if this user can't listen there.
    public func restored() throws(PosixError) -> ListeningPath? {
        do throws(ListenRefusal) {
            let lock = isLocked ? lock : try Self.acquireLock("\(path).lock", of: path)
            let found = OwnedFD.Identity(of: path)
            if found == nil || found != bound {
                guard try Self.clearDead(path) else { return nil }
                let socket: OwnedFD
                do throws(PosixError) { socket = try UnixSocket.listen(at: path) } catch { throw .system(error) }
                return ListeningPath(path, lock: lock, socket: socket, isAdopted: false)
            }
            return ListeningPath(path, lock: lock, socket: socket, isAdopted: isAdopted)
        } catch {
            switch error {
            case .alreadyServed: return nil
            case .system(let error): throw error
            }
        }
    }

    /// Removes a socket that nobody listens on.
    /// - Returns: whether nothing has the path now.
    private static func clearDead(_ path: String) throws(ListenRefusal) -> Bool {
        guard let before = OwnedFD.Identity(of: path) else { return true }
        do throws(PosixError) {
            guard FileFacts(path)?.isSocket == true, try UnixSocket.listener(at: path) == nil else { return false }
        } catch { throw .system(error) }
        if OwnedFD.Identity(of: path) == before { unlink(path) }
        return true
    }

    /// Removes the socket of a daemon that has died.
    /// - Returns: who listens there, if somebody does: then the socket stays. A service manager listens before it has a
    ///   daemon that takes the lock.
    private static func clear(_ path: String) throws(PosixError) -> PeerCredentials? {
        for _ in 0..<probes {
            let before = OwnedFD.Identity(of: path)
            guard let living = try UnixSocket.listener(at: path) else {
                // Another one may have its name by now.
                if OwnedFD.Identity(of: path) == before { unlink(path) }
                return nil
            }
            // Perhaps a daemon whose lock file somebody has removed: it notices that, and leaves.
            guard !isManager(living) else { return living }
            usleep(probeMicroseconds)
        }
        return try UnixSocket.listener(at: path)
    }

    private static let probes = 20
    private static let probeMicroseconds: UInt32 = 100_000

    private static func isManager(_ peer: PeerCredentials) -> Bool {
        peer.pid == 1 || (try? TextFile.read("/proc/\(peer.pid)/comm")) == "systemd\n"
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
            guard nw_lock_exclusive(lock.number) == 0 else {  // guard: living-daemon-stays (always)
                throw .alreadyServed(path: path, pid: owner(of: lock))
            }
            // A file that was removed between the two locks nobody out.
            if let identity = try? lock.status().identity, OwnedFD.Identity(of: file) == identity {
                writeOwner(of: lock)
                return lock
            }
        }
    }

    /// Over the number of the process before, in one write: who reads meanwhile finds the one number or the other.
    private static func writeOwner(of lock: OwnedFD) {
        let pid = Array(String(getpid()).utf8)
        let lengthBefore = (try? Int(lock.status().size)) ?? 0
        let padding = max(0, min(lengthBefore, maxOwnerLength) - pid.count)
        let padded = pid + Array(repeating: UInt8(ascii: " "), count: padding)
        _ = pwrite(lock.number, padded, padded.count, 0)
        ftruncate(lock.number, off_t(pid.count))
    }

    /// Lets the next daemon serve the path while this one still writes what storage does not take. The lock keeps
    /// another name, by which this process is found.
    public func stepAside() { rename("\(path).lock", "\(path)\(Self.leavingSuffix)") }

    /// Whether another daemon has made a lock of its own since this one stepped aside.
    public var isTakenOver: Bool {
        guard let own = try? lock.status().identity, let found = OwnedFD.Identity(of: "\(path).lock") else {
            return false
        }
        return found != own
    }

    private static let leavingSuffix = ".leaving.lock"

    /// Whether a daemon of this path has stepped aside, and still writes.
    public static func isBeingLeft(_ path: String) -> Bool { holder(ofLock: path + leavingSuffix) != nil }

    /// The process that has the lock of a path, whether it listens, begins to or leaves; nil if none does.
    public static func holder(of path: String) -> PeerProcess? {
        holder(ofLock: "\(path).lock") ?? holder(ofLock: path + leavingSuffix)
    }

    private static func holder(ofLock file: String) -> PeerProcess? {
        let number = nw_open(file, O_RDWR | nw_o_cloexec | nw_o_nofollow, 0)
        guard number >= 0 else { return nil }
        let lock = OwnedFD(adopting: number)
        // A process that has just taken the lock has not written its number yet.
        for _ in 0..<probes where nw_lock_exclusive(lock.number) != 0 {
            if let pid = Int32(owner(of: lock)), let ticks = ThisProcess.startTicks(of: pid) {
                return PeerProcess(pid: pid, startTicks: ticks)
            }
            usleep(probeMicroseconds)
        }
        return nil
    }

    private static let maxOwnerLength = 32

    private static func owner(of lock: OwnedFD) -> String {
        var buffer = [UInt8](repeating: 0, count: maxOwnerLength)
        let count = max(0, pread(lock.number, &buffer, buffer.count, 0))
        return String(decoding: buffer.prefix(count).prefix { $0 != UInt8(ascii: " ") }, as: UTF8.self)
    }

    /// Whether the path and its lock are still this daemon's. After somebody has removed or replaced one of them,
    /// trainers can't find this daemon, or another daemon may serve the same path.
    public var isHeld: Bool {
        guard let bound, OwnedFD.Identity(of: path) == bound else { return false }
        return isLocked
    }

    private var isLocked: Bool {
        guard let locked = try? lock.status().identity else { return false }
        return OwnedFD.Identity(of: "\(path).lock") == locked
    }

    /// Removes the socket from the file system, if this daemon has bound it and nothing else has its name by now.
    public func remove() {
        if !isAdopted, let bound, OwnedFD.Identity(of: path) == bound { unlink(path) }
    }
}
