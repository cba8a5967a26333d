// SPDX-License-Identifier: Apache-2.0
/// A descriptor with one owner, closed when the owner lets go. A class, since it crosses into closures and queues;
/// the number never changes, so it is Sendable.
import CLinux
import Dispatch
import Glibc
import Synchronization

public final class OwnedFD: Sendable {
    public let number: Int32
    /// Of storage: its device.
    private let device: UInt64?

    /// - Parameter device: given, it is closed on a queue of that device: closing may write back (NFS, FUSE) or give
    ///   gigabytes of blocks back, and whoever lets go last may be a queue that must not wait.
    public init(adopting number: Int32, on device: UInt64? = nil) {
        precondition(number >= 0, "an OwnedFD needs an open descriptor")
        self.number = number
        self.device = device
    }

    /// A file, opened for reading.
    public convenience init(reading path: String) throws(PosixError) {
        // Without O_NONBLOCK, a FIFO would wait for a writer, for ever.
        let flags = O_RDONLY | O_NONBLOCK | O_NOCTTY | nw_o_cloexec
        self.init(adopting: try syscall("open \(path)") { nw_open(path, flags, 0) })
    }

    deinit {
        guard let device else {
            files.close(number)
            return
        }
        let number = number
        Machine.scheduler.async(on: Self.closing(device)) { files.close(number) }
    }

    /// A queue for each device, kept: they are few.
    private static func closing(_ device: UInt64) -> DispatchQueue {
        queues.withLock { queues in
            if let queue = queues[device] { return queue }
            let queue = DispatchQueue(label: "noether-writer.closing")
            queues[device] = queue
            return queue
        }
    }

    private static let queues = Mutex<[UInt64: DispatchQueue]>([:])

    public struct Identity: Sendable, Hashable {
        public var device: UInt64
        public var inode: UInt64

        public init(device: UInt64, inode: UInt64) {
            self.device = device
            self.inode = inode
        }

        /// The file that has this name now, or the link; nil if there is none.
        public init?(of path: String) {
            var status = stat()
            guard lstat(path, &status) == 0 else { return nil }
            self.init(device: UInt64(status.st_dev), inode: UInt64(status.st_ino))
        }
    }

    /// What it takes of memory or of the disk, in bytes: less than its size where it has holes.
    func allocatedByteCount() throws(PosixError) -> UInt64 {
        var result = stat()
        try syscall("fstat") { files.fstat(number, &result) }
        return UInt64(max(0, result.st_blocks)) * 512
    }

    /// The same directory once more: another open file, not a second number for this one.
    public func reopenedDirectory() throws(PosixError) -> OwnedFD {
        let flags = nw_o_path | nw_o_directory | nw_o_cloexec
        return OwnedFD(
            adopting: try syscall("open a directory again") { nw_open_beneath(number, ".", UInt64(flags), 0) })
    }

    public func status() throws(PosixError) -> (
        identity: Identity, size: UInt64, isRegular: Bool, isDirectory: Bool, owner: UInt32, mode: UInt32
    ) {
        var result = stat()
        try syscall("fstat") { files.fstat(number, &result) }
        let kind = result.st_mode & S_IFMT
        return (
            Identity(device: UInt64(result.st_dev), inode: UInt64(result.st_ino)),
            UInt64(max(0, result.st_size)),
            kind == S_IFREG, kind == S_IFDIR, result.st_uid, result.st_mode & 0o7777
        )
    }
}
