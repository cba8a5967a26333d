// SPDX-License-Identifier: Apache-2.0
/// Directories held open, and what happens below them. Paths below a held directory are opened with openat2
/// RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS: a symlink swapped in is refused by the kernel, not by a string check.
import CLinux
import Glibc

public final class Directory: Sendable {
    public let fd: OwnedFD
    public let path: String
    public let identity: OwnedFD.Identity
    /// The file system's number.
    public var device: UInt64 { identity.device }
    /// What new entries' modes lack, beyond the process's own umask(2).
    public let mask: UInt32
    /// The directory that was opened by its path, and the components below it.
    private let root: String
    private let below: [String]
    /// What `root` is, if its path leads elsewhere in this process's mount namespace; nil: the path counts.
    public let anchor: OwnedFD?

    private init(
        _ number: Int32, root: String, below: [String], mask: UInt32, anchor: OwnedFD? = nil
    ) throws(PosixError) {
        var status = stat()
        path = ([root] + below).joined(separator: "/")
        guard files.fstat(number, &status) == 0 else {
            let code = errno
            files.close(number)
            throw PosixError(code, "fstat \(root)")
        }
        identity = OwnedFD.Identity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
        fd = OwnedFD(adopting: number, on: identity.device)
        self.root = root
        self.below = below
        self.mask = mask
        self.anchor = anchor
    }

    /// The mode of a new entry. If the directory has a default ACL, the ACL decides, and no mask counts (acl(5),
    /// umask(2)).
    func mode(_ usual: UInt32) -> UInt32 {
        let saysItself = mask != 0 && files.attribute("system.posix_acl_default", of: fd.number, into: nil) >= 0
        return saysItself ? usual : usual & ~mask
    }

    /// The way to this directory, without holding it.
    public struct Reference: Sendable {
        fileprivate let root: String
        fileprivate let below: [String]
        fileprivate let mask: UInt32
        fileprivate let anchor: OwnedFD?

        /// The directory at the beginning. Nothing is created.
        private func openRoot() throws(PosixError) -> Directory {
            guard let anchor else { return try Directory.open(root, mask: mask) }
            return try Directory.open(anchor, seenAs: root, mask: mask)
        }

        /// Nothing is created.
        public func open() throws(PosixError) -> Directory {
            var found = try openRoot()
            for name in below { found = try found.child(name, create: false) }
            return found
        }

        /// As `open`, of a directory that was on `device`. What somebody has removed is made anew, or is nil; but where
        /// the nearest
        /// directory that is there lies on another device, a mount is gone, and nothing may come into being below its
        /// mount point.
        public func find(on device: UInt64, creates: Bool) throws(PosixError) -> Directory? {
            do { return try open() } catch { if !error.isMissing { throw error } }
            if anchor != nil { return try findBelowAnchor(on: device, creates: creates) }
            let whole = FileSystem.parts(of: root) + below
            var status = stat()
            var isThere = false
            for count in (0...whole.count).reversed() where !isThere {
                let path = "/" + whole[..<count].joined(separator: "/")
                do throws(PosixError) {
                    try syscall("stat \(path)") { files.stat(path, &status) }
                    isThere = true
                } catch {
                    // Anything else does not say that it was removed.
                    if !error.isMissing, error.errno != ENOTDIR { throw error }
                }
            }
            guard isThere, UInt64(status.st_dev) == device else {  // guard: nothing-beside-the-mount (always)
                throw PosixError(
                    ENOENT, "find /\(whole.joined(separator: "/")), which is gone with its file system")
            }
            guard creates else { return nil }
            var found = try Directory.openOrCreateRoot(root, mask: mask, syncs: true)
            for name in below { found = try found.child(name) }
            return found
        }

        private func findBelowAnchor(on device: UInt64, creates: Bool) throws(PosixError) -> Directory? {
            var found = try openRoot()
            for name in below {
                if try found.identity(below: name) == nil {
                    guard found.device == device else {
                        throw PosixError(ENOENT, "find \(found.path)/\(name), which is gone with its file system")
                    }
                    guard creates else { return nil }
                }
                found = try found.child(name)
            }
            return found
        }
    }

    public var reference: Reference { Reference(root: root, below: below, mask: mask, anchor: anchor) }

    /// A directory that another process has opened, and what that process calls it.
    public static func open(_ anchor: OwnedFD, seenAs path: String, mask: UInt32 = 0) throws(PosixError) -> Directory {
        let number = try syscall("open \(path) of the trainer") {
            files.openBeneath(anchor.number, ".", UInt64(O_RDONLY | nw_o_directory | nw_o_cloexec), 0)
        }
        return try Directory(number, root: path, below: [], mask: mask, anchor: anchor)
    }

    /// A directory by its absolute path, below a root that another process has opened. No part of it may be a link.
    /// Nothing is created.
    public static func open(_ path: String, below root: OwnedFD, mask: UInt32 = 0) throws(PosixError) -> Directory {
        let parts = FileSystem.parts(of: path)
        let flags = UInt64(O_RDONLY | nw_o_directory | nw_o_cloexec)
        do {
            let number = try syscall("open \(path)") {
                nw_open_beneath(root.number, parts.isEmpty ? "." : parts.joined(separator: "/"), flags, 0)
            }
            return try Directory(number, root: path, below: [], mask: mask)
        } catch {
            guard error.errno == ENOSYS else { throw error }
        }
        // Where openat2(2) is refused, one part at a time says the same.
        var found = try open(root, seenAs: "/", mask: mask)
        for part in parts { found = try found.child(part, create: false) }
        let number = try syscall("open \(path)") { nw_open_beneath(found.fd.number, ".", flags, 0) }
        return try Directory(number, root: path, below: [], mask: mask)
    }

    /// Whether this process reaches a directory that another one has opened by its path too, and may write there if the
    /// other one may.
    public static func leads(_ path: String, to directory: OwnedFD) throws(PosixError) -> Bool {
        var here = stat()
        let there = try directory.status().identity
        guard files.stat(path, &here) == 0, UInt64(here.st_dev) == there.device, UInt64(here.st_ino) == there.inode
        else {
            return false
        }
        var (mountHere, mountThere) = (statvfs(), statvfs())
        guard statvfs(path, &mountHere) == 0, fstatvfs(directory.number, &mountThere) == 0 else { return true }
        let isReadOnlyHere = mountHere.f_flag & UInt(ST_RDONLY) != 0
        return !isReadOnlyHere || mountThere.f_flag & UInt(ST_RDONLY) != 0
    }

    /// Opens an absolute path that its owner chose; symlinks in it are theirs to make. Missing parts are created,
    /// durably.
    /// - Parameter syncs: also those of this user's that are there: whoever made them may have died before they were
    ///   durable, and all that lies below one that is lost is lost.
    public static func openOrCreateRoot(
        _ path: String, mode: UInt32 = 0o777, mask: UInt32 = 0, syncs: Bool = false
    ) throws(PosixError) -> Directory {
        var prefix = ""
        var refusal: PosixError?
        for part in FileSystem.parts(of: path) {
            let parent = prefix + "/"
            prefix += "/\(part)"
            let saysItself = mask != 0 && files.attribute("system.posix_acl_default", of: parent, into: nil) >= 0
            // Whether a refusal matters shows when it is opened: it may be there. What lies below a refused one is only
            // missing.
            if files.mkdir(prefix, saysItself ? mode : mode & ~mask) == 0 {
                try syncParent(parent)
            } else if errno != EEXIST {
                if errno != ENOENT || refusal == nil { refusal = PosixError(errno, "create \(prefix)") }
            } else if syncs, isOwn(prefix) {
                try syncParent(parent)
            }
        }
        do { return try open(path, mask: mask) } catch {
            if error.isMissing, let refusal { throw refusal }
            throw error
        }
    }

    private static func isOwn(_ path: String) -> Bool {
        var status = stat()
        return files.stat(path, &status) == 0 && status.st_uid == geteuid()
    }

    /// One that this user may not read, or whose file system syncs no directories, is as durable as its owner has it.
    private static func syncParent(_ path: String) throws(PosixError) {
        do throws(PosixError) { try open(path).sync() } catch {
            if ![EACCES, EPERM, EINVAL, EROFS].contains(error.errno) { throw error }
        }
    }

    /// The directory of a socket, made private to this user if it is missing; those above it are made as mkdir -p
    /// would.
    public static func createParent(ofSocket path: String) throws(PosixError) {
        let parent = FileSystem.parts(of: path).dropLast().joined(separator: "/")
        // guard: socket-directory-is-private (= 0o755 for 0o700)
        if !parent.isEmpty { _ = try openOrCreateRoot("/" + parent, mode: 0o700) }
    }

    public static func open(_ path: String, mask: UInt32 = 0) throws(PosixError) -> Directory {
        let number = try syscall("open \(path)") {
            files.open(path, O_RDONLY | nw_o_directory | nw_o_cloexec, 0)
        }
        return try Directory(number, root: path, below: [], mask: mask)
    }

    /// One component below, created if missing. The entry is made durable: a file in a directory that is lost is
    /// lost too.
    public func child(_ name: String, create: Bool = true) throws(PosixError) -> Directory {
        // Somebody may remove it between its making and its opening.
        for _ in 1..<(create ? Self.triesAtOnce : 1) {
            do throws(PosixError) { return try childNow(name, create: create) } catch {
                guard error.isMissing else { throw error }
            }
        }
        return try childNow(name, create: create)
    }

    private static let triesAtOnce = 3

    private func childNow(_ name: String, create: Bool) throws(PosixError) -> Directory {
        let childPath = "\(path)/\(name)"
        var refusal: PosixError?
        if create {
            // Also of one that is there: whoever made it may have died, or failed, before it was durable.
            if files.mkdir(name, in: fd.number, mode(0o777)) == 0 || errno == EEXIST {
                try sync()  // guard: new-directory-synced (skip)
            } else {
                refusal = PosixError(errno, "create \(childPath)")
            }
        }
        let number: Int32
        do {
            number = try syscall("open \(childPath)") {
                files.openBeneath(fd.number, name, UInt64(O_RDONLY | nw_o_directory | nw_o_cloexec), 0)
            }
        } catch {
            if error.isMissing, let refusal { throw refusal }
            var status = stat()
            if files.fstat(name, in: fd.number, &status) == 0, status.st_mode & S_IFMT == S_IFLNK {
                throw PosixError(
                    error.errno,
                    "open \(childPath), which is a symbolic link: only the way to output_root may have links, since whoever can "
                        + "change one could send files elsewhere. Put a directory there, or mount one (mount --bind), or name "
                        + "what the link leads to in output_root")
            }
            throw error
        }
        // It is there, whatever the refusal meant.
        let found = try Directory(number, root: root, below: below + [name], mask: mask, anchor: anchor)
        if refusal != nil { try sync() }
        return found
    }

    /// Entries, without `.` and `..`, in no order.
    public func names() throws(PosixError) -> [String] {
        guard let names = files.names(in: fd.number) else { throw PosixError(errno, "read \(path)") }
        return names
    }

    /// Whether the name is a file, not a link, of the owner that the directory has or of this process.
    public func isOwnFile(_ name: String) throws(PosixError) -> Bool {
        let number = files.openBeneath(fd.number, name, UInt64(nw_o_path | nw_o_nofollow | nw_o_cloexec), 0)
        guard number >= 0 else { return false }
        let status = try OwnedFD(adopting: number).status()
        let owner = try fd.status().owner
        return status.isRegular && (status.owner == geteuid() || status.owner == owner)
    }

    /// Returns an extended attribute (xattr(7)) of the file with this name, or nil if the file or the attribute is
    /// missing.
    public func attribute(_ attribute: String, of name: String) throws(PosixError) -> String? {
        let file: OwnedFD
        do throws(PosixError) {
            // Not blocking: a FIFO may have the name.
            let flags = UInt64(O_RDONLY | O_NONBLOCK | O_NOCTTY | nw_o_cloexec)
            let number = try syscall("open \(path)/\(name)") { files.openBeneath(fd.number, name, flags, 0) }
            file = OwnedFD(adopting: number, on: device)
        } catch {
            // What can't be read, or is a socket or a device, has none that counts.
            if !error.isRetryable || [EACCES, EPERM, ENXIO, ENODEV].contains(error.errno) { return nil }
            throw error
        }
        var bytes = [UInt8](repeating: 0, count: 256)
        let count = bytes.withUnsafeMutableBytes { files.attribute(attribute, of: file.number, into: $0) }
        return count < 0 ? nil : String(validating: bytes.prefix(count), as: UTF8.self)
    }

    /// Whether both are the same directory, by whatever path.
    public func isSame(as other: Directory) -> Bool { identity == other.identity }

    /// What has the name below this directory, itself if that is a link; nil if nothing has it. Storage that does not
    /// say so throws: what it has there is not taken for removed.
    public func identity(below name: String) throws(PosixError) -> OwnedFD.Identity? {
        var status = stat()
        do throws(PosixError) {
            try syscall("stat \(path)/\(name)") { files.fstat(name, in: fd.number, &status) }
        } catch {
            if error.isMissing { return nil }
            throw error
        }
        return OwnedFD.Identity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
    }

    /// Locks this directory for the holder of this descriptor, as long as it is open (flock(2)).
    /// - Returns: false where another descriptor has it locked. A file system that has no locks for directories (NFS)
    /// counts as free.
    public func lock() -> Bool { takeLock(fd.number) || errno != EWOULDBLOCK }

    /// At once: the descriptor itself may be closed later, on a queue.
    public func unlock() { _ = nw_unlock(fd.number) }

    /// Whether another descriptor has this directory locked, or the file below it. It is asked by sharing the lock for
    /// a moment, which `takeLock` bears with.
    public func isLocked(below name: String? = nil) -> Bool {
        let flags = UInt64(O_RDONLY | O_NONBLOCK | O_NOCTTY | nw_o_cloexec)
        // A descriptor of its own: closing it gives the lock back.
        let number = nw_open_beneath(fd.number, name ?? ".", flags, 0)
        guard number >= 0 else { return false }
        defer { close(number) }
        return nw_lock_shared(number) != 0 && errno == EWOULDBLOCK
    }

    public func sync() throws(PosixError) { try syscall("fsync \(path)") { files.fsync(fd.number) } }

    /// Gives a file a second name, durably, so that something else may take the first one: the first of the numbered
    /// names that is free, never one that something has. A file that has one of them already, since who was about to
    /// replace it has died, keeps it.
    /// - Parameter numbered: the n-th name, from 1 on.
    /// - Returns: the second name; nil if there is no such file.
    @discardableResult
    public func keepBeside(
        _ name: String, leavesName: Bool = true, as numbered: (Int) -> String
    ) throws(PosixError) -> String? {
        guard let kept = try identity(of: name) else { return nil }
        for number in 1... {
            let other = numbered(number)
            if let there = try identity(of: other) {
                if there == kept { return other }
            } else if try giveName(other, to: name, leavesName: leavesName) {
                try sync()
                return other
            }
        }
        return nil
    }

    /// - Returns: false if something has the new name.
    private func giveName(_ other: String, to name: String, leavesName: Bool) throws(PosixError) -> Bool {
        if leavesName, files.link(name, as: other, in: fd.number) == 0 { return true }
        // A file system without hard links: there the old name is free until the new file takes it.
        if !leavesName || [EPERM, EOPNOTSUPP, ENOSYS, EMLINK].contains(errno) {
            if files.renameNew(name, to: other, in: fd.number) == 0 { return true }
            // Who asked has seen that the name is free, and is the only one who writes here.
            if errno == EINVAL || errno == ENOSYS, files.rename(name, to: other, in: fd.number) == 0 {
                return true
            }
        }
        if errno == EEXIST { return false }
        throw PosixError(errno, "keep \(path)/\(name) as \(other)")
    }

    /// The identity of what has this name: of the link itself, if it is one. It is nil for a directory, which cannot be
    /// kept.
    private func identity(of name: String) throws(PosixError) -> OwnedFD.Identity? {
        var status = stat()
        do throws(PosixError) {
            try syscall("stat \(path)/\(name)") { files.fstat(name, in: fd.number, &status) }
        } catch {
            if error.isMissing { return nil }
            throw error
        }
        guard status.st_mode & S_IFMT != S_IFDIR else { return nil }
        return OwnedFD.Identity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
    }

    /// Whether a file, or a link, has this name.
    public func has(_ name: String) throws(PosixError) -> Bool { try identity(of: name) != nil }

    public func remove(_ name: String) throws(PosixError) {
        try syscall("unlink \(path)/\(name)") { files.unlink(name, in: fd.number) }
    }
}
