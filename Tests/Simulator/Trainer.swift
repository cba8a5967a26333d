// SPDX-License-Identifier: Apache-2.0
/// A trainer with its client library: it logs, saves, finishes, keeps what is not safe yet, and sends it again
/// after a reconnect. A model of the clients (Sources/NoetherWriterClient/Session.swift), with the same numbers and
/// the same order.
import Posix
import SimulatedMachine
import Wire
import Writer

@DaemonActor
final class Trainer {
    nonisolated static let keys = ["loss", "added"]

    private struct Save {
        let payload: SavePayload
        let memory: SharedMemory
        let files: [SavedFile]
        var isRefused = false
    }

    let world: World
    let run: Int
    let rank: Int
    let pid: Int32
    let startTicks: UInt64
    let session: Session
    private let resumeAt: Int64?
    private let lane: Schedule.Lane
    private var dice: Dice { world.dice }
    private var link: Link?
    private var isOpened = false
    /// The run was opened once: what was said at the first opening is not said again.
    private var wasOpened = false
    private var hasLostLog = false
    private var sequence: UInt64 = 0
    private var lastUpdate: Int64
    private var updatesLeft: Int
    private var kept: [(sequence: UInt64, payload: LogPayload)] = []
    private var saves: [UInt64: Save] = [:]
    private var finishSequence: UInt64?
    private var isFinished = false
    private let wantsFinish: Bool
    private let keepLast: Int?
    private(set) var isDead = false
    /// Everything it gave is safe, and it has said goodbye.
    private(set) var isDone = false

    init(_ world: World, run: Int, rank: Int, pid: Int32, resumeAt: Int64?) {
        self.world = world
        self.run = run
        self.rank = rank
        self.pid = pid
        startTicks = UInt64(world.schedule.steps) + 1
        session = world.model.newSession(run: run, rank: rank)
        self.resumeAt = resumeAt
        lastUpdate = resumeAt ?? 0
        updatesLeft = world.dice.among(1...40)
        wantsFinish = world.dice.chance(0.7)
        keepLast = world.keepLast
        lane = Schedule.Lane("trainer \(session.index)", isDaemons: false, blocks: false)
        later(0) { $0.connect() }
        later(world.dice.seconds(0...0.1)) { $0.train() }
    }

    var peer: PeerCredentials {
        PeerCredentials(process: PeerProcess(pid: pid, startTicks: startTicks), uid: ThisProcess.userID)
    }

    var words: String {
        "trainer \(session.index) (run \(run), rank \(rank)): \(updatesLeft) updates to go, \(kept.count) updates and \(saves.count) "
            + "saves kept, \(isOpened ? "connected" : "not connected"), \(isFinished ? "" : "not ")finished"
    }

    private func later(_ seconds: Double, _ work: @escaping @DaemonActor (Trainer) -> Void) {
        world.schedule.later(seconds, lane) {
            DaemonActor.assumeIsolated { if !self.isDead, !self.isDone { work(self) } }
        }
    }

    /// The connection is lost, and both live.
    func loseConnection() {
        guard let link else { return }
        link.hangUp()
        self.link = nil
        isOpened = false
        later(dice.chance(0.5) ? 0 : dice.seconds(0...0.5)) { $0.connect() }
    }

    func die() {
        isDead = true
        link?.hangUp()
        link = nil
    }

    // MARK: Training

    private func train() {
        if updatesLeft > 0 {
            updatesLeft -= 1
            lastUpdate += Int64(dice.chance(0.1) ? 3 : 1)
            if rank == 0 {
                log(key: 0)
                if dice.chance(0.15) { log(key: 1) }
            }
            if dice.chance(world.saveShare), saves.count < 20 { save() }
            return later(dice.chance(0.3) ? 0 : dice.seconds(0...world.updateSeconds)) { $0.train() }
        }
        guard wantsFinish else { return endIfDone() }
        sequence += 1
        finishSequence = sequence
        if isOpened { link?.send(.finish(sequence)) }
    }

    private func log(key: UInt32) {
        guard !hasLostLog else { return }
        sequence += 1
        let payload = LogPayload(
            sequence: sequence, update: lastUpdate, wallTime: Clock.wallSeconds, keyIDs: [key],
            values: [ScalarBits(session.value(ofFrame: session.frames.count))])
        world.schedule.note(
            "session \(session.index) logs frame \(session.frames.count): \(sequence), update \(lastUpdate), key \(key)"
        )
        session.frames.append((sequence, lastUpdate))
        kept.append((sequence, payload))
        if isOpened { link?.send(.log(payload)) }
    }

    private func save() {
        sequence += 1
        let directory = "\(world.model.runs[run])"
        let tags =
            dice.chance(0.4)
            ? ["latest"] : dice.chance(0.3) ? ["E1_U\(lastUpdate)_S1", "latest"] : ["E1_U\(lastUpdate)_S1"]
        var files: [SavedFile] = []
        let storageCount = 1 + dice.below(world.storageByteCount)
        let (first, updates) = (world.model.files.count + 1, rank == 0 ? lastUpdate : nil)
        let end = (UInt64(storageCount) + 63) / 64 * 64
        var offset = end
        var targets: [SavePayload.Target] = []
        for (index, tag) in tags.enumerated() {
            let id = world.model.files.count + 1
            let pickle = Model.pickle(id: id, target: index, count: dice.below(100))
            let target = SavePayload.Target(
                kind: .model, name: "net\(rank)", tag: tag, info: nil, pickleOffset: offset,
                pickleLength: UInt64(pickle.count))
            let file = SavedFile(
                id: id, session: session, sequence: sequence, target: index, directory: directory,
                name: target.fileName, tag: tag, logUpdate: updates, pickle: pickle,
                storage: Model.storage(id: first, count: storageCount))
            world.model.add(file)
            files.append(file)
            targets.append(target)
            offset += UInt64(pickle.count)
        }
        guard let memory = try? SharedMemory(capacity: Int(offset)) else { return world.model.violate("no memory") }
        files[0].storage.withUnsafeBytes { memory.bytes.copyMemory(from: $0) }
        for (target, file) in zip(targets, files) {
            file.pickle.withUnsafeBytes {
                UnsafeMutableRawBufferPointer(rebasing: memory.bytes[Int(target.pickleOffset)...]).copyMemory(from: $0)
            }
        }
        let payload = SavePayload(
            sequence: sequence, storageLengths: [UInt64(storageCount)], storagesLength: end, buffer: sequence,
            logUpdate: updates, targets: targets)
        saves[sequence] = Save(payload: payload, memory: memory, files: files)
        if isOpened { link?.send(.save(payload, memory.fd)) }
    }

    private func endIfDone() {
        guard updatesLeft == 0, !wantsFinish || isFinished, kept.isEmpty || hasLostLog, saves.isEmpty, isOpened
        else { return }
        isDone = true
        link?.send(.close)
        link?.hangUp()
        link = nil
        world.schedule.note("\(words): done")
    }

    // MARK: The connection

    private func connect() {
        guard link == nil else { return }
        guard let made = world.connect(self) else { return later(dice.seconds(0.05...1)) { $0.connect() } }
        link = made
        var message = OpenRun(
            outputRoot: world.outputRoot, runID: "run\(run)", stageName: nil, debug: false, session: session.name,
            log: rank == 0 && !hasLostLog, node: "node")
        message.rank = rank
        message.worldSize = 8
        message.umask = 0o022
        message.keepLast = keepLast
        if !wasOpened { message.resumeAt = resumeAt }
        made.send(.open(message))
    }

    func handle(_ answer: Link.Answer, from link: Link) {
        guard !isDead, !isDone, link === self.link else { return }
        switch answer {
        case .opened(let opened): handle(opened)
        case .refused:
            link.hangUp()
            self.link = nil
            later(dice.seconds(0.1...1)) { $0.connect() }
        case .ack(let ack):
            acknowledge(ack.sequence)
            endIfDone()
        case .event(let event): handle(event)
        case .finished(let result):
            switch result {
            case .success: isFinished = true
            case .failure(let error): world.model.violate("a finish is refused: \(error.message)")
            }
            endIfDone()
        case .end:
            self.link = nil
            isOpened = false
            later(dice.chance(0.5) ? 0 : dice.seconds(0...0.5)) { $0.connect() }
        }
    }

    private func acknowledge(_ sequence: UInt64) { kept.removeAll { $0.sequence <= sequence } }

    private func handle(_ opened: RunOpened) {
        if opened.log == false, rank == 0 { hasLostLog = true }
        wasOpened = true
        isOpened = true
        if opened.log == true { world.model.taken(session, opened.lastSequence) }
        acknowledge(opened.lastSequence)
        var messages = kept.map { ($0.sequence, Link.Message.log($0.payload)) }
        if hasLostLog { messages = [] }
        // The end of a refusal was lost with its connection.
        for sequence in saves.keys { saves[sequence]?.isRefused = false }
        messages += saves.map { ($0.key, .save($0.value.payload, $0.value.memory.fd)) }
        for (_, message) in messages.sorted(by: { $0.0 < $1.0 }) { link?.send(message) }
        if let finishSequence, !isFinished { link?.send(.finish(finishSequence)) }
        endIfDone()
    }

    private func handle(_ event: CheckpointEvent) {
        guard var save = saves[event.sequence] else { return }
        switch event.event {
        case .failed:
            let code = event.error?.code
            guard code == WireError.Code.busy.rawValue || code == WireError.Code.draining.rawValue else {
                return world.model.violate("save \(event.sequence) is given up: \(event.error?.message ?? "")")
            }
            save.isRefused = true
            saves[event.sequence] = save
        case .released where save.isRefused:
            save.isRefused = false
            saves[event.sequence] = save
            later(dice.seconds(0.1...1)) { trainer in
                guard trainer.isOpened, let save = trainer.saves[event.sequence] else { return }
                trainer.link?.send(.save(save.payload, save.memory.fd))
            }
        case .released:
            saves[event.sequence] = nil
            for file in save.files { file.isHeldByTrainer = false }
            // The buffer is used again at once.
            if event.buffer != nil { _ = save.memory.bytes.initializeMemory(as: UInt8.self, repeating: 0xEE) }
            endIfDone()
        default: break
        }
    }
}
