/// memfds: making them (Swift client), checking what a client sent, mapping them.
import CLinux
import Glibc

public enum SharedMemoryRefusal: Error, Sendable, Equatable {
    case notRegular
    case notSealed
    case tooShort(size: UInt64, needed: UInt64)
    case system(PosixError)
}

/// A mapping, unmapped when its last user is gone. The memory is shared with another process that may write to it
/// at any time: whoever reads takes each byte once. `@unchecked Sendable`: base and length never change.
public final class SharedMemory: @unchecked Sendable {
    public let fd: OwnedFD
    public let bytes: UnsafeMutableRawBufferPointer

    /// Maps a descriptor that a peer sent, read-only, after checking that it can't shrink under the mapping: a
    /// shrunk one would be a SIGBUS (memfd_create(2), "Sealing").
    public init(received fd: OwnedFD, atLeast needed: UInt64) throws(SharedMemoryRefusal) {
        let status:
            (
                identity: OwnedFD.Identity, size: UInt64, isRegular: Bool, isDirectory: Bool, owner: UInt32,
                mode: UInt32
            )
        do { status = try fd.status() } catch { throw .system(error) }
        guard status.isRegular else { throw .notRegular }
        let seals = nw_memfd_seals(fd.number)
        let wanted = nw_seal_shrink | nw_seal_grow
        guard seals >= 0, seals & wanted == wanted else { throw .notSealed }
        guard status.size >= needed, status.size > 0 else {
            throw .tooShort(size: status.size, needed: needed)
        }
        guard let base = mmap(nil, Int(status.size), PROT_READ, MAP_SHARED, fd.number, 0), base != MAP_FAILED
        else {
            throw .system(PosixError(errno, "mmap of a checkpoint buffer"))
        }
        self.fd = fd
        bytes = UnsafeMutableRawBufferPointer(start: base, count: Int(status.size))
    }

    /// A new sealed memfd, mapped for writing.
    public init(capacity: Int) throws(PosixError) {
        fd = OwnedFD(adopting: try syscall("memfd_create") { nw_memfd_create("noether-writer") })
        let number = fd.number
        try syscall("ftruncate of a memfd") { ftruncate(number, off_t(capacity)) }
        try syscall("sealing a memfd") { nw_memfd_seal(number) }
        guard let base = mmap(nil, capacity, PROT_READ | PROT_WRITE, MAP_SHARED, number, 0),
            base != MAP_FAILED
        else {
            throw PosixError(errno, "mmap of a memfd")
        }
        bytes = UnsafeMutableRawBufferPointer(start: base, count: capacity)
    }

    deinit { munmap(bytes.baseAddress!, bytes.count) }
}
