/// Small text files, whole.
import CLinux
import Glibc

public enum TextFile {
    public static let maximumByteCount = 1 << 20

    public static func read(
        _ path: String, atMost maximumByteCount: Int = maximumByteCount
    ) throws(PosixError) -> String {
        let fd = OwnedFD(adopting: try syscall("open \(path)") { nw_open(path, O_RDONLY | nw_o_cloexec, 0) })
        var bytes = [UInt8](repeating: 0, count: maximumByteCount)
        var length = 0
        while length < bytes.count {
            let count = try syscall("read \(path)") {
                bytes.withUnsafeMutableBytes {
                    Glibc.read(fd.number, $0.baseAddress! + length, $0.count - length)
                }
            }
            if count == 0 { break }
            length += count
        }
        return String(decoding: bytes.prefix(length), as: UTF8.self)
    }
}
