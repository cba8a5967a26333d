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
        guard status.isRegular else { throw PosixError(EINVAL, "read \(path), which is no file") }
        byteCount = status.size
        // What is clean in the page cache goes, so that it is the disk that answers.
        posix_fadvise(fd.number, 0, 0, POSIX_FADV_DONTNEED)
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
