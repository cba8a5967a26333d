// SPDX-License-Identifier: Apache-2.0
/// How much memory the job (the control group) of this process may take. Buffers are charged to that of the trainer
/// that touches them first, logs to that of the daemon, and what passes its limit is killed. As
/// noether_writer/_cgroup.py.
/// Sources: cgroups(7), and the kernel's admin-guide: cgroup-v2 ("Memory Interface Files"), cgroup-v1/memory.
public struct JobMemory: Sendable {
    /// Below which /proc and the mount points are looked for.
    private let root: String

    public init(root: String = "") { self.root = root }

    private enum Version { case one, two }
    /// In version 1 a group without a limit reports the highest possible number of pages, which is above this.
    private static let noneByteCount = 1 << 60

    /// A control group that has a limit, in bytes.
    public struct Group: Sendable {
        public let limit: Int
        /// Without what the kernel could give back at once (the page cache of files).
        public let used: Int
    }

    /// The bytes that this process's control groups leave free, or nil if none of them has a limit. What the kernel
    /// could give back at once (the page cache of files) counts as free. Each group above counts too.
    public var room: Int? { limitedGroups().map { max(0, $0.limit - $0.used) }.min() }

    /// What this process's control groups may take at most, or nil if none of them has a limit.
    public var limit: Int? { folders.compactMap { Self.limit($0.path, $0.version, heedsHigh: false) }.min() }

    /// The groups of this process and those above them that have a limit.
    /// - Parameter heedsHigh: whether `memory.high` counts as a limit too: above it the kernel slows the group down.
    public func limitedGroups(heedsHigh: Bool = false) -> [Group] {
        folders.compactMap { Self.group($0.path, $0.version, heedsHigh: heedsHigh) }
    }

    /// The directories of this process's memory groups, from its own up to the highest that can be seen.
    private var folders: [(path: String, version: Version)] {
        var found: [(path: String, version: Version)] = []
        for (version, path) in groups {
            guard let (mount, part) = mount(version) else { continue }
            let below = part != "/" && path.hasPrefix(part) ? String(path.dropFirst(part.count)) : path
            let folder = root + mount
            // From inside of a namespace, the path of a group that lies outside cannot be followed.
            let isSeen = !below.contains("/..") && FileFacts(folder + below)?.isDirectory == true
            var parts = isSeen ? FileSystem.parts(of: below) : []
            while true {
                found.append((([folder] + parts).joined(separator: "/"), version))
                if parts.popLast() == nil { break }
            }
        }
        return found
    }

    private var groups: [(Version, String)] {
        lines("/proc/self/cgroup").compactMap { line in
            let fields = line.split(separator: ":", maxSplits: 2, omittingEmptySubsequences: false)
            guard fields.count == 3 else { return nil }
            if fields[1].split(separator: ",").contains("memory") { return (.one, String(fields[2])) }
            return fields[0] == "0" && fields[1].isEmpty ? (.two, String(fields[2])) : nil
        }
    }

    /// The directory at which the hierarchy is mounted, and which part of the hierarchy is mounted there.
    private func mount(_ version: Version) -> (mount: String, part: String)? {
        for line in lines("/proc/self/mountinfo") {
            let words = line.split(separator: " ")
            guard let end = words.firstIndex(of: "-"), end > 4, words.count > end + 1 else { continue }
            let isOurs =
                switch version {
                case .two: words[end + 1] == "cgroup2"
                case .one: words[end + 1] == "cgroup" && words[words.count - 1].split(separator: ",").contains("memory")
                }
            if isOurs { return (String(words[4]), String(words[3])) }
        }
        return nil
    }

    private func lines(_ path: String) -> [Substring] { Self.lines(root + path) }

    private static func lines(_ path: String) -> [Substring] {
        (try? TextFile.read(path, atMost: 1 << 18))?.split(separator: "\n") ?? []
    }

    private static func limit(_ folder: String, _ version: Version, heedsHigh: Bool) -> Int? {
        let names =
            switch version {
            case .one: ["memory.limit_in_bytes"]
            case .two: heedsHigh ? ["memory.max", "memory.high"] : ["memory.max"]
            }
        // "max" is no number.
        return names.compactMap { name in lines("\(folder)/\(name)").first.flatMap { Int($0) } }
            .filter { $0 < noneByteCount }.min()
    }

    private static func group(_ folder: String, _ version: Version, heedsHigh: Bool) -> Group? {
        let names = version == .two ? ("memory.current", "") : ("memory.usage_in_bytes", "total_")
        guard let limit = limit(folder, version, heedsHigh: heedsHigh),
            let used = lines("\(folder)/\(names.0)").first.flatMap({ Int($0) })
        else { return nil }
        // Shared memory is not on these lists: nothing can be given back of it.
        let reclaimable = lines("\(folder)/memory.stat").reduce(0) { sum, line in
            let words = line.split(separator: " ")
            guard words.count == 2, ["active_file", "inactive_file"].contains(where: { words[0] == names.1 + $0 })
            else { return sum }
            return sum + (Int(words[1]) ?? 0)
        }
        return Group(limit: limit, used: max(0, used - reclaimable))
    }
}
