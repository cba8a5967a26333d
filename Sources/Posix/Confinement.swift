// SPDX-License-Identifier: Apache-2.0
/// What a process may not do that others of its user may: hard limits, and niceness, which only a privileged process
/// raises again.
import CLinux
import Glibc

public struct Confinement: Sendable {
    private var limits: [UInt64]
    private var niceness: Int32

    private static let resources: [(number: Int32, words: String)] = [
        (Int32(RLIMIT_FSIZE.rawValue), "bytes a file"), (Int32(RLIMIT_AS.rawValue), "bytes of memory"),
        (Int32(RLIMIT_DATA.rawValue), "bytes of data"), (Int32(RLIMIT_CPU.rawValue), "seconds of processor time"),
    ]

    /// nil where it can't be seen: of another user's, or of another pid namespace.
    public init?(of pid: Int32) {
        guard pid > 0 else { return nil }
        limits = []
        for resource in Self.resources {
            var limit: UInt64 = 0
            guard nw_hard_limit(pid, resource.number, &limit) == 0 else { return nil }
            limits.append(limit)
        }
        errno = 0
        niceness = getpriority(__priority_which_t(PRIO_PROCESS.rawValue), id_t(pid))
        if errno != 0 { return nil }
    }

    /// Whether that one may do more.
    public func isTighter(than other: Confinement) -> Bool {
        niceness > other.niceness || zip(limits, other.limits).contains { $0 < $1 }
    }

    /// In words, what is not as usual; empty where all is.
    public var words: [String] {
        let limited = zip(limits, Self.resources).filter { $0.0 < UInt64(Int64.max) }
        return limited.map { "at most \($0) \($1.words)" } + (niceness > 0 ? ["niceness \(niceness)"] : [])
    }
}
