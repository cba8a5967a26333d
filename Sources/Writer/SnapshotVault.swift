// SPDX-License-Identifier: Apache-2.0
/// Images of durable files, in memory, for a trainer that was killed and is started again on this node (`restore`). Each
/// is the newest one of its file. Owned by the daemon's queue.
///
/// Nothing here may cost anybody anything: saves take the room that they need, and when memory gets short the images go,
/// the oldest first. An image is a copy that the daemon has made: the trainer's own buffer is used again for its next
/// save, is no file's image, and cannot be sealed while the trainer maps it.
import Dispatch
public import Posix
import Synchronization
import Wire

@DaemonActor
public final class SnapshotVault {
    /// Files that replace one another, or whose names differ only in their tags, are one series. Only the newest file
    /// of a series has an image.
    enum Series: Hashable, Sendable {
        case checkpoint(directory: ByteName, beginning: ByteName, end: ByteName, rank: Int)
        case file(PathKey)

        /// - Parameter directory: of the file.
        init(_ target: Snapshot.Target, in directory: String, rank: Int) {
            self = .checkpoint(
                directory: ByteName(directory), beginning: ByteName(target.beginning), end: ByteName(target.end),
                rank: rank)
        }
    }

    /// An image, from its first byte until it is given up.
    public final class Draft: Sendable {
        let byteCount: UInt64
        let series: Series
        fileprivate let session: String
        /// `old`: whose memory it may use.
        private let state: Mutex<(image: MemoryImage?, old: MemoryImage?, isOver: Bool)>

        fileprivate init(_ series: Series, _ byteCount: UInt64, session: String, reusing old: MemoryImage?) {
            self.series = series
            self.byteCount = byteCount
            self.session = session
            state = Mutex((nil, old, false))
        }

        /// On a disk queue, when the file is written. The same one for each try.
        /// - Returns: nil if memory is short.
        func begin() -> MemoryImage? {
            state.withLock { state in
                if state.isOver { return nil }
                if let image = state.image { return image.isGood ? image : nil }
                let old = state.old
                state.old = nil
                let fresh = Int64(byteCount) - Int64(old?.byteCount ?? 0)
                // guard: image-needs-room (never)
                if fresh > 0, (MemoryRoom.read() ?? -1) < fresh {
                    old?.giveUp()
                    state.isOver = true
                    return nil
                }
                state.image = try? MemoryImage(byteCount: byteCount, reusing: old)
                return state.image
            }
        }

        fileprivate var made: MemoryImage? { state.withLock { $0.image?.isGood == true ? $0.image : nil } }

        fileprivate func giveUp() {
            let found = state.withLock { state in
                defer { state.old = nil }
                state.isOver = true
                return state.image ?? state.old
            }
            found?.giveUp()
        }
    }

    private struct Kept {
        let draft: Draft
        var series: Series
        let image: MemoryImage
        let stamp: FileStamp
        /// When its writer was last known to be there, in monotonic seconds.
        var seenSeconds: Double
        /// The writer has said that it ends.
        var hasEnded = false
    }

    /// In bytes; 0: none are made.
    public let limit: UInt64
    private var saves: @DaemonActor () -> UInt64 = { 0 }
    private var savesLimit = UInt64.max
    /// The oldest first.
    private var kept: [Kept] = []
    private var making: [Draft] = []
    private var isWatching = false
    /// The sessions that are connected.
    public var livingSessions: @DaemonActor () -> Set<String> = { [] }
    /// Hears of images that were given up because memory is short: how many, and their bytes.
    public var hasGivenUp: @DaemonActor (Int, UInt64) -> Void = { _, _ in }

    public private(set) var byteCount: UInt64 = 0
    public var count: Int { kept.count }
    /// Questions that were answered with an image, and all others.
    public private(set) var given: UInt64 = 0
    public private(set) var missed: UInt64 = 0
    /// Given up because memory was short.
    public private(set) var givenUp: UInt64 = 0

    /// Smaller files are read from storage as fast.
    nonisolated static let leastByteCount: UInt64 = 1 << 20
    nonisolated static let images = 256
    /// How often memory is looked at: before anybody can have taken what is left, at this many bytes a second.
    private static let lookSeconds = 0.05...1.0
    private static let takenPerSecond = 8e9
    /// How long an image stays when the process that saved the file has died, or has ended as it should.
    private static let keptSeconds = (died: 1800.0, ended: 60.0)
    private static let queue = DispatchQueue(label: "noether-writer.memory")

    public nonisolated init(limit: UInt64) { self.limit = limit }

    /// Images and saves share the memory of saves.
    func attach(to budget: SnapshotBudget) {
        savesLimit = budget.limit
        saves = { [unowned budget] in budget.held }
        budget.isTaken = { [weak self] in self?.makeRoom(for: 0) }
    }

    private var allowed: UInt64 {
        let held = saves()
        return min(limit, savesLimit - min(held, savesLimit))
    }

    // MARK: Making one

    /// A file is about to be written. Its older image goes: the save is with the daemon, and whoever loads the file waits
    /// for it.
    /// - Returns: nil if there is no room, also without all others.
    func begin(_ series: Series, byteCount size: UInt64, session: String) -> Draft? {
        var old = take { $0.series == series }
        guard size >= Self.leastByteCount, size <= allowed else {
            old?.giveUp()
            return nil
        }
        let reused = old?.byteCount ?? 0
        while kept.count >= Self.images || byteCount - min(byteCount, reused) + size > allowed, let first = kept.first {
            let image = take { $0.draft === first.draft }
            if old == nil { old = image } else { image?.giveUp() }
        }
        guard byteCount + size <= allowed else {
            old?.giveUp()
            return nil
        }
        let draft = Draft(series, size, session: session, reusing: old)
        making.append(draft)
        byteCount += size
        watch()
        return draft
    }

    /// Removes those from the list; the memory of the largest that nobody else has is left for the next image.
    private func take(where isTaken: (Kept) -> Bool) -> MemoryImage? {
        let taken = kept.filter(isTaken)
        kept.removeAll(where: isTaken)
        let largest = taken.filter(\.image.isUnshared).max { $0.image.byteCount < $1.image.byteCount }
        for each in taken {
            byteCount -= each.draft.byteCount
            if each.image !== largest?.image { each.image.giveUp() }
        }
        return largest?.image
    }

    /// The file is durable.
    /// - Parameter stamp: of the file, after all that the daemon does to it.
    func keep(_ draft: Draft?, _ stamp: FileStamp?) {
        guard let draft, let index = making.firstIndex(where: { $0 === draft }) else { return }
        guard let stamp, stamp.showsChanges, let image = draft.made else { return drop(draft) }
        image.end(at: stamp.byteCount)
        guard image.isGood else { return drop(draft) }
        making.remove(at: index)
        // If two were made at the same time, the later one stays.
        for older in kept where older.series == draft.series || older.stamp.identity == stamp.identity {
            remove(older.draft)
        }
        kept.append(
            Kept(
                draft: draft, series: draft.series, image: image, stamp: stamp, seenSeconds: Clock.monotonicSeconds))
    }

    /// The file was not written, or not by this draft.
    func drop(_ draft: Draft?) {
        guard let draft, let index = making.firstIndex(where: { $0 === draft }) else { return }
        making.remove(at: index)
        byteCount -= draft.byteCount
        draft.giveUp()
    }

    private func remove(_ draft: Draft) {
        guard let index = kept.firstIndex(where: { $0.draft === draft }) else { return }
        byteCount -= draft.byteCount
        kept.remove(at: index).image.giveUp()
    }

    /// These files are gone.
    func forget(within path: AbsolutePath, of root: OwnedFD.Identity) {
        for each in kept {
            if case .file(let key) = each.series, key.root == root, key.path.isWithin(path) { remove(each.draft) }
        }
    }

    /// A directory has got another name.
    func rename(_ from: AbsolutePath, to: AbsolutePath, of root: OwnedFD.Identity) {
        forget(within: to, of: root)
        for index in kept.indices {
            guard case .file(let key) = kept[index].series, key.root == root, key.path.isWithin(from),
                let path = try? AbsolutePath(to.text + key.path.text.dropFirst(from.text.count))
            else { continue }
            kept[index].series = .file(PathKey(root: root, path: path))
        }
    }

    // MARK: Giving one

    /// - Parameter answer: gets a descriptor of the image, or nil if there is none of this file as it is now.
    public func give(
        _ stamp: FileStamp, _ answer: @escaping @Sendable @DaemonActor (OwnedFD?) -> Void
    ) {
        // guard: image-of-this-very-file (never: $0.stamp != stamp)
        let stale = kept.first { $0.stamp.identity == stamp.identity && $0.stamp != stamp }
        if let stale { remove(stale.draft) }
        guard let found = kept.first(where: { $0.stamp.identity == stamp.identity }) else {
            missed += 1
            return answer(nil)
        }
        found.image.share { fd in
            DaemonActor.enter {
                if fd == nil { self.missed += 1 } else { self.given += 1 }
                answer(fd)
            }
        }
    }

    // MARK: Making room

    /// Gives up images, the oldest first, until there is room for so many bytes more.
    private func makeRoom(for size: UInt64) {
        while byteCount + size > allowed, let first = kept.first?.draft ?? making.first {
            kept.contains { $0.draft === first } ? remove(first) : drop(first)
        }
    }

    /// As long as there are images.
    private func watch(room: Int64 = 0) {
        guard !isWatching else { return }
        isWatching = true
        let seconds = Double(room) / Self.takenPerSecond
        DaemonActor.enter(after: min(max(seconds, Self.lookSeconds.lowerBound), Self.lookSeconds.upperBound)) {
            Self.queue.async {
                let room = MemoryRoom.read() ?? 0
                DaemonActor.enter { self.look(room) }
            }
        }
    }

    private func look(_ room: Int64) {
        isWatching = false
        var missing = -room
        let before = (count: kept.count + making.count, bytes: byteCount)
        // guard: images-go-when-memory-is-short (never)
        while missing > 0, let first = kept.first?.draft ?? making.first {
            missing -= Int64(first.byteCount)
            kept.contains { $0.draft === first } ? remove(first) : drop(first)
        }
        if byteCount < before.bytes {
            let count = before.count - kept.count - making.count
            givenUp += UInt64(count)
            hasGivenUp(count, before.bytes - byteCount)
        }
        removeUnwanted()
        if !kept.isEmpty || !making.isEmpty { watch(room: room) }
    }

    private func removeUnwanted() {
        let living = kept.isEmpty ? [] : livingSessions()
        for each in kept where !living.contains(each.draft.session) {
            let seconds = each.hasEnded ? Self.keptSeconds.ended : Self.keptSeconds.died
            if Clock.monotonicSeconds - each.seenSeconds > seconds { remove(each.draft) }
        }
        for index in kept.indices where living.contains(kept[index].draft.session) {
            kept[index].seenSeconds = Clock.monotonicSeconds
        }
    }

    /// A connection has gone.
    /// - Parameter clean: it has said goodbye.
    public func left(_ session: String, clean: Bool) {
        for index in kept.indices where kept[index].draft.session == session { kept[index].hasEnded = clean }
    }

    /// For the next one of a trainer that has died.
    var isWaiting: Bool { kept.contains { !$0.hasEnded } }
}
