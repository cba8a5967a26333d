// SPDX-License-Identifier: Apache-2.0
/// Which runs are being written, so that a daemon finds what one before it left after a crash or a reboot: one small file each, in the state
/// directory, named after the journal's directory and holding its path. A lock on the journal itself says whether a living daemon
/// has it, so several daemons of one user may share the directory.
import Posix
import Synchronization
import Wire

final class RunRegistry: Sendable {
    let path: String
    /// Who in this daemon wants a directory noted down. The lock is held while a file is made or removed: one that
    /// somebody finds to have no journal may be just about to get one.
    private let wanted = Mutex<[ByteName: Set<ObjectIdentifier>]>([:])

    init(path: String) { self.path = path }

    /// Directories with journals that this host's daemons have left or hold, and why others are not among them: storage
    /// would not say which ones these are.
    func all() throws(PosixError) -> (found: [String], problem: PosixError?) {
        // Once in a daemon's life: one before it may have made the directory, and died before that was durable.
        let directory = try open(syncs: true)
        var found: [String] = []
        var problem: PosixError?
        for name in try directory.names() where name.begins(with: prefix) {
            do throws(PosixError) {
                let text = try TextFile.read("\(path)/\(name)")
                if text.begins(with: "/") { found.append(text) }
            } catch {
                // Another daemon may just have removed it.
                if !error.isMissing { problem = error }
            }
        }
        return (found, problem)
    }

    /// What daemons on other hosts have noted down: of nodes that share the home directory, and of containers that had
    /// another host name before they were started again.
    func foreign() throws(PosixError) -> [(tracker: String, note: String)] {
        var found: [(String, String)] = []
        for name in try open().names() where name.begins(with: "run-") && !name.begins(with: prefix) {
            guard let text = try? TextFile.read("\(path)/\(name)"), text.begins(with: "/") else { continue }
            found.append((text, name))
        }
        return found
    }

    /// What another host's daemon has noted down is this one's from now on.
    func adopt(_ tracker: String, note: String) throws(PosixError) {
        try add(tracker)
        try? open().remove(note)
    }

    /// Blocks.
    func add(_ tracker: String) throws(PosixError) {
        try wanted.withLock { _ throws(PosixError) in try write(tracker) }
    }

    /// Blocks.
    /// - Parameter isStill: whether it is wanted when its turn comes.
    fileprivate func add(
        _ tracker: String, for registration: Registration, if isStill: () -> Bool
    ) throws(PosixError) {
        let id = ObjectIdentifier(registration)
        try wanted.withLock { wanted throws(PosixError) in
            // A run that has ended meanwhile has nothing left to find.
            // guard: journal-registered (never)
            guard isStill(), wanted[ByteName(tracker)]?.contains(id) != true else { return }
            try write(tracker)
            wanted[ByteName(tracker), default: []].insert(id)
        }
    }

    /// Blocks. What stays behind is found, empty, by the next daemon.
    fileprivate func remove(_ tracker: String, for registration: Registration, unless isStill: () -> Bool) {
        wanted.withLock { wanted in
            guard !isStill() else { return }
            wanted[ByteName(tracker)]?.remove(ObjectIdentifier(registration))
            guard wanted[ByteName(tracker)]?.isEmpty ?? true else { return }
            wanted[ByteName(tracker)] = nil
            for _ in 0..<3 {
                if (try? erase(tracker)) != nil { break }
                Clock.sleep(0.05)
            }
        }
    }

    /// A directory in which nothing was found. One that a run of this daemon wants stays. Blocks.
    func removeUnlessWanted(_ tracker: String) throws(PosixError) {
        try wanted.withLock { wanted throws(PosixError) in
            if wanted[ByteName(tracker)] == nil { try erase(tracker) }
        }
    }

    private func write(_ tracker: String) throws(PosixError) {
        let directory = try open()
        try DurableFile.write(name(of: tracker), bytes: Array(tracker.utf8), in: directory)
    }

    private func erase(_ tracker: String) throws(PosixError) {
        let directory = try open()
        do { try directory.remove(name(of: tracker)) } catch {
            if !error.isMissing { throw error }
        }
    }

    /// This user's alone.
    private func open(syncs: Bool = false) throws(PosixError) -> Directory {
        try Directory.openOrCreateRoot(path, mode: 0o700, mask: 0o077, syncs: syncs)
    }

    /// A home directory may be shared by many nodes.
    private var prefix: String { "run-\(ThisProcess.hostName.replacing("/", with: "_"))-" }

    /// FNV-1a, 64 bits: short, and the same in every process.
    private func name(of tracker: String) -> String {
        var hash: UInt64 = 0xCBF2_9CE4_8422_2325
        for byte in tracker.utf8 {
            hash ^= UInt64(byte)
            hash = hash &* 0x100_0000_01B3
        }
        return prefix + String(hash, radix: 16)
    }
}

/// One run's place in the registry. There before anything is written, away when nothing is left to find. The files are made and
/// removed on disk queues, in any order: what counts is whether the run is wanted then.
final class Registration: Sendable {
    let registry: RunRegistry
    private let isWanted = Atomic(true)

    init(_ registry: RunRegistry) { self.registry = registry }

    func want(_ wanted: Bool) { isWanted.store(wanted, ordering: .sequentiallyConsistent) }

    /// Blocks.
    func add(_ tracker: String) throws(PosixError) {
        try registry.add(tracker, for: self) { isWanted.load(ordering: .sequentiallyConsistent) }
    }

    /// Blocks.
    func removeUnlessWanted(_ tracker: String) {
        registry.remove(tracker, for: self) { isWanted.load(ordering: .sequentiallyConsistent) }
    }
}
