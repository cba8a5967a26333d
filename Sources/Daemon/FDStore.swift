// SPDX-License-Identifier: Apache-2.0
/// Accepted snapshots in systemd's fd store: the client's memfd, and beside it a sealed note that says whose it is, and
/// the
/// output root if this daemon could not find it by its path. A
/// daemon that is killed finds both when it is started again, and writes what its predecessor had accepted.
import FoundationEssentials
package import Posix
package import Wire
package import Writer

/// Who keeps descriptors for the next daemon.
package protocol DescriptorKeeper: Sendable {
    /// Calls back once they are kept, or can't be.
    @DaemonActor func store(_ fds: [OwnedFD], name: String, done: @escaping @Sendable @DaemonActor () -> Void)
    /// Calls back with whether nobody will be given them any more.
    @DaemonActor func remove(_ name: String, done: @escaping @Sendable @DaemonActor (Bool) -> Void)
    func remove(_ name: String)
}

package struct FDStore: SnapshotKeeper {
    private let service: any DescriptorKeeper
    private let lost: @Sendable @DaemonActor () -> Void
    private let held = Held()

    /// The entries of the store by name. A daemon that leaves names them in its last messages.
    @DaemonActor
    private final class Held {
        struct Entry {
            var paths: [String]
            /// Who sends it again to the next daemon, if it lives by then.
            var trainer: PeerProcess
        }
        var entries: [String: Entry] = [:]
    }

    /// - Parameter lost: hears of each snapshot that can't be restored.
    package init(_ service: any DescriptorKeeper, lost: @escaping @Sendable @DaemonActor () -> Void = {}) {
        self.service = service
        self.lost = lost
    }

    struct Note: Codable, Sendable {
        var run: RunIdentity
        var pid: Int32
        var pidStart: UInt64
        /// When it was accepted, in monotonic seconds: files of several processes come in this order.
        var acceptedAt: Double?
        /// The payload of the `save` frame.
        var payload: Data
    }

    /// The files of snapshots that nobody but the store has, by name: their trainers have ended.
    package var orphans: [String: [String]] { held.entries.filter { $0.value.trainer.hasEnded }.mapValues(\.paths) }

    private func hold(_ name: String, _ payload: SavePayload, in directory: String, _ trainer: PeerProcess) {
        let targets = payload.targets.map { "\(directory)/checkpoints/\($0.fileName)" }
        held.entries[name] = Held.Entry(paths: targets + payload.files.map(\.path), trainer: trainer.noted)
    }

    /// How many descriptors of the store a snapshot needs, including one for its output root.
    nonisolated static let descriptorsPerSnapshot = 3

    private static func name(_ session: String, _ sequence: UInt64) -> String {
        "\(ServiceManager.keptPrefix)\(session)-\(sequence)"
    }

    package func keep(
        _ snapshot: Snapshot, _ payload: SavePayload, of run: RunName, root: OwnedFD?, brought: RunIdentity?,
        session: String, rank: Int, peer: PeerCredentials,
        done: @escaping @Sendable @DaemonActor () -> Void
    ) {
        do {
            let note = Note(
                run: RunIdentity(run, session: session, rank: rank, like: brought), pid: peer.pid,
                pidStart: peer.process.startTicks ?? 0, acceptedAt: Clock.monotonicSeconds,
                payload: Data(try payload.encoded()))
            let fd = try SealedNote.make(JSONPayload.encode(note))
            // A store keeps one that it has already only once, under its first name, and forgets it together with that.
            let ownRoot = try root.map { root throws(PosixError) in try root.reopenedDirectory() }
            let name = Self.name(session, snapshot.sequence)
            hold(name, payload, in: run.directory, peer.process)
            service.store([snapshot.descriptor, fd] + (ownRoot.map { [$0] } ?? []), name: name, done: done)
        } catch {
            Log.write(.warning, "a snapshot is not in the fd store: \(error)", ["RUN_ID": run.runID])
            done()
        }
    }

    package func forget(
        _ snapshot: Snapshot, session: String, done: @escaping @Sendable @DaemonActor (Bool) -> Void
    ) {
        let name = Self.name(session, snapshot.sequence)
        held.entries[name] = nil
        service.remove(name, done: done)
    }

    /// Hands what a predecessor left to the runs; what can't be read is dropped, and said.
    package func restore(
        _ kept: [String: [OwnedFD]], into runs: RunStore, _ completion: @escaping @Sendable @DaemonActor () -> Void
    ) {
        var waitedFor = Set(kept.keys)
        guard !waitedFor.isEmpty else { return completion() }
        func waitsNoMore(for name: String) {
            guard waitedFor.remove(name) != nil else { return }
            if waitedFor.isEmpty { completion() }
        }
        func ended(_ name: String, _ problem: String?) {
            if let problem {
                Log.write(.error, "a checkpoint of a daemon before this one is lost: \(name): \(problem)")
                held.entries[name] = nil
                service.remove(name)
                lost()
            }
            waitsNoMore(for: name)
        }
        var found: [(name: String, note: Note, payload: SavePayload, fd: OwnedFD, root: OwnedFD?)] = []
        for (name, fds) in kept {
            do {
                let root = fds.first { (try? $0.status().isDirectory) == true }
                let memory = fds.filter { $0 !== root }
                guard memory.count == 2, let index = memory.firstIndex(where: { SealedNote.read($0) != nil }),
                    let bytes = SealedNote.read(memory[index])
                else {
                    ended(name, "\(fds.count) descriptors, and no note among them")
                    continue
                }
                let note = try JSONPayload.decode(Note.self, from: bytes)
                found.append((name, note, try SavePayload(decoding: Array(note.payload)), memory[1 - index], root))
            } catch { ended(name, "\(error)") }
        }
        let files = found.filter { $0.note.run.layout == OpenRun.filesLayout }
        for (name, note, payload, fd, root) in files.sorted(by: {
            ($0.note.acceptedAt ?? 0) < ($1.note.acceptedAt ?? 0)
        }) {
            do throws(WireError) {
                hold(name, payload, in: "", peer(of: note).process)
                try runs.paths.restore(payload, fd: fd, of: note.run, root: root, peer: peer(of: note))
                waitsNoMore(for: name)
            } catch { ended(name, error.message) }
        }
        found.removeAll { $0.note.run.layout == OpenRun.filesLayout }
        // Session by session, and of one in order of their numbers, so that an older `latest` does not come after a
        // newer one.
        var begins: [String: Double] = [:]
        for (_, note, _, _, _) in found {
            begins[note.run.session] = min(begins[note.run.session] ?? .infinity, note.acceptedAt ?? 0)
        }
        found.sort {
            (begins[$0.note.run.session] ?? 0, $0.note.run.session, $0.payload.sequence)
                < (begins[$1.note.run.session] ?? 0, $1.note.run.session, $1.payload.sequence)
        }
        // guard: fd-store-in-order (= Array(found.reversed()) for found)
        for (name, note, payload, fd, root) in found {
            do throws(WireError) {
                let directory = try RunName(note.run).directory
                hold(name, payload, in: directory, peer(of: note).process)
                var snapshot = try Snapshot(payload, in: "\(directory)/checkpoints", fd: fd)
                snapshot.acceptedAt = note.acceptedAt.map { Clock.wallSeconds - (Clock.monotonicSeconds - $0) }
                let isQueued = runs.restore(
                    snapshot, of: note.run, root: root, peer: peer(of: note)
                ) { ended(name, $0?.message) }
                // Behind its run's log, as everybody who opens that run.
                if isQueued { waitsNoMore(for: name) }
            } catch { ended(name, error.message) }
        }
    }
    private func peer(of note: Note) -> PeerCredentials {
        PeerCredentials(process: PeerProcess(pid: note.pid, startTicks: note.pidStart), uid: ThisProcess.userID)
    }
}
