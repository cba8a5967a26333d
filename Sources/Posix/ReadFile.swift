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
                files.openBeneath(
                    directory.fd.number, name, UInt64(O_RDONLY | O_NONBLOCK | O_NOCTTY | nw_o_cloexec), 0)
            })
        let status = try fd.status()
        guard status.isRegular else { throw PosixError(EINVAL, "read \(path), which is not a regular file") }
        byteCount = status.size
        // What is clean in the page cache goes, so that it is the disk that answers.
        files.dropCache(fd.number)
    }

    /// An extended attribute (xattr(7)); nil if there is none, or it is not a short text.
    public func attribute(_ name: String) -> String? {
        var bytes = [UInt8](repeating: 0, count: 1024)
        let count = bytes.withUnsafeMutableBytes { files.attribute(name, of: fd.number, into: $0) }
        return count < 0 ? nil : String(validating: bytes.prefix(count), as: UTF8.self)
    }

    public func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(PosixError) {
        var done = 0
        while done < buffer.count {
            let count = try syscall("read \(path)") {
                files.read(
                    fd.number, into: UnsafeMutableRawBufferPointer(rebasing: buffer[done...]),
                    at: Int(offset) + Int(done))
            }
            guard count > 0 else { throw PosixError(EIO, "read \(path)") }
            done += count
        }
    }
}
