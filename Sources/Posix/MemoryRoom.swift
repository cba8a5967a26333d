// SPDX-License-Identifier: Apache-2.0
/// How much memory this process may take before anybody runs short: the machine, and each control group that it is in
/// (a container's, a batch job's, a service's). A part of each stays free.

public enum MemoryRoom {
    /// An eighth of the machine's memory, and of each limit, stays free, and at least 1 GiB.
    private static let reservedPart = 8
    private static let reservedByteCount = 1 << 30

    private static func reserved(of total: Int) -> Int { max(total / reservedPart, reservedByteCount) }

    /// In bytes; negative if too little is free already; nil if it cannot be told. Reads a few files of the kernel's.
    public static func read() -> Int64? {
        guard let (total, available) = ofMachine() else { return nil }
        let groups = JobMemory().limitedGroups(heedsHigh: true).filter { $0.limit < total }
        let rooms = groups.map { $0.limit - reserved(of: $0.limit) - $0.used }
        return Int64(rooms.reduce(available - reserved(of: total), min))
    }

    private static func ofMachine() -> (total: Int, available: Int)? {
        guard let text = try? TextFile.read("/proc/meminfo", atMost: 8192) else { return nil }
        func byteCount(_ name: String) -> Int? {
            text.split(separator: "\n").first { $0.hasPrefix("\(name):") }?.split(separator: " ").dropFirst().first
                .flatMap { Int($0) }.map { $0 << 10 }
        }
        guard let total = byteCount("MemTotal"), let available = byteCount("MemAvailable") else { return nil }
        return (total, available)
    }
}
