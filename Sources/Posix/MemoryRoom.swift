// SPDX-License-Identifier: Apache-2.0
/// How much memory this process may take before anybody runs short: of the machine, and of each control group that it
/// is in (a container's, a batch job's, a service's). A part of each stays free.
import Glibc

public enum MemoryRoom {
    /// An eighth of the machine's memory, and of each limit, stays free, and at least 1 GiB.
    private static let reservedPart: Int64 = 8
    private static let reservedByteCount: Int64 = 1 << 30

    private static func reserved(of total: Int64) -> Int64 { max(total / reservedPart, reservedByteCount) }

    /// In bytes; negative if too little is free already; nil if it cannot be told. Reads a few files of the kernel's.
    public static func read() -> Int64? {
        guard let machine = ofMachine() else { return nil }
        return ([machine.room] + groups().compactMap { room(of: $0, total: machine.total) }).min()
    }

    private static func ofMachine() -> (room: Int64, total: Int64)? {
        guard let text = try? TextFile.read("/proc/meminfo", atMost: 8192) else { return nil }
        let found = numbers(text, separator: ":")
        guard let total = found["MemTotal"], let available = found["MemAvailable"] else { return nil }
        return (available * 1024 - reserved(of: total * 1024), total * 1024)
    }

    /// A directory of a control group, and the names of its files.
    private struct Group {
        var path: String
        var limits: [String]
        var used: String
        /// Of its memory.stat: what the kernel takes back when it needs it.
        var cache: [String]
    }

    private static func groups() -> [Group] {
        let lines = ((try? TextFile.read("/proc/self/cgroup", atMost: 16384)) ?? "").split(separator: "\n")
        var found: [Group] = []
        for line in lines {
            let fields = line.split(separator: ":", maxSplits: 2, omittingEmptySubsequences: false)
            guard fields.count == 3 else { continue }
            if fields[0] == "0", fields[1].isEmpty {
                let root =
                    FileFacts("/sys/fs/cgroup/cgroup.controllers") == nil ? "/sys/fs/cgroup/unified" : "/sys/fs/cgroup"
                found += directories(String(fields[2]), below: root).map {
                    Group(
                        path: $0, limits: ["memory.max", "memory.high"], used: "memory.current",
                        cache: ["inactive_file", "active_file", "slab_reclaimable"])
                }
            } else if fields[1].split(separator: ",").contains("memory") {
                found += directories(String(fields[2]), below: "/sys/fs/cgroup/memory").map {
                    Group(
                        path: $0, limits: ["memory.limit_in_bytes"], used: "memory.usage_in_bytes",
                        cache: ["total_inactive_file", "total_active_file"])
                }
            }
        }
        return found
    }

    /// The group's and those above it. In a container the path may be that of the host, and only the root is there.
    private static func directories(_ path: String, below root: String) -> [String] {
        var found = [root]
        for part in FileSystem.parts(of: path) {
            let next = found[found.count - 1] + "/" + part
            guard part != "..", FileFacts(next) != nil else { break }
            found.append(next)
        }
        return found
    }

    private static func room(of group: Group, total: Int64) -> Int64? {
        let limits = group.limits.compactMap { number("\(group.path)/\($0)") }.filter { $0 < total }
        guard let limit = limits.min(), let used = number("\(group.path)/\(group.used)") else { return nil }
        let found = numbers((try? TextFile.read("\(group.path)/memory.stat", atMost: 65536)) ?? "", separator: " ")
        let cache = group.cache.reduce(0) { $0 + (found[$1[...]] ?? 0) }
        return limit - reserved(of: limit) - max(0, used - cache)
    }

    private static func number(_ path: String) -> Int64? {
        (try? TextFile.read(path, atMost: 64)).flatMap { Int64($0.prefix { $0 != "\n" }) }
    }

    private static func numbers(_ text: String, separator: Character) -> [Substring: Int64] {
        var found: [Substring: Int64] = [:]
        for line in text.split(separator: "\n") {
            let parts = line.split(whereSeparator: { $0 == separator || $0 == " " })
            if parts.count >= 2, let number = Int64(parts[1]) { found[parts[0]] = number }
        }
        return found
    }
}
