// SPDX-License-Identifier: Apache-2.0
/// The one place that fsyncs and renames: a file appears under its name whole, or not at all.
///
/// temp file (O_EXCL, same directory) -> fallocate -> one sequential pass of writes, O_DIRECT where the file system
/// takes it -> ftruncate -> fdatasync -> rename over the name -> fsync of the directory.
///
/// A failed fsync is never asked again: the kernel may have dropped the dirty pages and forgotten the error
/// (PostgreSQL's fsync findings of 2018). The temp file is removed and the caller writes a new one from memory.
import CLinux
import Dispatch
import Glibc
import Synchronization

public enum DurableFile {
    /// Bytes handed to one write call. Large enough that O_DIRECT reaches the disk's speed, small enough that all
    /// chunks stay in the last-level cache.
    public static let chunkByteCount = 4 << 20
    /// Of a large file: one is being filled while the others are on their way.
    static let chunkCount = 4
    /// If `manyChunks` are in use, other files keep the disk busy, and a file continues with fewer: all of them
    /// together should stay in the last-level cache.
    static let leastChunkCount = 2
    static let manyChunks = 8
    /// What O_DIRECT asks of addresses, lengths and offsets; 4096 satisfies every block size in use.
    static let alignment = 4096

    /// - Parameters:
    ///   - length: of the file in bytes.
    ///   - attributes: extended attributes (xattr(7)) of the file, if its file system keeps any.
    ///   - shared: what is taken from another file of the same file system. If that can't share blocks, an error.
    ///   - produce: fills the buffer with the next bytes; returns how many, fewer than asked only at the end.
    ///   - skip: so many of the next bytes are shared, and not asked for.
    ///   - written: called once all bytes are with the file system, before they are durable.
    ///   - replacing: called when the file is durable, and about to take its name.
    ///   - keepsMode: a file that is replaced gives its mode to the new one.
    ///   - image: gets what is written, as it is written; not what is shared.
    ///   - faults: the first part of the names of its fault points (`Faults`).
    /// - Returns: the file, for whoever continues with it.
    @discardableResult
    public static func write(
        _ name: String, in directory: Directory, length: UInt64, attributes: [String: String] = [:],
        shared: SharedBlocks? = nil,
        produce: (UnsafeMutableRawBufferPointer) throws(PosixError) -> Int, skip: (Int) -> Void = { _ in },
        written: () -> Void = {}, replacing: () throws(PosixError) -> Void = {}, keepsMode: Bool = false,
        image: MemoryImage? = nil, faults: String = "file"
    ) throws(PosixError) -> OwnedFD {
        let path = "\(directory.path)/\(name)"
        let (file, temporary) = try makeTemporary(in: directory)
        let device = directory.device
        let isLarge = length >= UInt64(chunkByteCount)
        if isLarge { ReplacedFiles.enter(device) }
        defer { if isLarge { ReplacedFiles.leave(device) } }
        var replaced: OwnedFD?
        do {
            try Faults.reach("\(faults).created")
            if let shared { try share(shared, with: file, path: path, length: length) }
            try writeAll(
                to: file, path: path, length: length, shared?.ranges ?? [], image, produce: produce, skip: skip)
            for (attribute, value) in attributes {
                // A file is worth as much without them.
                _ = files.setAttribute(attribute, of: file.number, to: value)
            }
            written()
            try Faults.reach("\(faults).written")
            // guard: file-synced (= 0 for files.fdatasync(file.number))
            try syscall("fdatasync \(path)") { files.fdatasync(file.number) }
            try Faults.reach("\(faults).synced")
            // Giving back the blocks of a large old file takes a third of the time that writing them took (ext4): held
            // open over the rename, it goes later, elsewhere (`ReplacedFiles`).
            let old = files.openBeneath(
                directory.fd.number, name, UInt64(nw_o_path | nw_o_nofollow | nw_o_cloexec), 0)
            if old >= 0 {
                replaced = OwnedFD(adopting: old, on: device)
                try checkReplaceable(old, by: file, path: path)
                if keepsMode { copyMode(of: old, for: file) }  // guard: files-mode-is-kept (never)
            }
            try replacing()
            if image != nil { FileStamp.settle(file) }
            try syscall("rename over \(path)") {
                files.rename(temporary, to: name, in: directory.fd.number)
            }
        } catch {
            // Once more: what stays is taken away only when the run is opened again.
            // guard: failed-write-leaves-nothing (= 0 for files.unlink(temporary, in: directory.fd.number))
            if files.unlink(temporary, in: directory.fd.number) != 0 {
                _ = files.unlink(temporary, in: directory.fd.number)
            }
            ReplacedFiles.release(on: device)
            throw error
        }
        try Faults.reach("\(faults).renamed")
        try directory.sync()  // guard: directory-synced (skip)
        Faults.interrupt(at: "\(faults).durable")
        if let replaced, isLarge { ReplacedFiles.add(replaced, on: device) }
        return file
    }

    /// Locked, which says to `removeLeftovers` that its writer lives.
    private static func makeTemporary(in directory: Directory) throws(PosixError) -> (OwnedFD, name: String) {
        while true {
            let name = prefix + String(files.anyNumber(), radix: 36) + suffix
            let flags = UInt64(O_RDWR | O_CREAT | O_EXCL | nw_o_cloexec)
            let number = try syscall("create a file in \(directory.path)") {
                files.openBeneath(directory.fd.number, name, flags, UInt64(directory.mode(0o666)))
            }
            let file = OwnedFD(adopting: number, on: directory.device)
            // Between its making and its lock somebody may have taken it for a leftover: holds the lock, or has removed
            // it.
            // guard: writers-file-is-locked (= true for files.flock(number) == 0)
            let isLocked = files.flock(number) == 0 || errno != EWOULDBLOCK
            var status = stat()
            let isKnown = files.fstat(number, &status) == 0
            let error = PosixError(errno, "fstat a new file in \(directory.path)")
            if isLocked, isKnown, status.st_nlink > 0 { return (file, name) }
            _ = files.unlink(name, in: directory.fd.number)
            if !isKnown { throw error }
        }
    }

    /// Only what is ours makes room: a file, or a link that somebody set in its place, of the owner that the file
    /// system gives to our files (on NFS with root_squash that is not this process's). A directory refuses by itself.
    private static func checkReplaceable(_ old: Int32, by file: OwnedFD, path: String) throws(PosixError) {
        var status = stat()
        try syscall("fstat \(path)") { files.fstat(old, &status) }
        let kind = status.st_mode & S_IFMT
        guard kind == S_IFREG || kind == S_IFLNK || kind == S_IFDIR else {  // guard: replaces-files-only (always)
            throw PosixError(EEXIST, "replace \(path), which is not a regular file")
        }
        let owner = try file.status().owner
        guard status.st_uid == owner else {  // guard: replaces-own-files-only (always)
            throw PosixError(EEXIST, "replace \(path), which belongs to uid \(status.st_uid)")
        }
    }

    /// Before the new file takes the name: nobody may read it who could not read the old one.
    private static func copyMode(of old: Int32, for file: OwnedFD) {
        var status = stat()
        guard files.fstat(old, &status) == 0, status.st_mode & S_IFMT == S_IFREG else { return }
        _ = files.chmod(file.number, status.st_mode & 0o777)
    }

    private static let prefix = ".noether-writer-"
    private static let suffix = ".tmp"

    /// Removes the temporary files of writers that are dead: nobody holds their lock.
    public static func removeLeftovers(in directory: Directory) throws(PosixError) {
        // guard: leftovers-go (never)
        for name in try directory.names() where name.hasPrefix(prefix) && name.hasSuffix(suffix) {
            // What is no file of ours is not removed, and stops nothing.
            guard let opened = try? AppendFile.open(name, in: directory, create: false),
                case .file(let file) = opened
            else {
                continue
            }
            // With its lock held: its writer may be just about to take it.
            do throws(PosixError) { try directory.remove(name) } catch { if !error.isMissing { throw error } }
            withExtendedLifetime(file) {}
        }
    }

    /// Blocks of another file that this one has too, in order; offsets and counts in whole blocks.
    public struct SharedBlocks {
        public let file: OwnedFD
        public let ranges: [(here: UInt64, there: UInt64, byteCount: UInt64)]

        public init(of file: OwnedFD, _ ranges: [(here: UInt64, there: UInt64, byteCount: UInt64)]) {
            self.file = file
            self.ranges = ranges
        }
    }

    private static func share(_ shared: SharedBlocks, with file: OwnedFD, path: String, length: UInt64)
        throws(PosixError)
    {
        try syscall("ftruncate \(path)") { files.truncate(file.number, to: Int(length)) }
        for range in shared.ranges {
            try syscall("share blocks with \(path)") {
                files.cloneRange(
                    shared.file.number, from: range.there, count: range.byteCount, to: file.number, at: range.here)
            }
        }
    }

    private static func writeAll(
        to file: OwnedFD, path: String, length: UInt64,
        _ shared: [(here: UInt64, there: UInt64, byteCount: UInt64)], _ image: MemoryImage?,
        produce: (UnsafeMutableRawBufferPointer) throws(PosixError) -> Int, skip: (Int) -> Void
    ) throws(PosixError) {
        // Room first: a full disk is known before gigabytes were written. Not every file system can.
        // guard: room-first (never: length > 0)
        if shared.isEmpty, length > 0, files.allocate(file.number, Int(length)) != 0,
            errno == ENOSPC || errno == EDQUOT || errno == EFBIG
        {
            throw PosixError(errno, "reserve \(length) bytes for \(path)")
        }
        let writer = ChunkWriter(
            file, path: path, wantsDirect: length >= UInt64(chunkByteCount), image: image)
        var offset: UInt64 = 0
        var ranges = shared[...]
        while offset < length {
            if let range = ranges.first, range.here == offset {
                skip(Int(range.byteCount))
                offset += range.byteCount
                ranges.removeFirst()
                continue
            }
            guard let chunk = writer.nextChunk() else { break }
            let room = min(UInt64(chunk.count), (ranges.first?.here ?? length) - offset)
            let count = try produce(UnsafeMutableRawBufferPointer(rebasing: chunk[..<Int(room)]))
            precondition(count > 0, "the producer ended \(length - offset) bytes early")
            writer.write(count, at: offset)
            offset += UInt64(count)
        }
        try writer.finish()
        precondition(offset == length, "the producer gave \(offset) bytes of \(length)")
        try syscall("ftruncate \(path)") { files.truncate(file.number, to: Int(length)) }
    }
}

/// A few chunks in turn: while some are on their way to the disk, the next one is filled. So copying and summing cost
/// no time of their own if the disk is slower than memory, and the disk always has a request to continue with (1 GiB:
/// three at once take 0.9 times what one after the other takes).
///
/// Unchecked: a chunk belongs to the caller from `nextChunk` to `write`, and to its queue from there until it signals
/// `free`; which chunks are free is under the lock.
private final class ChunkWriter: @unchecked Sendable {
    private struct State {
        var free: [Int]
        var direct: Bool
        var failure: PosixError?
    }
    private let file: OwnedFD
    private let path: String
    private let image: MemoryImage?
    private let chunks: [UnsafeMutableRawBufferPointer]
    /// One a chunk, so that no write waits for another.
    private let queues: [DispatchQueue]
    private var current = 0
    // From 0: Dispatch traps if a semaphore goes with less than it was made with, as after a failed write.
    private let free = DispatchSemaphore(value: 0)
    private let state: Mutex<State>

    init(_ file: OwnedFD, path: String, wantsDirect: Bool, image: MemoryImage?) {
        self.file = file
        self.path = path
        self.image = image
        chunks = ChunkMemory.borrow(large: wantsDirect)
        let indices = chunks.indices
        state = Mutex(
            State(free: Array(indices), direct: wantsDirect && Self.setDirect(file, true), failure: nil))
        queues = indices.map { DispatchQueue(label: "noether-writer.chunk.\($0)") }
        for _ in chunks { free.signal() }
    }

    deinit { ChunkMemory.giveBack(chunks) }

    /// Waits for a free chunk; nil if a write has failed.
    func nextChunk() -> UnsafeMutableRawBufferPointer? {
        free.wait()
        let taken = state.withLock { $0.failure == nil ? $0.free.removeLast() : nil }
        guard let taken else {
            free.signal()
            return nil
        }
        current = taken
        return chunks[taken]
    }

    func write(_ count: Int, at offset: UInt64) {
        let index = current
        Machine.scheduler.async(on: queues[index]) { [self] in
            var failure: PosixError?
            do throws(PosixError) { try put(chunks[index], count, at: offset) } catch { failure = error }
            // After the disk has its request, beside those of the other chunks.
            if failure == nil { image?.write(UnsafeRawBufferPointer(rebasing: chunks[index][..<count]), at: offset) }
            state.withLock {
                $0.failure = $0.failure ?? failure
                $0.free.append(index)
            }
            free.signal()
        }
    }

    /// Returns when all of it is written.
    func finish() throws(PosixError) {
        for queue in queues { queue.sync {} }
        // Whoever continues with the file may write what is not aligned.
        leaveDirect()
        if let error = state.withLock({ $0.failure }) { throw error }
    }

    private func leaveDirect() {
        state.withLock { if $0.direct { $0.direct = !Self.setDirect(file, false) } }
    }

    private var isDirect: Bool { state.withLock { $0.direct } }

    private func put(_ chunk: UnsafeMutableRawBufferPointer, _ count: Int, at offset: UInt64)
        throws(PosixError)
    {
        // The unaligned tail goes through the page cache; writes beside it then do too, which costs time only.
        if count % DurableFile.alignment != 0 { leaveDirect() }
        var done = 0
        while done < count {
            let rest = UnsafeRawBufferPointer(rebasing: chunk[done..<count])
            let result = files.write(file.number, rest, at: Int(offset) + Int(done))
            if result > 0 {
                done += result
                // A short write may leave an unaligned rest.
                if done < count, done % DurableFile.alignment != 0 { leaveDirect() }
            } else if result < 0, errno == EINVAL, isDirect {
                leaveDirect()
            } else if result == 0 {
                throw PosixError(EIO, "write \(path)")
            } else if errno != EINTR {
                throw PosixError(errno, "write \(path)")
            }
        }
    }

    private static func setDirect(_ file: OwnedFD, _ on: Bool) -> Bool {
        files.setDirect(file.number, on) == 0
    }
}

/// Chunks that are used again: fresh memory costs a page fault for each 4 KiB. They go back to the system when no large
/// file was written for a while: an idle daemon is small.
private enum ChunkMemory {
    private struct State {
        var idle: [UInt] = []
        var takenCount = 0
        /// Counts uses, so that a timer knows whether there was one since it was set.
        var uses = 0
    }
    private static let state = Mutex(State())
    private static let queue = DispatchQueue(label: "noether-writer.chunk-memory")
    private static let idleSeconds = 2.0

    /// For one file: a single chunk if it is not `large`.
    static func borrow(large: Bool) -> [UnsafeMutableRawBufferPointer] {
        let (count, found) = state.withLock { state in
            state.uses += 1
            let isBusy = state.takenCount >= DurableFile.manyChunks
            let count = large ? (isBusy ? DurableFile.leastChunkCount : DurableFile.chunkCount) : 1
            state.takenCount += count
            let found = Array(state.idle.suffix(count))
            state.idle.removeLast(found.count)
            return (count, found)
        }
        return (0..<count).map { index in
            let start = index < found.count ? UnsafeMutableRawPointer(bitPattern: found[index]) : nil
            return UnsafeMutableRawBufferPointer(
                start: start
                    ?? .allocate(byteCount: DurableFile.chunkByteCount, alignment: DurableFile.alignment),
                count: DurableFile.chunkByteCount)
        }
    }

    static func giveBack(_ chunks: [UnsafeMutableRawBufferPointer]) {
        let use = state.withLock { state in
            state.idle += chunks.map { UInt(bitPattern: $0.baseAddress) }
            state.takenCount -= chunks.count
            state.uses += 1
            return state.uses
        }
        Machine.scheduler.async(on: queue, after: idleSeconds) {
            let unused = state.withLock { state in
                guard state.uses == use else { return [UInt]() }
                defer { state.idle = [] }
                return state.idle
            }
            for address in unused { UnsafeMutableRawPointer(bitPattern: address)?.deallocate() }
        }
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
