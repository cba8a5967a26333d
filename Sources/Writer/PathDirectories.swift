// SPDX-License-Identifier: Apache-2.0
/// The directories of files at any path: opened by their names for each piece of work, and looked at once more after it,
/// so that nothing is called durable in a directory that its name no longer leads to. Used on disk queues; all of it
/// blocks.
import Posix
import Synchronization
import Wire

/// Counted on a disk queue, read on the daemon's queue.
final class Moved: Sendable {
    private let number = Atomic<UInt64>(0)
    var count: UInt64 { number.load(ordering: .relaxed) }
    func add() { number.wrappingAdd(1, ordering: .relaxed) }
}

final class PathDirectories: Sendable {
    private struct Known: Hashable {
        let birth: [Int64]
        let path: ByteName
    }

    /// Those that were used before, under these names, and cleared of what a daemon before this one has left.
    private let known = Mutex<Set<Known>>([])

    /// In a directory that gets another name: by which commit.
    private static let commitAttribute = "user.noether_writer.commit"
    private static let triesAtOnce = 3

    /// Does what has to be done in the directory of a file, which its name leads to before and after.
    /// - Parameters:
    ///   - device: on which the directory was when its trainer named it.
    ///   - work: may be done again.
    func use<T>(
        _ path: AbsolutePath, of root: PathRoot, mask: UInt32, device: UInt64?,
        _ work: (Directory) throws(PosixError) -> T
    ) throws(PosixError) -> T {
        for _ in 0..<Self.triesAtOnce {
            let directory = try find(path, of: root, mask: mask, device: device)
            let result: T
            do throws(PosixError) { result = try work(directory) } catch {
                // Who removes a directory removes first what is in it: the file on its way too.
                if leads(path, of: root, to: directory), !error.isMissing { throw error }
                continue
            }
            if leads(path, of: root, to: directory) { return result }
        }
        throw PosixError.missing("write \(path.text), whose directory is being removed or moved").asRetryable
    }

    private func leads(_ path: AbsolutePath, of root: PathRoot, to directory: Directory) -> Bool {
        (try? Directory.open(path.directory, below: root.fd))?.isSame(as: directory) ?? false
    }

    private func find(
        _ path: AbsolutePath, of root: PathRoot, mask: UInt32, device: UInt64?
    ) throws(PosixError) -> Directory {
        let found: Directory
        do throws(PosixError) { found = try Directory.open(path.directory, below: root.fd, mask: mask) } catch {
            guard error.isMissing else { throw error }
            // guard: files-mount-gone (never)
            if let device, let above = nearest(path, of: root), above.device != device {
                throw PosixError.missing("write \(path.text), which is gone with its file system").asRetryable
            }
            throw PosixError.missing("write \(path.text), whose directory was removed after the save had begun")
        }
        // A mount is gone, and what is below its mount point is there again.
        if let device, found.device != device, let above = try parent(of: path, root), above.device == found.device {
            throw PosixError.missing("write \(path.text), which is gone with its file system").asRetryable
        }
        try prepare(found)
        return found
    }

    /// nil if there is none. Storage that does not say so throws.
    private func parent(of path: AbsolutePath, _ root: PathRoot) throws(PosixError) -> Directory? {
        guard let above = path.way.dropFirst(2).first else { return nil }
        do throws(PosixError) { return try Directory.open(above.text, below: root.fd) } catch {
            if error.isMissing { return nil }
            throw error
        }
    }

    /// Of the directories above, the first one that is there.
    private func nearest(_ path: AbsolutePath, of root: PathRoot) -> Directory? {
        for above in path.way.dropFirst() {
            if let found = try? Directory.open(above.text, below: root.fd) { return found }
        }
        return nil
    }

    /// The first time, what a writer that has died left goes, and the way to the directory becomes durable.
    private func prepare(_ directory: Directory) throws(PosixError) {
        let this = directory.birth.map { Known(birth: $0, path: ByteName(directory.path)) }
        if let this, known.withLock({ $0.contains(this) }) { return }
        try directory.syncWay()  // guard: files-way-is-synced (skip)
        try DurableFile.removeLeftovers(in: directory)
        guard let this else { return }
        known.withLock {
            if $0.count >= Limits.pathsRemembered { $0 = [] }
            $0.insert(this)
        }
    }

    /// What is not there is removed already, also with its directory.
    func remove(
        _ path: AbsolutePath, of root: PathRoot, recursively: Bool, _ moved: Moved
    ) throws(PosixError) {
        guard let name = path.name else { throw PosixError.invalid("remove \(path.text)") }
        let directory: Directory
        do throws(PosixError) { directory = try Directory.open(path.directory, below: root.fd) } catch {
            if error.isMissing { return }
            throw error
        }
        try Faults.reach("path.remove")
        if try directory.remove(name, recursively: recursively, depth: Limits.directoryDepth, removed: moved.add) {
            try directory.sync()
        }
    }

    /// A directory with all that is in it gets another name, durably.
    ///
    /// The directory says by an attribute which commit it is that gives it the name: so a commit that is asked again,
    /// because its daemon died in the middle, knows what is done already. It matters if another directory has the name,
    /// since an exchange that is done twice is undone.
    /// - Returns: a file that is missing; then nothing was done.
    func commit(
        _ from: AbsolutePath, to: AbsolutePath, of root: PathRoot, replaces: Bool, files: [String], mark: String,
        _ moved: Moved
    ) throws(PosixError) -> String? {
        guard let name = from.name, let newName = to.name else { throw PosixError.invalid("rename \(from.text)") }
        let target = try Directory.open(to.directory, below: root.fd)
        let source: Directory
        do throws(PosixError) { source = try Directory.open(from.directory, below: root.fd) } catch {
            guard error.isMissing, try target.attribute(Self.commitAttribute, of: newName) == mark else { throw error }
            try target.sync()
            return nil
        }
        // guard: files-commit-once (= "user.none" for Self.commitAttribute)
        if try target.attribute(Self.commitAttribute, of: newName) != mark {
            guard source.isDirectory(name) else {
                throw PosixError.missing("rename \(from.text) to \(to.text), since the first one is no directory")
            }
            let directory = try source.child(name, create: false)
            // guard: files-commit-of-a-missing-file (never)
            if let missing = files.first(where: { !directory.hasFile($0) }) { return missing }
            try source.syncTree(name, depth: Limits.directoryDepth, synced: moved.add)
            try prepare(target)
            let isMarked = try source.setAttribute(Self.commitAttribute, of: name, to: mark)
            try Faults.reach("commit.marked")
            try rename(name, of: source, to: newName, in: target, replaces: replaces, isMarked: isMarked)
            try Faults.reach("commit.renamed")
            try target.sync()
            try source.sync()
        }
        // What had the name before has the other one now.
        guard replaces, try source.attribute(Self.commitAttribute, of: name) != mark else { return nil }
        try Faults.reach("commit.durable")
        if try source.remove(name, recursively: true, depth: Limits.directoryDepth, removed: moved.add) {
            try source.sync()
        }
        return nil
    }

    private func rename(
        _ name: String, of source: Directory, to newName: String, in target: Directory, replaces: Bool, isMarked: Bool
    ) throws(PosixError) {
        do throws(PosixError) { return try source.rename(name, to: target, newName) } catch {
            guard error.isTaken else { throw error }
        }
        let (old, new) = ("\(source.path)/\(name)", "\(target.path)/\(newName)")
        guard replaces else { throw PosixError.alreadyExists("rename \(old) to \(new)") }
        guard target.isDirectory(newName) else {
            throw PosixError.alreadyExists("rename \(old) to \(new), which is no directory")
        }
        guard isMarked else {
            throw PosixError.alreadyExists(
                "rename \(old) over \(new) on a file system without extended attributes, where a commit that was interrupted "
                    + "could not be told from one that was not (remove the second one first)")
        }
        try source.rename(name, to: target, newName, exchanges: true)
    }
}
