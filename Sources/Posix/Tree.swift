// SPDX-License-Identifier: Apache-2.0
/// Whole directories: removed, made durable, renamed. Names are bytes here, as the kernel has them: what is removed may
/// have any name. Nothing follows a symbolic link, and nothing crosses a mount.
import CLinux
import Glibc

extension Directory {
    /// Removes what has the name: a file, a link itself, or a directory.
    /// - Parameters:
    ///   - recursively: also a directory that is not empty.
    ///   - depth: of directories in directories, at most.
    ///   - removed: called for each thing that has gone.
    /// - Returns: false if nothing has the name.
    @discardableResult
    public func remove(
        _ name: String, recursively: Bool, depth: Int, removed: () -> Void = {}
    ) throws(PosixError) -> Bool {
        let bytes = Array(name.utf8CString)
        var status = stat()
        if fstatat(fd.number, name, &status, AT_SYMLINK_NOFOLLOW) != 0 {
            if errno == ENOENT { return false }
            throw PosixError(errno, "find \(path)/\(name)")
        }
        guard status.st_mode & S_IFMT == S_IFDIR else {
            try syscall("unlink \(path)/\(name)") { unlinkat(fd.number, name, 0) }
            removed()
            return true
        }
        guard recursively else {
            throw PosixError(EISDIR, "remove \(path)/\(name), without being asked to remove what is in it")
        }
        try Self.removeTree(
            bytes, in: fd.number, device: status.st_dev, path: "\(path)/\(name)", depth: depth, removed)
        return true
    }

    private static func removeTree(
        _ name: [CChar], in parent: Int32, device: dev_t, path: String, depth: Int, _ removed: () -> Void
    ) throws(PosixError) {
        guard depth > 0 else { throw PosixError(ELOOP, "remove \(path), which is too deep in its directory") }
        let number = try open(name, in: parent, path)
        defer { close(number) }
        var status = stat()
        guard fstat(number, &status) == 0, status.st_dev == device else {
            throw PosixError(EXDEV, "remove \(path), where another file system is mounted")
        }
        // What comes meanwhile is found by the next round; somebody who writes without end is told.
        for round in 1... {
            for (child, kind) in try entries(of: number, path) {
                let childPath = "\(path)/\(text(child))"
                if kind == .directory {
                    try removeTree(
                        child, in: number, device: device, path: childPath, depth: depth - 1, removed)
                } else {
                    if unlinkat(number, child, 0) != 0, errno != ENOENT {
                        throw PosixError(errno, "unlink \(childPath)")
                    }
                    removed()
                }
            }
            if unlinkat(parent, name, AT_REMOVEDIR) == 0 || errno == ENOENT { break }
            guard errno == ENOTEMPTY || errno == EEXIST, round < roundsAtOnce else {
                throw PosixError(errno, "remove the directory \(path)")
            }
        }
        removed()
    }

    private static let roundsAtOnce = 8

    /// How many files have the name or lie below it, and their bytes. Links and other file systems are not followed.
    public func usage(_ name: String, depth: Int) throws(PosixError) -> (files: Int, bytes: UInt64) {
        var usage = (files: 0, bytes: UInt64(0))
        try Self.add(to: &usage, Array(name.utf8CString), in: fd.number, path: "\(path)/\(name)", depth: depth)
        return usage
    }

    private static func add(
        to usage: inout (files: Int, bytes: UInt64), _ name: [CChar], in parent: Int32, path: String, depth: Int
    ) throws(PosixError) {
        var status = stat()
        guard fstatat(parent, name, &status, AT_SYMLINK_NOFOLLOW) == 0 else {
            if errno == ENOENT { return }
            throw PosixError(errno, "find \(path)")
        }
        guard status.st_mode & S_IFMT == S_IFDIR else {
            usage.files += 1
            usage.bytes += UInt64(max(0, status.st_size))
            return
        }
        guard depth > 0 else { throw PosixError(ELOOP, "read \(path), which is too deep in its directory") }
        let device = status.st_dev
        let number = try open(name, in: parent, path)
        defer { close(number) }
        guard fstat(number, &status) == 0, status.st_dev == device else { return }
        for (child, _) in try entries(of: number, path) {
            try add(to: &usage, child, in: number, path: "\(path)/\(text(child))", depth: depth - 1)
        }
    }

    /// Makes the entries of a directory durable, and those of all directories below it.
    public func syncTree(_ name: String, depth: Int, synced: () -> Void = {}) throws(PosixError) {
        try Self.syncTree(Array(name.utf8CString), in: fd.number, path: "\(path)/\(name)", depth: depth, synced)
    }

    private static func syncTree(
        _ name: [CChar], in parent: Int32, path: String, depth: Int, _ synced: () -> Void
    ) throws(PosixError) {
        guard depth > 0 else { throw PosixError(ELOOP, "make \(path) durable, which is too deep in its directory") }
        let number = try open(name, in: parent, path)
        defer { close(number) }
        for (child, kind) in try entries(of: number, path) where kind == .directory {
            try syncTree(child, in: number, path: "\(path)/\(text(child))", depth: depth - 1, synced)
        }
        try syscall("fsync \(path)") { fsync(number) }
        synced()
    }

    private enum Kind { case directory, other }

    /// For messages.
    private static func text(_ name: [CChar]) -> String {
        String(decoding: name.dropLast().map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    private static func open(_ name: [CChar], in parent: Int32, _ path: String) throws(PosixError) -> Int32 {
        try syscall("open \(path)") {
            nw_open_beneath(
                parent, name, UInt64(O_RDONLY | nw_o_directory | nw_o_cloexec | nw_o_nofollow), 0)
        }
    }

    private static func entries(of number: Int32, _ path: String) throws(PosixError) -> [(name: [CChar], kind: Kind)] {
        // A descriptor of its own: closedir closes it.
        let own = try syscall("open \(path)") {
            nw_open_beneath(number, ".", UInt64(O_RDONLY | nw_o_directory | nw_o_cloexec), 0)
        }
        guard let stream = fdopendir(own) else {
            let code = errno
            close(own)
            throw PosixError(code, "read \(path)")
        }
        defer { closedir(stream) }
        var found: [(name: [CChar], kind: Kind)] = []
        while let entry = readdir(stream) {
            let name = withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
                bytes.prefix { $0 != 0 }.map { CChar(bitPattern: $0) } + [0]
            }
            if name == [46, 0] || name == [46, 46, 0] { continue }
            var status = stat()
            guard fstatat(number, name, &status, AT_SYMLINK_NOFOLLOW) == 0 else { continue }
            found.append((name, status.st_mode & S_IFMT == S_IFDIR ? .directory : .other))
        }
        return found
    }

    /// Whether the name is a directory, and not a link to one.
    public func isDirectory(_ name: String) -> Bool {
        var status = stat()
        return fstatat(fd.number, name, &status, AT_SYMLINK_NOFOLLOW) == 0 && status.st_mode & S_IFMT == S_IFDIR
    }

    /// Whether there is a file below this directory, by a path without links.
    public func hasFile(_ path: String) -> Bool {
        let number = nw_open_beneath(fd.number, path, UInt64(nw_o_path | nw_o_nofollow | nw_o_cloexec), 0)
        guard number >= 0 else { return false }
        return (try? OwnedFD(adopting: number).status().isRegular) == true
    }

    /// Which directory this is, also if another one had its inode before (statx(2), stx_btime); nil where its file
    /// system does not know.
    public var birth: [Int64]? {
        var seconds: Int64 = 0
        var nanoseconds: UInt32 = 0
        guard nw_birth(fd.number, &seconds, &nanoseconds) == 0 else { return nil }
        return [Int64(bitPattern: identity.device), Int64(bitPattern: identity.inode), seconds, Int64(nanoseconds)]
    }

    /// Gives what has the name another name, perhaps in another directory of the file system.
    /// - Parameter exchanges: what has the other name gets this one; else the other name must be free.
    public func rename(
        _ name: String, to other: Directory, _ newName: String, exchanges: Bool = false
    ) throws(PosixError) {
        let operation = "rename \(path)/\(name) to \(other.path)/\(newName)"
        do {
            try syscall(operation) { nw_rename_to(fd.number, name, other.fd.number, newName, exchanges ? 1 : 0) }
        } catch {
            // A file system that cannot say that the name must be free.
            guard error.errno == EINVAL, !exchanges, try other.identity(below: newName) == nil else { throw error }
            try syscall(operation) { renameat(fd.number, name, other.fd.number, newName) }
        }
    }

    /// - Returns: false if the file system keeps none.
    public func setAttribute(_ attribute: String, of name: String, to value: String) throws(PosixError) -> Bool {
        let child = try child(name, create: false)
        guard nw_set_attribute(child.fd.number, attribute, value, value.utf8.count) == 0 else { return false }
        try child.sync()
        return true
    }

    /// The way from here up to the root of its file system is made durable: somebody may have made these directories a
    /// moment ago, and a file in a directory that is lost is lost too.
    public func syncWay() throws(PosixError) {
        var number = fd.number
        var opened: OwnedFD?
        while true {
            let next = openat(number, "..", O_RDONLY | nw_o_directory | nw_o_cloexec)
            // What may not be read cannot be synced; who made directories there may read it.
            guard next >= 0 else { return }
            let parent = OwnedFD(adopting: next)
            let (here, above) = (try opened?.status().identity ?? identity, try parent.status().identity)
            guard above.device == here.device, above != here else { return }
            try syscall("fsync a directory above \(path)") { fsync(next) }
            number = next
            opened = parent
        }
    }
}
