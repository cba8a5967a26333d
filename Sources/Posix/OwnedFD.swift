/// A descriptor with one owner, closed when the owner lets go. A class, since it crosses into closures and queues;
/// the number never changes, so it is Sendable.
import Glibc

public final class OwnedFD: Sendable {
    public let number: Int32

    public init(adopting number: Int32) {
        precondition(number >= 0, "an OwnedFD needs an open descriptor")
        self.number = number
    }

    deinit { close(number) }

    public struct Identity: Sendable, Hashable {
        public var device: UInt64
        public var inode: UInt64
    }

    public func status() throws(PosixError) -> (
        identity: Identity, size: UInt64, isRegular: Bool, isDirectory: Bool, owner: UInt32, mode: UInt32
    ) {
        var result = stat()
        try syscall("fstat") { fstat(number, &result) }
        let kind = result.st_mode & S_IFMT
        return (
            Identity(device: UInt64(result.st_dev), inode: UInt64(result.st_ino)),
            UInt64(max(0, result.st_size)),
            kind == S_IFREG, kind == S_IFDIR, result.st_uid, result.st_mode & 0o7777
        )
    }
}
