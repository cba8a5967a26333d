// SPDX-License-Identifier: Apache-2.0
/// Much text, or a picture, to a file or to standard output, in large pieces.
import CLinux
import Glibc

public final class TextSink {
    private let fd: OwnedFD?
    private let path: String
    private var pending: [UInt8] = []

    /// - Parameter path: created or replaced; nil: standard output.
    public init(_ path: String?) throws(PosixError) {
        self.path = path ?? "standard output"
        fd = try path.map { path throws(PosixError) in
            OwnedFD(
                adopting: try syscall("create \(path)") {
                    nw_open(path, O_WRONLY | O_CREAT | O_TRUNC | nw_o_cloexec, 0o666)
                })
        }
    }

    public func write(_ text: String) throws(PosixError) {
        pending += text.utf8
        if pending.count >= 1 << 16 { try flush() }
    }

    public func write(_ bytes: [UInt8]) throws(PosixError) {
        pending += bytes
        if pending.count >= 1 << 16 { try flush() }
    }

    /// All of it is with the file.
    public func finish() throws(PosixError) { try flush() }

    private func flush() throws(PosixError) {
        try writeAll(pending, to: fd?.number ?? 1, "write \(path)")
        pending = []
    }
}
