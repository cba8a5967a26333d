// SPDX-License-Identifier: Apache-2.0
/// A file mapped for reading.
import CLinux
import Glibc

public final class MappedFile {
    public let bytes: UnsafeRawBufferPointer

    public init(_ path: String) throws(PosixError) {
        let fd = OwnedFD(adopting: try syscall("open \(path)") { nw_open(path, O_RDONLY | nw_o_cloexec, 0) })
        let status = try fd.status()
        guard status.isRegular else { throw PosixError(status.isDirectory ? EISDIR : EINVAL, "open \(path)") }
        guard status.size > 0 else {
            bytes = UnsafeRawBufferPointer(start: nil, count: 0)
            return
        }
        guard let base = mmap(nil, Int(status.size), PROT_READ, MAP_PRIVATE, fd.number, 0), base != MAP_FAILED
        else {
            throw PosixError(errno, "map \(path)")
        }
        bytes = UnsafeRawBufferPointer(start: base, count: Int(status.size))
    }

    deinit {
        if let base = bytes.baseAddress { munmap(UnsafeMutableRawPointer(mutating: base), bytes.count) }
    }
}
