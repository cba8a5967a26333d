// SPDX-License-Identifier: Apache-2.0
/// A file below a held directory, read as the disk has it. Not mapped: somebody may cut it meanwhile.
import CLinux
import Glibc

public final class ReadFile: Sendable {
    private let fd: OwnedFD
    private let path: String
    public let byteCount: UInt64

    public init(_ name: String, in directory: Directory) throws(PosixError) {
        let path = "\(directory.path)/\(name)"
        self.path = path
        fd = OwnedFD(
            adopting: try syscall("open \(path)") {
                nw_open_beneath(
                    directory.fd.number, name, UInt64(O_RDONLY | O_NONBLOCK | O_NOCTTY | nw_o_cloexec), 0)
            })
        let status = try fd.status()
        guard status.isRegular else { throw PosixError(EINVAL, "read \(path), which is not a regular file") }
        byteCount = status.size
        // What is clean in the page cache goes, so that it is the disk that answers.
        posix_fadvise(fd.number, 0, 0, POSIX_FADV_DONTNEED)
    }

    /// An extended attribute (xattr(7)); nil if there is none, or it is not a short text.
    public func attribute(_ name: String) -> String? {
        var bytes = [UInt8](repeating: 0, count: 1024)
        let count = nw_get_attribute_of(fd.number, name, &bytes, bytes.count)
        return count < 0 ? nil : String(validating: bytes.prefix(count), as: UTF8.self)
    }

    public func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(PosixError) {
        var done = 0
        while done < buffer.count {
            let count = try syscall("read \(path)") {
                pread(fd.number, buffer.baseAddress! + done, buffer.count - done, off_t(offset) + off_t(done))
            }
            guard count > 0 else { throw PosixError(EIO, "read \(path)") }
            done += count
        }
    }
}
