// SPDX-License-Identifier: Apache-2.0
/// A file system in memory that has what a disk and its kernel do to a program. What was not synced, bytes and
/// names, may be there after a power cut, or not, or in parts. Calls fail, stop short, take long. After an fsync
/// that failed, the bytes may be gone from the disk while the page cache still shows them, and the next fsync says
/// nothing.
import CLinux
package import Glibc
import Posix

package final class SimulatedDisk: FileStore, @unchecked Sendable {
    package final class Node {
        package let number: UInt64
        package let isDirectory: Bool
        /// What a process sees.
        package var bytes: [UInt8] = []
        package var attributes: [String: String] = [:]
        package var entries: [String: Node] = [:]
        package var linkCount = 0
        /// What the disk has for certain.
        package var safeBytes: [UInt8] = []
        package var safeAttributes: [String: String] = [:]
        package var safeEntries: [String: Node] = [:]
        /// What may be on it, in order.
        package var changes: [Change] = []
        /// A lock is held over calls on it, and on what is below: nothing else of the daemon may come between.
        package var isAlone = false
        /// The descriptor that has it locked.
        package var lock: Int32?

        package init(_ number: UInt64, isDirectory: Bool) {
            self.number = number
            self.isDirectory = isDirectory
        }
    }

    package enum Change {
        case write([UInt8], at: Int)
        case length(Int)
        case attribute(String, String)
        /// All at once: nil takes a name away.
        case names([(name: String, node: Node?)])
    }

    package enum Call: CaseIterable {
        case open, create, mkdir, list, status, read, write, truncate, allocate, fsync, fdatasync, rename, link, unlink
    }

    /// What goes wrong for a while.
    package struct Fault {
        package var calls: Set<Call>
        package var code: Int32
        package var share: Double
        package var until: Double

        package init(calls: Set<Call>, code: Int32, share: Double, until: Double) {
            self.calls = calls
            self.code = code
            self.share = share
            self.until = until
        }
    }

    private struct Descriptor {
        let node: Node
        var position = 0
    }

    /// Larger numbers than the kernel gives: what is not of this disk, as a memfd, is the kernel's.
    private static let firstDescriptor: Int32 = 1 << 24
    /// What a disk writes whole.
    private static let sectorByteCount = 64
    private static let device: UInt = 77

    /// See `Node.isAlone`.
    package static let aloneDirectory = "/state"

    private let schedule: Schedule
    private var dice: Dice { schedule.dice }
    private let kernel = KernelFiles()
    package private(set) var root: Node
    private var nodeCount: UInt64 = 1
    private var descriptors: [Int32: Descriptor] = [:]
    private var nextDescriptor = firstDescriptor
    private let userID = geteuid()

    package var faults: [Fault] = []
    /// Of writes that take some of their bytes only.
    package var shortShare = 0.0
    /// Of calls that take long, and how long they take.
    package var slowShare = 0.0
    package var slowSeconds = 0.001...0.05
    /// Whether names reach the disk in the order in which they were made, as a journaling file system has it.
    package var keepsOrder = false
    /// Hears of a file that gets a name, before the name is on the disk.
    package var named: (_ directory: Node, _ name: String, _ node: Node, _ old: Node?) -> Void = { _, _, _, _ in }
    /// Hears of a file that changes, or goes, under its name.
    package var changed: (_ node: Node) -> Void = { _ in }
    package var removed: (_ directory: Node, _ name: String, _ node: Node) -> Void = { _, _, _ in }
    package private(set) var callCount = 0

    package init(_ schedule: Schedule) {
        self.schedule = schedule
        root = Node(1, isDirectory: true)
        root.linkCount = 1
    }

    // MARK: For the one who checks

    package func find(_ path: String, isSafe: Bool = false) -> Node? {
        var node = root
        for part in path.split(separator: "/") {
            guard let next = (isSafe ? node.safeEntries : node.entries)[String(part)] else { return nil }
            node = next
        }
        return node
    }

    /// A directory that was there before everything.
    package func makeSafeDirectory(_ path: String) {
        var node = root
        for part in path.split(separator: "/") {
            let name = String(part)
            let next = node.entries[name] ?? newNode(isDirectory: true, in: node)
            if node.entries[name] == nil { next.linkCount = 1 }
            node.entries[name] = next
            node.safeEntries[name] = next
            node = next
            node.isAlone = isAlone(path)
        }
    }

    /// Somebody else removes it, with what is below.
    package func remove(_ path: String) {
        let parts = path.split(separator: "/")
        guard let parent = find(parts.dropLast().joined(separator: "/")), let name = parts.last else { return }
        change(parent, [(String(name), nil)])
    }

    /// All processes that had files open are dead.
    package func closeAll() {
        for (_, descriptor) in descriptors { descriptor.node.lock = nil }
        descriptors = [:]
    }

    // MARK: Power

    /// What was not synced survives, or not, as the dice say.
    package func cutPower() {
        closeAll()
        let mode = dice.below(4)
        let share = mode == 0 ? 0 : mode == 1 ? 1 : dice.share()
        var seen: Set<UInt64> = []
        settle(root, share: share, &seen)
        faults = []
    }

    private func settle(_ node: Node, share: Double, _ seen: inout Set<UInt64>) {
        guard seen.insert(node.number).inserted else { return }
        var isOver = false
        for change in node.changes {
            if keepsOrder, node.isDirectory {
                isOver = isOver || !dice.chance(share)
                if !isOver { apply(change, to: node) }
            } else if dice.chance(share) {
                apply(dice.chance(0.3) ? torn(change) : change, to: node)
            }
        }
        node.changes = []
        node.bytes = node.safeBytes
        node.attributes = node.safeAttributes
        node.entries = node.safeEntries
        node.lock = nil
        node.linkCount = node.number == 1 ? 1 : 0
        for name in node.entries.keys.sorted() { settle(node.entries[name]!, share: share, &seen) }
        for (_, child) in node.entries { child.linkCount += 1 }
    }

    /// Some sectors of a write.
    private func torn(_ change: Change) -> Change {
        guard case .write(let bytes, let offset) = change, bytes.count > 1 else { return change }
        let end =
            dice.chance(0.5)
            ? dice.below(bytes.count) / Self.sectorByteCount * Self.sectorByteCount : dice.below(bytes.count)
        return .write(Array(bytes[..<end]), at: offset)
    }

    private func apply(_ change: Change, to node: Node) {
        switch change {
        case .write(let bytes, let offset): Self.put(bytes[...], at: offset, into: &node.safeBytes)
        case .length(let length): Self.cut(&node.safeBytes, to: length)
        case .attribute(let name, let value): node.safeAttributes[name] = value
        case .names(let names): for (name, child) in names { node.safeEntries[name] = child }
        }
    }

    private static func put(_ new: ArraySlice<UInt8>, at offset: Int, into bytes: inout [UInt8]) {
        guard !new.isEmpty else { return }
        if bytes.count < offset + new.count { cut(&bytes, to: offset + new.count) }
        bytes.replaceSubrange(offset..<offset + new.count, with: new)
    }

    private static func cut(_ bytes: inout [UInt8], to length: Int) {
        if bytes.count > length {
            bytes.removeLast(bytes.count - length)
        } else {
            bytes += [UInt8](repeating: 0, count: length - bytes.count)
        }
    }

    // MARK: Calls

    /// Before a call does anything: others may go first, it may take long, and it may fail.
    /// - Returns: whether it goes on; `errno` says why not.
    private func enter(_ call: Call, _ node: Node?, pauses: Bool = true, isAlone: Bool? = nil) -> Bool {
        callCount += 1
        guard !schedule.callerIsDead else { return fail(EIO) }
        if pauses {
            let isAlone = isAlone ?? node?.isAlone ?? false
            let isSlow = !isAlone && slowShare > 0 && dice.chance(slowShare)
            schedule.pauseHere(isAlone: isAlone, for: isSlow ? dice.seconds(slowSeconds) : 0)
            guard !schedule.callerIsDead else { return fail(EIO) }
        }
        schedule.note("  \(call) \(node.map { "\($0.number)" } ?? "")")
        if !faults.isEmpty {
            faults.removeAll { $0.until <= schedule.now }
            for fault in faults where fault.calls.contains(call) && dice.chance(fault.share) {
                schedule.note("\(call) fails with \(fault.code)")
                // The kernel forgets what it could not write, and who asks again hears nothing of it.
                if call == .fdatasync, let node, dice.chance(0.5) { node.changes = [] }
                return fail(fault.code)
            }
        }
        return true
    }

    private func fail(_ code: Int32) -> Bool {
        errno = code
        return false
    }

    private func refuse(_ code: Int32) -> Int32 {
        errno = code
        return -1
    }

    private func newNode(isDirectory: Bool, in parent: Node) -> Node {
        nodeCount += 1
        let node = Node(nodeCount, isDirectory: isDirectory)
        node.isAlone = parent.isAlone
        return node
    }

    private func newDescriptor(_ node: Node) -> Int32 {
        nextDescriptor += 1
        descriptors[nextDescriptor] = Descriptor(node: node)
        return nextDescriptor
    }

    private func node(_ file: Int32) -> Node? {
        let found = descriptors[file]?.node
        if found == nil { errno = EBADF }
        return found
    }

    private func isAlone(_ path: String) -> Bool { path.hasPrefix(Self.aloneDirectory) }

    private func walk(_ path: String) -> Node? {
        let found = find(path)
        if found == nil { errno = ENOENT }
        return found
    }

    package func open(_ path: String, _ flags: Int32, _ mode: UInt32) -> Int32 {
        guard enter(.open, nil, isAlone: isAlone(path)), let node = walk(path) else { return -1 }
        if flags & nw_o_directory != 0, !node.isDirectory { return refuse(ENOTDIR) }
        return newDescriptor(node)
    }

    package func openBeneath(_ directory: Int32, _ name: String, _ flags: UInt64, _ mode: UInt64) -> Int32 {
        guard directory >= Self.firstDescriptor else { return kernel.openBeneath(directory, name, flags, mode) }
        let flags = Int32(truncatingIfNeeded: flags)
        guard let parent = node(directory) else { return -1 }
        let creates = flags & O_CREAT != 0
        guard enter(creates ? .create : .open, parent) else { return -1 }
        if name == "." { return newDescriptor(parent) }
        if let found = parent.entries[name] {
            if creates, flags & O_EXCL != 0 { return refuse(EEXIST) }
            if flags & nw_o_directory != 0, !found.isDirectory { return refuse(ENOTDIR) }
            if found.isDirectory, flags & (O_RDWR | O_WRONLY) != 0 { return refuse(EISDIR) }
            return newDescriptor(found)
        }
        guard creates else { return refuse(ENOENT) }
        guard parent.linkCount > 0 else { return refuse(ENOENT) }
        let made = newNode(isDirectory: false, in: parent)
        change(parent, [(name, made)])
        return newDescriptor(made)
    }

    package func close(_ file: Int32) {
        guard file >= Self.firstDescriptor else { return kernel.close(file) }
        guard let descriptor = descriptors.removeValue(forKey: file) else { return }
        if descriptor.node.lock == file { descriptor.node.lock = nil }
    }

    package func mkdir(_ path: String, _ mode: UInt32) -> Int32 {
        let parts = path.split(separator: "/").map { String($0) }
        guard enter(.mkdir, nil, isAlone: isAlone(path)) else { return -1 }
        guard let parent = walk(parts.dropLast().joined(separator: "/")) else { return -1 }
        return make(parts.last ?? "", in: parent)
    }

    package func mkdir(_ name: String, in directory: Int32, _ mode: UInt32) -> Int32 {
        guard let parent = node(directory), enter(.mkdir, parent) else { return -1 }
        return make(name, in: parent)
    }

    private func make(_ name: String, in parent: Node) -> Int32 {
        guard parent.entries[name] == nil, !name.isEmpty else { return refuse(EEXIST) }
        guard parent.linkCount > 0 else { return refuse(ENOENT) }
        change(parent, [(name, newNode(isDirectory: true, in: parent))])
        return 0
    }

    package func names(in directory: Int32) -> [String]? {
        guard let node = node(directory), enter(.list, node) else { return nil }
        return node.entries.keys.sorted()
    }

    // MARK: What they are

    package func stat(_ path: String, _ status: inout stat) -> Int32 {
        guard enter(.status, nil, isAlone: isAlone(path)), let node = walk(path) else { return -1 }
        fill(&status, node)
        return 0
    }

    package func fstat(_ file: Int32, _ status: inout stat) -> Int32 {
        guard file >= Self.firstDescriptor else { return kernel.fstat(file, &status) }
        // The kernel has it in memory.
        guard let node = node(file), enter(.status, node, pauses: false) else { return -1 }
        fill(&status, node)
        return 0
    }

    package func fstat(_ name: String, in directory: Int32, _ status: inout stat) -> Int32 {
        guard let parent = node(directory), enter(.status, parent) else { return -1 }
        guard let node = parent.entries[name] else { return refuse(ENOENT) }
        fill(&status, node)
        return 0
    }

    private func fill(_ status: inout stat, _ node: Node) {
        status = Glibc.stat()
        status.st_dev = Self.device
        status.st_ino = UInt(node.number)
        status.st_mode = (node.isDirectory ? S_IFDIR : S_IFREG) | 0o755
        status.st_nlink = UInt(node.linkCount)
        status.st_uid = userID
        status.st_size = node.bytes.count
    }

    package func attribute(_ name: String, of path: String, into bytes: UnsafeMutableRawBufferPointer?) -> Int {
        Int(refuse(ENODATA))
    }

    package func attribute(_ name: String, of file: Int32, into bytes: UnsafeMutableRawBufferPointer?) -> Int {
        guard let node = node(file) else { return -1 }
        guard let value = node.attributes[name] else { return Int(refuse(ENODATA)) }
        guard let bytes, bytes.count >= value.utf8.count else { return Int(refuse(ERANGE)) }
        bytes.copyBytes(from: value.utf8)
        return value.utf8.count
    }

    package func setAttribute(_ name: String, of file: Int32, to value: String) -> Int32 {
        guard let node = node(file), enter(.status, node) else { return -1 }
        node.attributes[name] = value
        node.changes.append(.attribute(name, value))
        return 0
    }

    // MARK: Bytes

    package func read(_ file: Int32, into bytes: UnsafeMutableRawBufferPointer) -> Int {
        guard let position = descriptors[file]?.position else { return kernel.read(file, into: bytes) }
        let count = read(file, into: bytes, at: position)
        if count > 0 { descriptors[file]?.position += count }
        return count
    }

    package func read(_ file: Int32, into bytes: UnsafeMutableRawBufferPointer, at offset: Int) -> Int {
        guard file >= Self.firstDescriptor else { return kernel.read(file, into: bytes, at: offset) }
        guard let node = node(file), enter(.read, node) else { return -1 }
        guard offset < node.bytes.count else { return 0 }
        let count = min(bytes.count, node.bytes.count - offset)
        bytes.copyBytes(from: node.bytes[offset..<offset + count])
        return count
    }

    package func write(_ file: Int32, _ bytes: UnsafeRawBufferPointer, at offset: Int) -> Int {
        guard file >= Self.firstDescriptor else { return kernel.write(file, bytes, at: offset) }
        guard let node = node(file), enter(.write, node) else { return -1 }
        var count = bytes.count
        if count > 1, dice.chance(shortShare) { count = 1 + dice.below(count - 1) }
        let taken = Array(bytes[..<count])
        Self.put(taken[...], at: offset, into: &node.bytes)
        node.changes.append(.write(taken, at: offset))
        changed(node)
        return count
    }

    package func truncate(_ file: Int32, to length: Int) -> Int32 {
        guard file >= Self.firstDescriptor else { return kernel.truncate(file, to: length) }
        guard let node = node(file), enter(.truncate, node) else { return -1 }
        guard length != node.bytes.count else { return 0 }
        Self.cut(&node.bytes, to: length)
        node.changes.append(.length(length))
        changed(node)
        return 0
    }

    package func allocate(_ file: Int32, _ length: Int) -> Int32 {
        guard let node = node(file), enter(.allocate, node) else { return -1 }
        if length > node.bytes.count {
            Self.cut(&node.bytes, to: length)
            node.changes.append(.length(length))
        }
        return 0
    }

    package func cloneRange(_ source: Int32, from: UInt64, count: UInt64, to file: Int32, at: UInt64) -> Int32 {
        refuse(EOPNOTSUPP)
    }

    package func setDirect(_ file: Int32, _ on: Bool) -> Int32 { refuse(EINVAL) }
    package func dropCache(_ file: Int32) {}

    package func fsync(_ file: Int32) -> Int32 {
        guard let node = node(file), enter(.fsync, node) else { return -1 }
        return sync(node)
    }

    package func fdatasync(_ file: Int32) -> Int32 {
        guard let node = node(file), enter(.fdatasync, node) else { return -1 }
        return sync(node)
    }

    private func sync(_ node: Node) -> Int32 {
        for change in node.changes { apply(change, to: node) }
        node.changes = []
        return 0
    }

    /// Modes are not simulated.
    package func chmod(_ file: Int32, _ mode: UInt32) -> Int32 {
        file >= Self.firstDescriptor ? 0 : kernel.chmod(file, mode)
    }

    package func flock(_ file: Int32) -> Int32 {
        guard file >= Self.firstDescriptor else { return kernel.flock(file) }
        // No pause: some of who call it hold a lock of their own.
        guard !schedule.callerIsDead else { return refuse(EIO) }
        guard let node = node(file) else { return -1 }
        if let holder = node.lock, holder != file { return refuse(EWOULDBLOCK) }
        node.lock = file
        return 0
    }

    // MARK: Names

    private func change(_ parent: Node, _ names: [(name: String, node: Node?)]) {
        for (name, node) in names {
            schedule.note("  \(parent.number)/\(name) is \(node.map { "\($0.number)" } ?? "gone")")
            let old = parent.entries[name]
            if let node {
                node.linkCount += 1
                named(parent, name, node, old)
            }
            old?.linkCount -= 1
            parent.entries[name] = node
        }
        parent.changes.append(.names(names))
    }

    package func rename(_ name: String, to other: String, in directory: Int32) -> Int32 {
        guard let parent = node(directory), enter(.rename, parent) else { return -1 }
        guard let moved = parent.entries[name] else { return refuse(ENOENT) }
        if parent.entries[other]?.isDirectory == true { return refuse(EISDIR) }
        // Two names of one file: nothing happens (rename(2)).
        if parent.entries[other] === moved { return 0 }
        change(parent, [(name, nil), (other, moved)])
        return 0
    }

    package func renameNew(_ name: String, to other: String, in directory: Int32) -> Int32 {
        guard let parent = node(directory) else { return -1 }
        if parent.entries[other] != nil { return refuse(EEXIST) }
        return rename(name, to: other, in: directory)
    }

    package func link(_ name: String, as other: String, in directory: Int32) -> Int32 {
        guard let parent = node(directory), enter(.link, parent) else { return -1 }
        guard let found = parent.entries[name] else { return refuse(ENOENT) }
        if parent.entries[other] != nil { return refuse(EEXIST) }
        change(parent, [(other, found)])
        return 0
    }

    package func unlink(_ name: String, in directory: Int32) -> Int32 {
        guard let parent = node(directory), enter(.unlink, parent) else { return -1 }
        guard let found = parent.entries[name] else { return refuse(ENOENT) }
        if found.isDirectory { return refuse(EISDIR) }
        removed(parent, name, found)
        change(parent, [(name, nil)])
        return 0
    }

    package func anyNumber() -> UInt64 { dice.next() }
}
