/// The one place that fsyncs and renames: a file appears under its name whole, or not at all.
///
/// temp file (O_EXCL, same directory) -> fallocate -> one sequential pass of writes, O_DIRECT where the file system takes
/// it -> ftruncate -> fdatasync -> rename over the name -> fsync of the directory.
///
/// A failed fsync is never asked again: the kernel may have dropped the dirty pages and forgotten the error
/// (PostgreSQL's fsync findings of 2018). The temp file is removed and the caller writes a new one from memory.
import CLinux
import Glibc

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
    public static func write(
        _ name: String, in directory: Directory, length: UInt64,
        produce: (UnsafeMutableRawBufferPointer) -> Int, written: () -> Void = {}, faults: String = "file"
    ) throws(PosixError) {
        let temporary = temporaryName()
        let path = "\(directory.path)/\(name)"
        let flags = UInt64(O_WRONLY | O_CREAT | O_EXCL | nw_o_cloexec)
        let number = try syscall("create a file in \(directory.path)") {
            nw_open_beneath(directory.fd.number, temporary, flags, 0o666)
        }
        let file = OwnedFD(adopting: number)
        // Says to `removeLeftovers` that its writer lives.
        _ = nw_lock_exclusive(file.number)
        do {
            try Faults.reach("\(faults).created")
            try writeAll(to: file, path: path, length: length, produce: produce)
            written()
            try Faults.reach("\(faults).written")
            try syscall("fdatasync \(path)") { fdatasync(file.number) }
            try Faults.reach("\(faults).synced")
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
    }

    private static let prefix = ".noether-writer-"
    private static let suffix = ".tmp"

    static func temporaryName() -> String {
        prefix + String(UInt64.random(in: .min ... .max), radix: 36) + suffix
    }

    /// Removes the temporary files of writers that are dead: nobody holds their lock.
    public static func removeLeftovers(in directory: Directory) throws(PosixError) {
        for name in try directory.names() where name.hasPrefix(prefix) && name.hasSuffix(suffix) {
            if case .file = try AppendFile.open(name, in: directory, create: false) {
                try directory.remove(name)
            }
        }
    }

    private static func writeAll(
        to file: OwnedFD, path: String, length: UInt64, produce: (UnsafeMutableRawBufferPointer) -> Int
    ) throws(PosixError) {
        // Room first: a full disk is known before gigabytes were written. Not every file system can.
        if length > 0, nw_allocate(file.number, off_t(length)) != 0,
            errno == ENOSPC || errno == EDQUOT || errno == EFBIG
        {
            throw PosixError(errno, "reserve \(length) bytes for \(path)")
        }
        var direct = length >= UInt64(chunkByteCount) && setDirect(file, true)
        let chunk = UnsafeMutableRawBufferPointer.allocate(byteCount: chunkByteCount, alignment: alignment)
        defer { chunk.deallocate() }
        var offset: UInt64 = 0
        while offset < length {
            let count = produce(chunk)
            precondition(count > 0, "the producer ended \(length - offset) bytes early")
            if direct, count % alignment != 0 {
                // The unaligned tail goes through the page cache.
                direct = !setDirect(file, false)
            }
            var done = 0
            while done < count {
                let rest = UnsafeRawBufferPointer(rebasing: chunk[done..<count])
                let result = pwrite(file.number, rest.baseAddress, rest.count, off_t(offset) + off_t(done))
                if result > 0 {
                    done += result
                    // A short write may leave an unaligned rest.
                    if direct, done < count, done % alignment != 0 { direct = !setDirect(file, false) }
                } else if result < 0, errno == EINVAL, direct {
                    direct = !setDirect(file, false)
                } else if result == 0 {
                    throw PosixError(EIO, "write \(path)")
                } else if errno != EINTR {
                    throw PosixError(errno, "write \(path)")
                }
            }
            offset += UInt64(count)
        }
        precondition(offset == length, "the producer gave \(offset) bytes of \(length)")
        try syscall("ftruncate \(path)") { ftruncate(file.number, off_t(length)) }
    }

    private static func setDirect(_ file: OwnedFD, _ on: Bool) -> Bool {
        let flags = fcntl(file.number, F_GETFL)
        return fcntl(file.number, F_SETFL, on ? flags | nw_o_direct : flags & ~nw_o_direct) == 0
    }
}

extension DurableFile {
    /// A small file from memory.
    public static func write(_ name: String, text: String, in directory: Directory) throws(PosixError) {
        var rest = Array(text.utf8)[...]
        try write(name, in: directory, length: UInt64(rest.count)) { buffer in
            let piece = rest.prefix(buffer.count)
            buffer.copyBytes(from: piece)
            rest.removeFirst(piece.count)
            return piece.count
        }
    }
}
