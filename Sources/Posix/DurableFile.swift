/// The one place that fsyncs and renames: a file appears under its name whole, or not at all.
///
/// temp file (O_EXCL, same directory) -> fallocate -> one sequential pass of writes, O_DIRECT where the file system takes
/// it -> ftruncate -> fdatasync -> rename over the name -> fsync of the directory.
///
/// A failed fsync is never asked again: the kernel may have dropped the dirty pages and forgotten the error
/// (PostgreSQL's fsync findings of 2018). The temp file is removed and the caller writes a new one from memory.
import CLinux
import Dispatch
import Glibc
import Synchronization

public enum DurableFile {
    /// Bytes handed to one write call. Large enough that O_DIRECT reaches the disk's speed, small enough to stay in
    /// the last-level cache together with its twin.
    public static let chunkByteCount = 4 << 20
    /// What O_DIRECT asks of addresses, lengths and offsets; 4096 satisfies every block size in use.
    static let alignment = 4096

    /// - Parameters:
    ///   - length: of the file in bytes.
    ///   - produce: fills the buffer with the next bytes; returns how many, fewer than asked only at the end.
    ///   - written: called once all bytes are with the file system, before they are durable.
    ///   - faults: the first part of the names of its fault points (`Faults`).
    /// - Returns: the file, for who goes on with it.
    @discardableResult
    public static func write(
        _ name: String, in directory: Directory, length: UInt64,
        produce: (UnsafeMutableRawBufferPointer) throws(PosixError) -> Int, written: () -> Void = {},
        faults: String = "file"
    ) throws(PosixError) -> OwnedFD {
        let temporary = prefix + String(UInt64.random(in: .min ... .max), radix: 36) + suffix
        let path = "\(directory.path)/\(name)"
        let flags = UInt64(O_RDWR | O_CREAT | O_EXCL | nw_o_cloexec)
        let number = try syscall("create a file in \(directory.path)") {
            nw_open_beneath(directory.fd.number, temporary, flags, 0o666)
        }
        let file = OwnedFD(adopting: number)
        var replaced: OwnedFD?
        // Says to `removeLeftovers` that its writer lives.
        _ = nw_lock_exclusive(file.number)
        do {
            try Faults.reach("\(faults).created")
            try writeAll(to: file, path: path, length: length, produce: produce)
            written()
            try Faults.reach("\(faults).written")
            try syscall("fdatasync \(path)") { fdatasync(file.number) }
            try Faults.reach("\(faults).synced")
            replaced = try? OwnedFD(
                adopting: syscall("open \(path)") {
                    nw_open_beneath(
                        directory.fd.number, name, UInt64(nw_o_path | nw_o_nofollow | nw_o_cloexec), 0)
                })
            try syscall("rename over \(path)") {
                renameat(directory.fd.number, temporary, directory.fd.number, name)
            }
        } catch {
            unlinkat(directory.fd.number, temporary, 0)
            throw error
        }
        try Faults.reach("\(faults).renamed")
        try directory.sync()
        Faults.pass("\(faults).durable")
        // Giving back the blocks of a large old file takes a third of the time that writing them took (ext4): held open over the
        // rename, it goes later, elsewhere.
        if let replaced { releases.async { withExtendedLifetime(replaced) {} } }
        return file
    }

    private static let releases = DispatchQueue(label: "noether-writer.releases")

    private static let prefix = ".noether-writer-"
    private static let suffix = ".tmp"

    /// Removes the temporary files of writers that are dead: nobody holds their lock.
    public static func removeLeftovers(in directory: Directory) throws(PosixError) {
        for name in try directory.names() where name.hasPrefix(prefix) && name.hasSuffix(suffix) {
            if case .file = try AppendFile.open(name, in: directory, create: false) {
                try directory.remove(name)
            }
        }
    }

    private static func writeAll(
        to file: OwnedFD, path: String, length: UInt64,
        produce: (UnsafeMutableRawBufferPointer) throws(PosixError) -> Int
    ) throws(PosixError) {
        // Room first: a full disk is known before gigabytes were written. Not every file system can.
        if length > 0, nw_allocate(file.number, off_t(length)) != 0,
            errno == ENOSPC || errno == EDQUOT || errno == EFBIG
        {
            throw PosixError(errno, "reserve \(length) bytes for \(path)")
        }
        let writer = ChunkWriter(file, path: path, wantsDirect: length >= UInt64(chunkByteCount))
        var offset: UInt64 = 0
        while offset < length {
            guard let chunk = writer.nextChunk() else { break }
            let count = try produce(chunk)
            precondition(count > 0, "the producer ended \(length - offset) bytes early")
            writer.write(count, at: offset)
            offset += UInt64(count)
        }
        try writer.finish()
        precondition(offset == length, "the producer gave \(offset) bytes of \(length)")
        try syscall("ftruncate \(path)") { ftruncate(file.number, off_t(length)) }
    }
}

/// Two chunks in turn: while one is on its way to the disk, the next one is filled. So copying and summing cost no time of their
/// own where the disk is slower than memory.
///
/// Unchecked: `direct` and `isFirst` are touched on one side each (`queue` and the caller), a chunk belongs to the caller from
/// `nextChunk` to `write`, and to the queue from there until it signals `free`.
private final class ChunkWriter: @unchecked Sendable {
    private let file: OwnedFD
    private let path: String
    private let chunks: [UnsafeMutableRawBufferPointer]
    private var current = 0
    private let queue = DispatchQueue(label: "noether-writer.chunks")
    // From 0: Dispatch traps where a semaphore goes with less than it was made with, as after a failed write.
    private let free = DispatchSemaphore(value: 0)
    private let failure = Mutex<PosixError?>(nil)
    private var direct: Bool

    init(_ file: OwnedFD, path: String, wantsDirect: Bool) {
        self.file = file
        self.path = path
        direct = wantsDirect && Self.setDirect(file, true)
        chunks = (0..<2).map { _ in
            UnsafeMutableRawBufferPointer.allocate(
                byteCount: DurableFile.chunkByteCount, alignment: DurableFile.alignment)
        }
        for _ in chunks { free.signal() }
    }

    deinit { for chunk in chunks { chunk.deallocate() } }

    /// Waits for a free chunk; nil where a write has failed.
    func nextChunk() -> UnsafeMutableRawBufferPointer? {
        free.wait()
        return failure.withLock { $0 == nil } ? chunks[current] : nil
    }

    func write(_ count: Int, at offset: UInt64) {
        let index = current
        current = 1 - current
        queue.async { [self] in
            do throws(PosixError) { try put(chunks[index], count, at: offset) } catch {
                failure.withLock { $0 = $0 ?? error }
            }
            free.signal()
        }
    }

    /// Returns when all of it is written.
    func finish() throws(PosixError) {
        // Who goes on with the file may write what is not aligned.
        queue.sync { if direct { direct = !Self.setDirect(file, false) } }
        if let error = failure.withLock({ $0 }) { throw error }
    }

    private func put(_ chunk: UnsafeMutableRawBufferPointer, _ count: Int, at offset: UInt64)
        throws(PosixError)
    {
        if direct, count % DurableFile.alignment != 0 {
            // The unaligned tail goes through the page cache.
            direct = !Self.setDirect(file, false)
        }
        var done = 0
        while done < count {
            let rest = UnsafeRawBufferPointer(rebasing: chunk[done..<count])
            let result = pwrite(file.number, rest.baseAddress, rest.count, off_t(offset) + off_t(done))
            if result > 0 {
                done += result
                // A short write may leave an unaligned rest.
                if direct, done < count, done % DurableFile.alignment != 0 {
                    direct = !Self.setDirect(file, false)
                }
            } else if result < 0, errno == EINVAL, direct {
                direct = !Self.setDirect(file, false)
            } else if result == 0 {
                throw PosixError(EIO, "write \(path)")
            } else if errno != EINTR {
                throw PosixError(errno, "write \(path)")
            }
        }
    }

    private static func setDirect(_ file: OwnedFD, _ on: Bool) -> Bool {
        let flags = fcntl(file.number, F_GETFL)
        return fcntl(file.number, F_SETFL, on ? flags | nw_o_direct : flags & ~nw_o_direct) == 0
    }
}

extension DurableFile {
    /// A small file from memory.
    @discardableResult
    public static func write(
        _ name: String, bytes: [UInt8], in directory: Directory, faults: String = "file"
    ) throws(PosixError) -> OwnedFD {
        var rest = bytes[...]
        return try write(
            name, in: directory, length: UInt64(rest.count),
            produce: { buffer in
                let piece = rest.prefix(buffer.count)
                buffer.copyBytes(from: piece)
                rest.removeFirst(piece.count)
                return piece.count
            }, faults: faults)
    }
}
