/// The daemon's runs: the live ones, and the last ended ones for `status`. Owned by the intake queue.
public import Posix
public import Wire

@Intake
public final class RunStore {
    private let disks: DiskQueues
    private var runs: [RunName: Run] = [:]
    /// Names in order of opening, for listing and forgetting.
    private var order: [RunName] = []

    public nonisolated init(diskQueues: Int) { disks = DiskQueues(count: diskQueues) }

    public var all: [Run] { order.compactMap { runs[$0] } }
    public var isIdle: Bool { runs.values.allSatisfy { $0.isIdle && !$0.isLive } }

    /// Opens the run's directories on a disk queue, then answers on the intake queue with the run attached.
    public func open(
        _ name: RunName, _ message: OpenRun, peer: PeerCredentials,
        completion: @escaping @Sendable @Intake (Result<Run, WireError>) -> Void
    ) {
        if let held = runs[name], held.isLive, held.peer.pid != peer.pid, (message.rank ?? 0) == 0 {
            return completion(
                .failure(
                    WireError(
                        .runInUse,
                        "run \(name.runID) is held by process \(held.peer.pid) on \(held.node); end that one, or choose another run id"
                    )))
        }
        disks.run({ () -> Result<Directories, PosixError> in
            do throws(PosixError) {
                var directory = try Directory.openOrCreateRoot(name.outputRoot)
                for component in name.components { directory = try directory.child(component) }
                let tracker = try directory.child("tracker")
                if let config = message.configYaml {
                    try DurableFile.write("config.yaml", text: config, in: tracker)
                }
                return .success(
                    Directories(checkpoints: try directory.child("checkpoints"), tracker: tracker))
            } catch { return .failure(error) }
        }) { result in
            switch result {
            case .failure(let error):
                completion(.failure(WireError(.badPath, error.description, errno: error.errno)))
            case .success(let directories):
                let run =
                    self.runs[name]
                    ?? Run(name: name, disks: self.disks, peer: peer, node: message.node ?? "")
                run.peer = peer
                if self.runs.updateValue(run, forKey: name) == nil { self.order.append(name) }
                self.forgetOldRuns()
                run.attach(session: message.session, bringsLog: message.log ?? true, directories: directories)
                completion(.success(run))
            }
        }
    }

    private func forgetOldRuns() {
        guard order.count > Limits.endedRunsRemembered,
            let index = order.firstIndex(where: { runs[$0].map { !$0.isLive && $0.isIdle } ?? true })
        else { return }
        runs[order.remove(at: index)] = nil
    }
}
