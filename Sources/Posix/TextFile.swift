// SPDX-License-Identifier: Apache-2.0
/// Small text files, whole.
import CLinux
import Glibc

public enum TextFile {
    public static let maximumByteCount = 1 << 20

    public static func read(
        _ path: String, atMost maximumByteCount: Int = maximumByteCount
    ) throws(PosixError) -> String {
        let fd = OwnedFD(adopting: try syscall("open \(path)") { files.open(path, O_RDONLY | nw_o_cloexec, 0) })
        var bytes = [UInt8](repeating: 0, count: maximumByteCount)
        var length = 0
        while length < bytes.count {
            let count = try syscall("read \(path)") {
                bytes.withUnsafeMutableBytes {
                    files.read(fd.number, into: UnsafeMutableRawBufferPointer(rebasing: $0[length...]))
                }
            }
            if count == 0 { break }
            length += count
        }
        return String(decoding: bytes.prefix(length), as: UTF8.self)
    }

    /// Whole or not at all for whoever reads it, but not durable: `DurableFile` is for what must stay.
    /// - Parameter mode: of the file, whatever the mask says.
    public static func replace(_ path: String, with text: String, mode: UInt32) throws(PosixError) {
        let temporary = path + ".tmp"
        unlink(temporary)
        let flags = O_WRONLY | O_CREAT | O_EXCL | nw_o_cloexec
        let fd = OwnedFD(adopting: try syscall("create \(temporary)") { nw_open(temporary, flags, mode) })
        do {
            try syscall("fchmod \(temporary)") { fchmod(fd.number, mode) }
            try writeAll(Array(text.utf8), to: fd.number, "write \(temporary)")
            try syscall("rename \(temporary) over \(path)") { rename(temporary, path) }
        } catch {
            unlink(temporary)
            throw error
        }
    }

    public static func remove(_ path: String) throws(PosixError) {
        try syscall("unlink \(path)") { unlink(path) }
    }
}
