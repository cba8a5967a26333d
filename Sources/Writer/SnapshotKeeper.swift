// SPDX-License-Identifier: Apache-2.0
/// Who keeps accepted snapshots where the daemon's death does not reach them: systemd's fd store, or nobody.
public import Posix
public import Wire

@DaemonActor
public protocol SnapshotKeeper: Sendable {
    /// - Parameters:
    ///   - brought: who brings the run.
    ///   - root: the run's output root, if its path leads elsewhere in this process's mount namespace.
    ///
    /// Calls back once the snapshot is kept, or can't be. Then the client hears `accepted`.
    func keep(
        _ snapshot: Snapshot, _ payload: SavePayload, of run: RunName, root: OwnedFD?, brought: RunIdentity?,
        session: String, rank: Int, peer: PeerCredentials,
        done: @escaping @Sendable @DaemonActor () -> Void)
    /// Calls back with whether nobody will be given this snapshot any more.
    func forget(
        _ snapshot: Snapshot, session: String, done: @escaping @Sendable @DaemonActor (_ isForgotten: Bool) -> Void
    )
}

/// Without a service manager: what is accepted lives as long as the daemon and its trainer.
public struct NoKeeper: SnapshotKeeper {
    public nonisolated init() {}
    public func keep(
        _ snapshot: Snapshot, _ payload: SavePayload, of run: RunName, root: OwnedFD?, brought: RunIdentity?,
        session: String, rank: Int, peer: PeerCredentials,
        done: @escaping @Sendable @DaemonActor () -> Void
    ) { done() }
    public func forget(
        _ snapshot: Snapshot, session: String, done: @escaping @Sendable @DaemonActor (Bool) -> Void
    ) { done(true) }
}
