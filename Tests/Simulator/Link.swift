// SPDX-License-Identifier: Apache-2.0
/// A connection between a trainer and the daemon: messages in order, each way. What the daemon's end does with a
/// message is what `Connection` (Sources/Daemon) does with a frame: it hands it to the run.
import Posix
import SimulatedMachine
import Wire
import Writer

@DaemonActor
final class Link {
    enum Message {
        case open(OpenRun)
        case log(LogPayload)
        case save(SavePayload, OwnedFD)
        case finish(UInt64)
        case close
        case end
    }

    enum Answer {
        case opened(RunOpened)
        case refused(WireError)
        case ack(LogAck)
        case event(CheckpointEvent)
        case finished(Result<Finished, WireError>)
        case end
    }

    private let world: World
    private let daemon: SimulatedDaemon
    private weak var trainer: Trainer?
    private let session: Session
    private let peer: PeerCredentials
    private let token: UInt64
    private let toDaemon: Schedule.Lane
    private let toTrainer: Schedule.Lane

    // The daemon's end.
    private var run: Run?
    private var message: OpenRun?
    private var columns: [Int] = []
    private var isClosed = false
    private var closedCleanly = false
    // The trainer's end.
    private(set) var isCut = false

    init(_ world: World, _ daemon: SimulatedDaemon, _ trainer: Trainer, token: UInt64) {
        self.world = world
        self.daemon = daemon
        self.trainer = trainer
        self.token = token
        session = trainer.session
        peer = trainer.peer
        toDaemon = Schedule.Lane("to daemon \(token)", isDaemons: true, blocks: false)
        toTrainer = Schedule.Lane("to trainer \(token)", isDaemons: false, blocks: false)
    }

    // MARK: The trainer's end

    func send(_ message: Message) {
        guard !isCut else { return }
        world.schedule.add({ DaemonActor.assumeIsolated { self.handle(message) } }, to: toDaemon)
    }

    /// The trainer hears nothing more; what it has sent arrives.
    func hangUp() {
        guard !isCut else { return }
        send(.end)
        isCut = true
    }

    /// The daemon is dead: what it has said arrives, and what was said to it does not.
    func daemonDied() {
        isClosed = true
        give(.end)
    }

    private func give(_ answer: Answer) {
        world.schedule.add(
            {
                DaemonActor.assumeIsolated {
                    guard !self.isCut else { return }
                    self.trainer?.handle(answer, from: self)
                }
            }, to: toTrainer)
    }

    // MARK: The daemon's end

    private func answer(_ answer: Answer) {
        guard !isClosed else { return }
        give(answer)
    }

    private func handle(_ message: Message) {
        guard !isClosed else { return }
        switch message {
        case .open(let message): open(message)
        case .log(let payload): log(payload)
        case .save(let payload, let fd): save(payload, fd)
        case .finish(let sequence): finish(sequence)
        case .close: closedCleanly = true
        case .end:
            isClosed = true
            daemon.links.removeAll { $0 === self }
            run?.detach(rank: session.rank, connection: token, clean: closedCleanly, keepsJournal: false)
        }
    }

    private func open(_ message: OpenRun) {
        guard let name = try? RunName(message) else { return world.model.violate("a run's name is refused") }
        self.message = message
        let (world, session) = (world, session)
        daemon.runs.open(name, message, root: nil, peer: peer) { result in
            switch result {
            case .failure(let error): self.answer(.refused(error))
            case .success(let run):
                guard !self.isClosed else {
                    return run.detach(
                        rank: session.rank, connection: self.token, clean: false, keepsJournal: false)
                }
                self.run = run
                run.opened(
                    message, on: self.token,
                    acknowledge: { ack in
                        world.schedule.note(
                            "ack \(ack.sequence) durable \(ack.durableUpdate ?? -1) of session \(session.index)")
                        world.model.acknowledged(session, ack)
                        self.answer(.ack(ack))
                    }
                ) { opened in
                    self.columns = (try? run.log.columns(for: Trainer.keys)) ?? []
                    self.answer(.opened(opened))
                }
            }
        }
    }

    private func log(_ payload: LogPayload) {
        guard let run else { return world.model.violate("a log before its run") }
        do throws(WireError) {
            try run.log.append(payload, columnIDs: payload.keyIDs.map { columns[Int($0)] }, session: session.name)
        } catch {
            // Its connection has not heard yet that a newer session has the log.
            guard error.code != .logTakenOver else { return }
            world.model.violate("an update of session \(session.index) is refused: \(error.message)")
        }
    }

    private func save(_ payload: SavePayload, _ fd: OwnedFD) {
        guard let run else { return world.model.violate("a save before its run") }
        let (world, session) = (world, session)
        do throws(WireError) {
            try run.save(
                payload, fd: fd, session: session.name, rank: session.rank, connection: token
            ) { [weak self] event in
                world.daemonSays(event, of: session)
                self?.answer(.event(event))
            }
        } catch {
            var failed = CheckpointEvent(.failed, sequence: payload.sequence)
            failed.error = ErrorMessage(error, sequence: payload.sequence)
            answer(.event(failed))
            var released = CheckpointEvent(.released, sequence: payload.sequence)
            released.buffer = payload.buffer
            answer(.event(released))
        }
    }

    private func finish(_ sequence: UInt64) {
        guard let run else { return world.model.violate("a finish before its run") }
        let (world, session) = (world, session)
        let frames = session.frames.count { $0.sequence < sequence }
        do throws(WireError) {
            try run.finish(session: session.name) { [weak self] result in
                if case .success(let finished) = result, finished.entriesPath != nil {
                    world.finished(session, frames: frames)
                }
                self?.answer(.finished(result))
            }
        } catch { answer(.finished(.failure(error))) }
    }
}
