// SPDX-License-Identifier: Apache-2.0
/// Identifies a file and its content: another file, or the same file after a change, has another stamp.
import Glibc

public struct FileStamp: Sendable, Hashable {
    public var identity: OwnedFD.Identity
    public var byteCount: UInt64
    /// In nanoseconds since 1970.
    public var modified: Int64
    public var changed: Int64

    public init(identity: OwnedFD.Identity, byteCount: UInt64, modified: Int64, changed: Int64) {
        self.identity = identity
        self.byteCount = byteCount
        self.modified = modified
        self.changed = changed
    }

    public init(of file: OwnedFD) throws(PosixError) {
        var status = stat()
        try syscall("fstat") { files.fstat(file.number, &status) }
        self.init(
            identity: OwnedFD.Identity(device: UInt64(status.st_dev), inode: UInt64(status.st_ino)),
            byteCount: UInt64(max(0, status.st_size)), modified: Self.nanoseconds(status.st_mtim),
            changed: Self.nanoseconds(status.st_ctim))
    }

    private static func nanoseconds(_ time: timespec) -> Int64 {
        Int64(time.tv_sec) * 1_000_000_000 + Int64(time.tv_nsec)
    }

    /// Whether each later change of the content shows in the stamp. File times go in steps, so the rename of a file
    /// that has just been written may bear the time of the write itself: then so may a change that somebody makes a
    /// moment later. A change after a rename with a later time bears that time at least.
    public var showsChanges: Bool {
        return changed > modified  // guard: stamp-shows-changes (= true)
    }

    /// A tick of the clock at HZ=100. (Some file systems have larger steps.)
    private static let stepNanoseconds: Int64 = 10_000_000

    /// Waits, for a step at most, until a rename bears a later time than the last write.
    static func settle(_ file: OwnedFD) {
        guard let stamp = try? FileStamp(of: file) else { return }
        let age = Int64(Machine.time.wallSeconds * 1e9) - stamp.modified
        // Some more than a step, since the clock and the file's time are rounded.
        let left = stepNanoseconds + stepNanoseconds / 5 - age
        if left > 0, left <= 2 * stepNanoseconds { Machine.time.sleep(Double(left) / 1e9) }
    }
}
