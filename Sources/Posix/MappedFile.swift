// SPDX-License-Identifier: Apache-2.0
/// A file mapped for reading.
import CLinux
import Glibc

public final class MappedFile {
    public let bytes: UnsafeRawBufferPointer

    public init(_ path: String) throws(PosixError) {
        // In C it would end there, and name another file.
        guard !path.utf8.contains(0) else { throw PosixError(EINVAL, "open \(path.debugDescription)") }
        // Without O_NONBLOCK, a FIFO would wait for a writer, for ever.
        let flags = O_RDONLY | O_NONBLOCK | O_NOCTTY | nw_o_cloexec
        let fd = OwnedFD(adopting: try syscall("open \(path)") { nw_open(path, flags, 0) })
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
