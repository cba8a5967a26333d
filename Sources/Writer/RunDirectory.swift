// SPDX-License-Identifier: Apache-2.0
/// A run's own directory, and the two below it, held open while storage is well. Owned by whoever has the run; opened on disk queues.
///
/// A trainer's user may remove or move a directory of a run that lives. A name is what counts: before each use the held directory
/// is compared with what its name leads to, and what is missing is made anew; after it once more, so that nothing is called durable
/// in a directory that its name no longer leads to. After a refusal for another reason than room all is let go of, and opened anew
/// by its path for the next try: a file system that failed can be unmounted, and what is mounted then is used.
import Posix
import Synchronization

/// The directory that makes a run one run, whatever the spelling of its path: known by its identity, and locked for one daemon.
final class RunHome: Sendable {
    let path: String
    /// See `Directory.anchor`.
    let anchor: OwnedFD?
    private struct State {
        var directory: Directory?
        /// Holds the lock, where this daemon wants it.
        var lock: Directory?
        var wantsLock = false
        var identity: OwnedFD.Identity
    }
    private let reference: Directory.Reference
    private let state: Mutex<State>

    init(_ directory: Directory, isLocked: Bool) {
        path = directory.path
        anchor = directory.anchor
        reference = directory.reference
        state = Mutex(
            State(
                directory: directory, lock: isLocked ? directory : nil, wantsLock: isLocked,
                identity: directory.identity))
    }

    /// The identity that the directory had when it was last open.
    var identity: OwnedFD.Identity { state.withLock(\.identity) }
    var isLocked: Bool { state.withLock(\.wantsLock) }

    /// That one's lock is this one's from now on.
    func adoptLock(of other: RunHome) {
        guard let lock = other.state.withLock(\.lock) else { return }
        state.withLock {
            $0.wantsLock = true
            if $0.lock == nil, lock.identity == $0.identity { $0.lock = lock }
        }
    }

    /// What its name leads to. Blocks.
    /// - Returns: nil where somebody has removed it and it is not made anew.
    func find(creates: Bool) throws(PosixError) -> Directory? {
        let opened: Directory?
        do throws(PosixError) {
            opened = try reference.find(on: identity.device, creates: creates)
        } catch {
            // It was there: whatever it is, it may be there again.
            throw error.asRetryable
        }
        guard let found = opened else { return nil }
        return try state.withLock { state throws(PosixError) in
            if let held = state.directory, held.isSame(as: found) { return held }
            if state.wantsLock, state.lock.map({ !$0.isSame(as: found) }) ?? true {
                guard found.lock() else { throw PosixError.isHeld(path).asRetryable }
                state.lock = found
            }
            state.directory = found
            state.identity = found.identity
            return found
        }
    }

    func letGo() {
        state.withLock {
            $0.directory = nil
            $0.lock = nil
        }
    }
}

final class RunDirectory: Sendable {
    let path: String
    /// nil: it is the run's own.
    private let name: String?
    private let home: RunHome
    private struct State {
        var directory: Directory?
        var device: UInt64
        /// A file system of its own is mounted here.
        var isMount: Bool
    }
    private let held: Mutex<State>

    init(_ directory: Directory, named name: String, in home: RunHome) {
        path = directory.path
        self.name = name
        self.home = home
        held = Mutex(
            State(
                directory: directory, device: directory.device,
                isMount: directory.device != home.identity.device))
    }

    /// The run's own directory.
    init(_ home: RunHome) {
        (path, name, self.home) = (home.path, nil, home)
        held = Mutex(State(directory: nil, device: home.identity.device, isMount: false))
    }

    /// Where its work is queued: what it was on when it was last open.
    var place: DiskQueues.Place { .device(held.withLock(\.device)) }

    /// What its name leads to, made anew where somebody has removed it. Blocks.
    func open() throws(PosixError) -> Directory {
        guard let found = try find(creates: true) else { preconditionFailure("a directory that was made") }
        return found
    }

    /// - Returns: nil where somebody has removed it and it is not made anew.
    func find(creates: Bool) throws(PosixError) -> Directory? {
        guard let parent = try home.find(creates: creates) else { return nil }
        let before = held.withLock { $0 }
        guard let name else {
            held.withLock { $0 = State(directory: nil, device: parent.device, isMount: false) }
            return parent
        }
        let there: OwnedFD.Identity?
        do throws(PosixError) { there = try parent.identity(below: name) } catch { throw error.asRetryable }
        if let directory = before.directory, there == directory.identity { return directory }
        // As `Directory.Reference.find`: what was mounted here may be gone.
        let isRemoved = there == nil && parent.device == before.device
        if isRemoved, !creates { return nil }
        let found: Directory
        do throws(PosixError) {
            found = try parent.child(name, create: isRemoved)
            if before.isMount, found.device == parent.device {
                throw PosixError.missing("find \(path), which is gone with its file system")
            }
        } catch { throw error.asRetryable }
        held.withLock {
            $0 = State(
                directory: found, device: found.device, isMount: found.device != parent.device)
        }
        return found
    }

    /// Does what has to be done in the directory that the name leads to, before and after. Blocks.
    /// - Parameter work: may be done again.
    func use<T>(_ work: (Directory) throws(PosixError) -> T) throws(PosixError) -> T {
        for _ in 0..<Self.triesAtOnce {
            let directory = try open()
            let result: T
            do throws(PosixError) { result = try work(directory) } catch {
                // Who removes a directory removes first what is in it: the file on its way too.
                if leads(to: directory), !error.isMissing { throw error }
                continue
            }
            if leads(to: directory) { return result }  // guard: durable-where-the-path-leads (always)
        }
        throw PosixError.missing("write to \(path), which is being removed or moved").asRetryable
    }

    private static let triesAtOnce = 3

    /// Whether the name leads there now. Blocks.
    func leads(to directory: Directory) -> Bool {
        guard let parent = try? home.find(creates: false) else { return false }
        guard let name else { return parent.identity == directory.identity }
        return (try? parent.identity(below: name)) == directory.identity
    }

    func letGo() { held.withLock { $0.directory = nil } }

    /// Of the directory, as long as it is held open.
    var descriptor: OwnedFD? { held.withLock { $0.directory?.fd } }
}

struct Directories: Sendable {
    let home: RunHome
    let checkpoints: RunDirectory
    let tracker: RunDirectory
    /// The directory of the event files. TensorBoard shows a run under the name of this directory.
    let events: RunDirectory

    init(of directory: Directory, checkpoints: Directory, tracker: Directory, isLocked: Bool) {
        home = RunHome(directory, isLocked: isLocked)
        self.checkpoints = RunDirectory(checkpoints, named: "checkpoints", in: home)
        self.tracker = RunDirectory(tracker, named: "tracker", in: home)
        events = RunDirectory(home)
    }

    /// Deletes temporary files of daemons that crashed. Blocks.
    func removeLeftovers() throws(PosixError) {
        try DurableFile.removeLeftovers(in: tracker.open())
        try DurableFile.removeLeftovers(in: checkpoints.open())
    }

    func letGo() {
        home.letGo()
        checkpoints.letGo()
        tracker.letGo()
    }
}
