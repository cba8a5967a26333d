// SPDX-License-Identifier: Apache-2.0
/// Where a path leads, and what this process may do there: asked of the kernel, and of no `FileStore`.
import CLinux
import Glibc

public struct PathFacts: Sendable {
    public var isDirectory: Bool
    public var isRegular: Bool
    public var isLink: Bool
    public var device: UInt64

    /// - Parameter follows: whether of what a link leads to, or of the link itself.
    public init(_ path: String, follows: Bool) throws(PosixError) {
        var status = stat()
        _ = try syscall(path) { fstatat(AT_FDCWD, path, &status, follows ? 0 : AT_SYMLINK_NOFOLLOW) }
        let kind = status.st_mode & S_IFMT
        isDirectory = kind == S_IFDIR
        isRegular = kind == S_IFREG
        isLink = kind == S_IFLNK
        device = UInt64(status.st_dev)
    }

    /// The absolute path without links, of something that is there.
    public static func real(_ path: String) throws(PosixError) -> String {
        guard let found = realpath(path, nil) else { throw PosixError(Glibc.errno, path) }
        defer { free(found) }
        return String(cString: found)
    }

    /// What a link says; nil if it is none.
    public static func link(_ path: String) -> String? {
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = Glibc.readlink(path, &bytes, bytes.count)
        return count < 0 ? nil : String(decoding: bytes.prefix(count), as: UTF8.self)
    }

    /// - Throws: why this process may not write a file, or into a directory.
    public static func checkWritable(_ path: String, isDirectory: Bool) throws(PosixError) {
        guard access(path, isDirectory ? W_OK | X_OK : W_OK) != 0 else { return }
        throw PosixError(errno == EROFS ? EROFS : EACCES, path)
    }
}

extension PosixError {
    public static func isDirectory(_ path: String) -> PosixError { PosixError(EISDIR, path) }
    public static func isNoDirectory(_ path: String) -> PosixError { PosixError(ENOTDIR, path) }
    public static func nameTooLong(_ path: String) -> PosixError { PosixError(ENAMETOOLONG, path) }
}
