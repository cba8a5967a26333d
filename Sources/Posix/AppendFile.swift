// SPDX-License-Identifier: Apache-2.0
/// A file that grows at its end and belongs to one process at a time: opened below a held directory, locked for as long
/// as it is open. The lock dies with its holder, so a file that nobody holds was left behind.
import CLinux
import Glibc

public final class AppendFile: Sendable {
    public enum Opened: Sendable {
        case file(AppendFile)
        /// Another process holds it.
        case held
        case missing
    }

    private let fd: OwnedFD
    /// For messages.
    public let path: String

    private init(_ fd: OwnedFD, _ path: String) {
        self.fd = fd
        self.path = path
    }

    /// - Parameter locks: if it does not, several may have the file open.
    public static func open(
        _ name: String, in directory: Directory, create: Bool, locks: Bool = true
    ) throws(PosixError) -> Opened {
        let path = "\(directory.path)/\(name)"
        // Not blocking: a FIFO may have the name.
        let flags = UInt64(O_RDWR | (create ? O_CREAT : 0) | O_NONBLOCK | O_NOCTTY | nw_o_cloexec)
        let number: Int32
        do {
            number = try syscall("open \(path)") {
                files.openBeneath(
                    directory.fd.number, name, flags, create ? UInt64(directory.mode(0o666)) : 0)
            }
        } catch {
            if error.errno == ENOENT, !create { return .missing }
            throw error
        }
        let fd = OwnedFD(adopting: number, on: directory.device)
        try checkOurs(fd, in: directory, path: path)
        guard !locks || takeLock(fd.number) else { return .held }  // guard: journal-of-one-daemon (always)
        // Its holder may have unlinked it between our open and our lock.
        var status = stat()
        try syscall("fstat \(path)") { files.fstat(fd.number, &status) }
        guard status.st_nlink > 0 else {
            return create ? try open(name, in: directory, create: true, locks: locks) : .missing
        }
        if create { try directory.sync() }
        return .file(AppendFile(fd, path))
    }

    /// It will be written to: a file, of our owner (the directory's, where the file system gives files to somebody
    /// else), that has no second name elsewhere.
    private static func checkOurs(_ fd: OwnedFD, in directory: Directory, path: String) throws(PosixError) {
        var status = stat()
        try syscall("fstat \(path)") { files.fstat(fd.number, &status) }
        guard status.st_mode & S_IFMT == S_IFREG else {  // guard: appends-to-files-only (always)
            throw PosixError(EEXIST, "use \(path), which is not a regular file")
        }
        let directoryOwner = try directory.fd.status().owner
        // guard: appends-to-own-files-only (always)
        guard status.st_uid == geteuid() || status.st_uid == directoryOwner else {
            throw PosixError(EPERM, "use \(path), which belongs to uid \(status.st_uid)")
        }
        guard status.st_nlink <= 1 else {  // guard: appends-to-one-name-only (always)
            throw PosixError(EMLINK, "use \(path), which has another name too")
        }
    }

    /// A new file with these bytes, durable, in the place of whatever has the name.
    public static func replace(
        _ name: String, in directory: Directory, _ bytes: [UInt8]
    ) throws(PosixError) -> AppendFile {
        let fd = try DurableFile.write(name, bytes: bytes, in: directory, faults: "journal")
        let path = "\(directory.path)/\(name)"
        // Held since it was made, where the file system can.
        try syscall("flock \(path)") { files.flock(fd.number) }
        return AppendFile(fd, path)
    }

    /// The first bytes of this file as a new one, durable, in the place of whatever has the name.
    public func copied(
        to name: String, in directory: Directory, length: UInt64
    ) throws(PosixError) -> AppendFile {
        let path = "\(directory.path)/\(name)"
        var offset: UInt64 = 0
        let fd = try DurableFile.write(
            name, in: directory, length: length,
            produce: { buffer throws(PosixError) in
                let wanted = Int(min(UInt64(buffer.count), length - offset))
                let count = try self.read(at: offset, into: UnsafeMutableRawBufferPointer(rebasing: buffer[..<wanted]))
                guard count > 0 else { throw PosixError.inputOutput("read \(path), which has become shorter") }
                offset += UInt64(count)
                return count
            }, keepsMode: true, faults: "journal")
        try syscall("flock \(path)") { files.flock(fd.number) }
        return AppendFile(fd, path)
    }

    /// Whether the name in this directory leads to this file.
    public func isNamed(_ name: String, in directory: Directory) throws(PosixError) -> Bool {
        try directory.identity(below: name) == fd.status().identity
    }

    public var byteCount: UInt64 { get throws(PosixError) { try fd.status().size } }

    /// Whether both hold the same bytes.
    public func isSame(as other: AppendFile) throws(PosixError) -> Bool {
        guard try byteCount == other.byteCount else { return false }
        let pieceByteCount = 1 << 20
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 2 * pieceByteCount, alignment: 16)
        defer { buffer.deallocate() }
        let mine = UnsafeMutableRawBufferPointer(rebasing: buffer[..<pieceByteCount])
        let others = UnsafeMutableRawBufferPointer(rebasing: buffer[pieceByteCount...])
        var offset: UInt64 = 0
        while true {
            let count = try read(at: offset, into: mine)
            guard try other.read(at: offset, into: others) == count else { return false }
            guard mine[..<count].elementsEqual(others[..<count]) else { return false }
            if count < pieceByteCount { return true }
            offset += UInt64(count)
        }
    }

    /// - Returns: how many bytes there were; fewer than asked at the file's end only.
    public func read(at offset: UInt64, into buffer: UnsafeMutableRawBufferPointer) throws(PosixError) -> Int {
        var done = 0
        while done < buffer.count {
            let count = try syscall("read \(path)") {
                files.read(
                    fd.number, into: UnsafeMutableRawBufferPointer(rebasing: buffer[done...]),
                    at: Int(offset) + Int(done))
            }
            if count == 0 { break }
            done += count
        }
        return done
    }

    /// Writes all of it at `offset`. After an error the same bytes may be written there again.
    public func write(_ bytes: [UInt8], at offset: UInt64) throws(PosixError) {
        var done = 0
        while done < bytes.count {
            let count = try syscall("write \(path)") {
                bytes.withUnsafeBytes {
                    files.write(
                        fd.number, UnsafeRawBufferPointer(rebasing: $0[done...]), at: Int(offset) + Int(done))
                }
            }
            guard count > 0 else { throw PosixError(EIO, "write \(path)") }
            done += count
        }
    }

    // guard: journal-synced (= 0 for files.fdatasync(fd.number))
    public func sync() throws(PosixError) { try syscall("fdatasync \(path)") { files.fdatasync(fd.number) } }

    public func truncate(to length: UInt64) throws(PosixError) {
        try syscall("ftruncate \(path)") { files.truncate(fd.number, to: Int(length)) }
    }
}
