// SPDX-License-Identifier: Apache-2.0
/// What is known of a file without opening it, and of the file system it lies on.
import CLinux
import Glibc

public struct FileFacts: Sendable, Equatable {
    public var byteCount: UInt64
    /// Seconds since 1970.
    public var modifiedAt: Double
    public var isRegular: Bool
    public var isDirectory: Bool
    public var isSocket: Bool

    /// nil if there is no such file, or it can't be seen.
    public init?(_ path: String) {
        var status = stat()
        guard stat(path, &status) == 0 else { return nil }
        let kind = status.st_mode & S_IFMT
        byteCount = UInt64(max(0, status.st_size))
        modifiedAt = Double(status.st_mtim.tv_sec) + Double(status.st_mtim.tv_nsec) / 1e9
        isRegular = kind == S_IFREG
        isDirectory = kind == S_IFDIR
        isSocket = kind == S_IFSOCK
    }
}

public enum FileSystem {
    /// An extended attribute (xattr(7)); nil if there is none, or it is not a short text.
    public static func attribute(_ name: String, of path: String) -> String? {
        var bytes = [UInt8](repeating: 0, count: 256)
        let count = nw_get_attribute(path, name, &bytes, bytes.count)
        return count < 0 ? nil : String(validating: bytes.prefix(count), as: UTF8.self)
    }

    /// Bytes that this user may still write at `path`, those of the whole, and what tells it from other file systems;
    /// nil if it can't be told.
    public static func space(_ path: String) -> (free: UInt64, total: UInt64, id: UInt64)? {
        var status = statvfs()
        return space(statvfs(path, &status), status)
    }

    /// The same of an open file or directory. Blocks for as long as its file system hangs.
    public static func space(_ descriptor: OwnedFD) -> (free: UInt64, total: UInt64, id: UInt64)? {
        var status = statvfs()
        return space(fstatvfs(descriptor.number, &status), status)
    }

    private static func space(_ result: Int32, _ status: statvfs) -> (free: UInt64, total: UInt64, id: UInt64)? {
        guard result == 0 else { return nil }
        let size = UInt64(status.f_frsize)
        return (UInt64(status.f_bavail) * size, UInt64(status.f_blocks) * size, UInt64(status.f_fsid))
    }

    /// Its components, as the kernel sees them: between slashes that are bytes, whatever Unicode makes of what follows.
    public static func parts(of path: String) -> [String] {
        path.utf8.split(separator: UInt8(ascii: "/")).map { String(decoding: $0, as: UTF8.self) }
    }

    /// Absolute, without `.`, `..` and doubled slashes; symbolic links stay.
    public static func absolute(_ path: String) -> String {
        var parts: [String] = []
        var whole = path
        if path.utf8.first != UInt8(ascii: "/"), let here = getcwd(nil, 0) {
            whole = String(cString: here) + "/" + path
            free(here)
        }
        for part in Self.parts(of: whole) where part != "." {
            if part == ".." { _ = parts.popLast() } else { parts.append(part) }
        }
        return "/" + parts.joined(separator: "/")
    }

    /// Paths that match a pattern, as a shell's (glob(7)), sorted. What cannot be read matches nothing.
    public static func paths(matching pattern: String) -> [String] {
        var found = glob_t()
        defer { globfree(&found) }
        guard glob(pattern, 0, nil, &found) == 0, let paths = found.gl_pathv else { return [] }
        return (0..<Int(found.gl_pathc)).compactMap { paths[$0].map { String(cString: $0) } }
    }

    /// Whether a name matches a pattern, as a shell's.
    public static func matches(_ name: String, pattern: String) -> Bool { fnmatch(pattern, name, 0) == 0 }

    /// A descriptor of a directory that another process is to work in, made if it is missing, as mkdir -p does. nil if
    /// there is none: whoever gets the path says what is wrong with it.
    public static func openRoot(_ path: String) -> OwnedFD? {
        var prefix = ""
        for part in parts(of: path) {
            prefix += "/\(part)"
            _ = mkdir(prefix, 0o777)
        }
        let number = nw_open(path, nw_o_path | nw_o_directory | nw_o_cloexec, 0)
        return number < 0 ? nil : OwnedFD(adopting: number)
    }
}
