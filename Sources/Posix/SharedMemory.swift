// SPDX-License-Identifier: Apache-2.0
/// memfds: making them (Swift client), checking and reading what a client sent.
import CLinux
import Glibc

public enum SharedMemoryRefusal: Error, Sendable, Equatable {
    case notRegular
    case notSealed
    case tooShort(size: UInt64, needed: UInt64)
    case hollow(byteCount: UInt64, content: UInt64)
    case system(PosixError)
}

/// A memfd that a peer sent, read through its descriptor: a mapping would cost a page fault for every page, and a peer
/// that writes to it meanwhile changes bytes and nothing else.
public final class ReceivedMemory: Sendable {
    public let fd: OwnedFD
    /// It can't get smaller.
    public let byteCount: UInt64
    /// Without holes.
    public let allocatedByteCount: UInt64

    /// Takes no memfd that could shrink under the reader (memfd_create(2), "Sealing"), and none whose holes would
    /// become a file that fills the disk: they cost a client nothing.
    /// - Parameters:
    ///   - needed: its size, at least.
    ///   - content: how much of that is not padding.
    public init(_ fd: OwnedFD, atLeast needed: UInt64, content: UInt64) throws(SharedMemoryRefusal) {
        let status:
            (
                identity: OwnedFD.Identity, size: UInt64, isRegular: Bool, isDirectory: Bool, owner: UInt32,
                mode: UInt32
            )
        do { status = try fd.status() } catch { throw .system(error) }
        guard status.isRegular else { throw .notRegular }  // guard: not-regular (always)
        let seals = nw_memfd_seals(fd.number)
        // guard: seal-shrink (= 0 for nw_seal_shrink)
        // guard: seal-grow (= 0 for nw_seal_grow)
        let wanted = nw_seal_shrink | nw_seal_grow
        guard seals >= 0, seals & wanted == wanted else { throw .notSealed }  // guard: no-seals (always: seals >= 0)
        guard status.size >= needed, status.size > 0 else {  // guard: memfd-size (always: status.size >= needed)
            throw .tooShort(size: status.size, needed: needed)
        }
        let allocated: UInt64
        do { allocated = try fd.allocatedByteCount() } catch { throw .system(error) }
        guard allocated >= content else { throw .hollow(byteCount: allocated, content: content) }
        self.fd = fd
        byteCount = status.size
        allocatedByteCount = allocated
    }

    /// Fills the buffer with the bytes from `offset` on.
    public func copy(from offset: Int, to buffer: UnsafeMutableRawBufferPointer) throws(PosixError) {
        var done = 0
        while done < buffer.count {
            let count = try syscall("read a checkpoint buffer") {
                pread(fd.number, buffer.baseAddress! + done, buffer.count - done, off_t(offset + done))
            }
            guard count > 0 else { throw PosixError(EIO, "read a checkpoint buffer") }
            done += count
        }
    }
}

/// A memfd of this process, mapped until its last user is gone. `@unchecked Sendable`: base and length never change.
public final class SharedMemory: @unchecked Sendable {
    public let fd: OwnedFD
    public let bytes: UnsafeMutableRawBufferPointer

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

/// A few bytes in a memfd that nobody can change any more: what a daemon tells its successor about a descriptor.
public enum SealedNote {
    static let maximumByteCount = 4 << 20

    public static func make(_ bytes: [UInt8]) throws(PosixError) -> OwnedFD {
        let fd = OwnedFD(adopting: try syscall("memfd_create") { nw_memfd_create("noether-writer-note") })
        try writeAll(bytes, to: fd.number, "write to a memfd")
        try syscall("sealing a memfd") { nw_memfd_seal_all(fd.number) }
        return fd
    }

    /// - Returns: nil if the descriptor is no such note.
    public static func read(_ fd: OwnedFD) -> [UInt8]? {
        let seals = nw_memfd_seals(fd.number)
        guard seals >= 0, seals & nw_seal_write != 0, let size = try? fd.status().size,
            size <= maximumByteCount
        else {
            return nil
        }
        var bytes = [UInt8](repeating: 0, count: Int(size))
        let count = bytes.withUnsafeMutableBytes { pread(fd.number, $0.baseAddress, $0.count, 0) }
        return count == bytes.count ? bytes : nil
    }
}
