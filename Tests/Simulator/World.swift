// SPDX-License-Identifier: Apache-2.0
/// Trainers, a daemon, a service manager and a disk in one process, and what happens to them: a world, as one seed
/// has it. First everything may die at any step and the disk may refuse; then there is peace, and all that was
/// promised has to come true.
import Daemon
import Glibc
import Posix
import SimulatedMachine
import Wire
import Writer

/// The service manager's store: it lives on when the daemon is killed.
@DaemonActor
final class SimulatedManager: DescriptorKeeper {
    private unowned let world: World
    private let lane = Schedule.Lane("service manager", isDaemons: false, blocks: false)
    private(set) var kept: [String: [OwnedFD]] = [:]

    init(_ world: World) { self.world = world }

    func store(_ fds: [OwnedFD], name: String, done: @escaping @Sendable @DaemonActor () -> Void) {
        tell {
            self.world.schedule.note("keeps \(name)")
            self.kept[name] = fds
        } then: {
            DaemonActor.enter(done)
        }
    }

    func remove(_ name: String, done: @escaping @Sendable @DaemonActor (Bool) -> Void) {
        tell {
            self.forget(name)
        } then: {
            DaemonActor.enter { done(true) }
        }
    }

    nonisolated func remove(_ name: String) { DaemonActor.assumeIsolated { tell({ self.forget(name) }, then: {}) } }

    private func forget(_ name: String) {
        world.schedule.note("forgets \(name)")
        kept[name] = nil
    }

    private var messages: [@DaemonActor () -> Void] = []

    /// In order; who has said it may be dead then, and hears no answer.
    private func tell(_ work: @escaping @DaemonActor () -> Void, then answer: @escaping @DaemonActor () -> Void) {
        let daemon = world.daemon
        messages.append {
            work()
            if let daemon, daemon === self.world.daemon { answer() }
        }
        world.schedule.later(world.dice.chance(0.2) ? world.dice.seconds(0...0.3) : 0, lane) {
            DaemonActor.assumeIsolated { self.messages.removeFirst()() }
        }
    }
}

/// The daemon's part that starts it (Sources/Daemon/Daemon.swift): it recovers, and only then it serves.
@DaemonActor
final class SimulatedDaemon {
    private unowned let world: World
    let runs: RunStore
    var links: [Link] = []
    private(set) var isServing = false

    init(_ world: World) {
        self.world = world
        let dice = world.dice
        runs = RunStore(
            diskQueues: dice.among(1...3), stateDirectory: SimulatedDisk.aloneDirectory, logBytesPerRun: 1 << 20,
            retention: Retention(keepLast: 0, keepEvery: 0),
            budget: SnapshotBudget(limit: world.budget, limitPerRun: world.budget), fileModeMask: 0o022)
        runs.tensorboard = .never
    }

    func start() {
        let store = world.manager.map { FDStore($0) }
        if let store { runs.keeper = store }
        runs.report = { [unowned world] event in
            DaemonActor.assumeIsolated {
                world.schedule.note("run \(event.runID): \(event.what)")
                if case .warning(let words) = event.what, words.begins(with: "not in the state directory") {
                    world.model.unregistered.insert(event.runID)
                }
            }
        }
        DaemonActor.enter(after: 5) { self.isServing = true }
        var isLeft = true
        func restore() {
            guard isLeft else { return }
            isLeft = false
            guard let store, let manager = world.manager else { return isServing = true }
            store.restore(manager.kept, into: runs) { self.isServing = true }
        }
        runs.recover { [unowned world] problems in
            for problem in problems { world.schedule.note("not recovered: \(problem)") }
            restore()
        }
        DaemonActor.enter(after: 1) { restore() }
    }
}

@DaemonActor
final class World {
    let seed: UInt64
    let dice: Dice
    let schedule: Schedule
    let disk: SimulatedDisk
    let model: Model
    private(set) var manager: SimulatedManager?
    private(set) var daemon: SimulatedDaemon?
    private var trainers: [Trainer] = []
    private var alive: [Int32: UInt64] { Dictionary(uniqueKeysWithValues: trainers.map { ($0.pid, $0.startTicks) }) }
    private let environment = Schedule.Lane("world", isDaemons: false, blocks: false)
    private var nextPID: Int32 = 100
    private var nextToken: UInt64 = 0

    private(set) var crashPoints = 0
    private var crashesLeft: Int
    private let crashShare: Double
    private let cutShare: Double
    private var isPeace = false
    private var livesLeft: Int

    let outputRoot: String
    let keepLast: Int?
    let budget: UInt64
    let saveShare: Double
    let updateSeconds: Double
    let storageByteCount: Int
    private let hasFaults: Bool

    init(seed: UInt64, options: Options, workers: [Worker], traces: Bool) {
        self.seed = seed
        dice = Dice(seed: seed)
        schedule = Schedule(dice, workers: workers)
        if traces { schedule.trace = [] }
        disk = SimulatedDisk(schedule)
        model = Model(disk, schedule)
        crashesLeft = options.crashes ? dice.among(0...20) : 0
        crashShare = dice.pick([0.002, 0.01, 0.03, 0.1])
        cutShare = options.losses ? dice.pick([0, 0.002, 0.02]) : 0
        hasFaults = options.faults && dice.chance(0.6)
        livesLeft = dice.among(0...6)
        // Sometimes it has to be made.
        outputRoot = dice.chance(0.8) ? "/data" : "/data/new/root"
        keepLast = dice.chance(0.4) ? dice.among(1...3) : nil
        budget = dice.pick([1000, 4000, 1 << 30])
        saveShare = dice.pick([0, 0.1, 0.3, 0.8])
        updateSeconds = dice.pick([0.001, 0.05, 0.5, 2])
        storageByteCount = dice.pick([10, 200, 3000])
        disk.makeSafeDirectory("/data")
        disk.makeSafeDirectory(SimulatedDisk.aloneDirectory)
        disk.keepsOrder = dice.chance(0.5)
        disk.shortShare = dice.pick([0, 0, 0.1, 0.5])
        disk.slowShare = dice.pick([0, 0, 0.02, 0.2])
        disk.slowSeconds = dice.chance(0.1) ? 0.01...3 : 0.001...0.05
        schedule.pauseShare = dice.pick([0.05, 0.3, 0.8])
        if dice.chance(0.6) { manager = SimulatedManager(self) }
        Machine.replace(
            files: disk, time: schedule, processes: Processes(world: self), scheduler: schedule)
        schedule.crashesNow = { [unowned self] in DaemonActor.assumeIsolatedAnywhere { self.wantsCrash() } }
        schedule.crash = { [unowned self] in DaemonActor.assumeIsolated { self.crash() } }
        let runCount = dice.pick([1, 1, 2])
        for run in 0..<runCount { model.runs.append("\(outputRoot)/run\(run)") }
        startDaemon()
        for run in 0..<runCount {
            for rank in 0..<dice.pick([1, 1, 2]) { startTrainer(run: run, rank: rank, resumeAt: nil) }
        }
        if hasFaults { planFaults() }
    }

    // MARK: What happens

    /// - Returns: what is wrong; nil where nothing is.
    func live() -> Violation? {
        while !isPeace, model.violation == nil {
            if !schedule.step() { break }
            if wantsCrash() { crash() }
            if dice.chance(cutShare), let trainer = trainers.randomElement(using: &rolls), !trainer.isDone {
                schedule.note("session \(trainer.session.index) loses its connection")
                trainer.loseConnection()
            }
            if trainers.allSatisfy(\.isDone) || schedule.steps > Self.unrestSteps { break }
        }
        if model.violation == nil { makePeace() }
        if model.violation == nil { model.checkEnd() }
        if model.violation == nil {
            schedule.note("the last power cut")
            cutPower()
            model.checkEnd()
        }
        return model.violation
    }

    private static let unrestSteps = 30_000
    private static let quietSeconds = 100.0
    private static let peaceSteps = 60_000
    private static let peaceSeconds = 1000.0

    private func makePeace() {
        isPeace = true
        schedule.note("peace")
        disk.faults = []
        disk.slowShare = 0
        if daemon == nil { startDaemon() }
        let (start, steps) = (schedule.now, schedule.steps)
        // What is tried again after a pause has its time too.
        while model.violation == nil, !isSettled || schedule.now - start < Self.quietSeconds {
            guard schedule.step() else {
                if isSettled { return }
                return model.violate("nothing happens any more: \(words)")
            }
            if schedule.steps - steps > Self.peaceSteps || schedule.now - start > Self.peaceSeconds {
                return model.violate("no end after \(Int(schedule.now - start)) s without faults: \(words)")
            }
        }
    }

    private var isSettled: Bool {
        guard trainers.allSatisfy(\.isDone), let daemon else { return false }
        return daemon.isServing && daemon.links.isEmpty && daemon.runs.isIdle
            && daemon.runs.queueDepths.allSatisfy { $0.running == 0 && $0.waiting == 0 }
    }

    private var words: String {
        let runs =
            daemon?.runs.all.map { "\($0.name.runID): \($0.state), \($0.pendingPaths), \($0.stalled ?? "")" } ?? []
        return (trainers.filter { !$0.isDone }.map(\.words) + runs).joined(separator: "; ")
    }

    private func planFaults() {
        for _ in 0..<dice.among(1...4) {
            schedule.later(dice.seconds(0...10), environment) {
                DaemonActor.assumeIsolated {
                    guard !self.isPeace else { return }
                    self.disk.faults.append(self.fault())
                }
            }
        }
    }

    private func fault() -> SimulatedDisk.Fault {
        let until = schedule.now + dice.pick([0.01, 0.3, 3, 30])
        let share = dice.pick([0.02, 0.2, 1])
        switch dice.below(5) {
        case 0:
            return .init(calls: [.write, .allocate, .create, .mkdir, .link], code: ENOSPC, share: share, until: until)
        case 1: return .init(calls: [.fdatasync, .fsync], code: EIO, share: share, until: until)
        case 2:
            return .init(
                calls: [.write, .create, .mkdir, .rename, .unlink, .link], code: EROFS, share: share, until: until)
        case 3:
            return .init(
                calls: [SimulatedDisk.Call.allCases.randomElement(using: &rolls)!], code: EIO, share: share,
                until: until)
        default: return .init(calls: Set(SimulatedDisk.Call.allCases), code: EIO, share: share, until: until)
        }
    }

    private struct Rolls: RandomNumberGenerator {
        let dice: Dice
        mutating func next() -> UInt64 { dice.next() }
    }
    private lazy var rolls = Rolls(dice: dice)

    // MARK: Deaths

    private func wantsCrash() -> Bool { !isPeace && crashesLeft > 0 && dice.chance(crashShare) }

    private func crash() {
        crashesLeft -= 1
        crashPoints += 1
        switch dice.below(20) {
        case 0..<9: killDaemon()
        case 9..<13: killTrainer()
        case 13..<16:
            killTrainer()
            killDaemon()
        default:
            cutPower()
            schedule.later(dice.seconds(0.1...2), environment) { DaemonActor.assumeIsolated { self.startDaemon() } }
            restartTrainers()
        }
    }

    private func killDaemon() {
        guard daemon != nil else { return }
        schedule.note("the daemon is killed")
        endDaemon()
        disk.closeAll()
        let kept = manager?.kept
        model.daemonDied { file in kept?["save-\(file.session.name)-\(file.sequence)"] != nil }
        model.checkAll(isAfterCut: false)
        schedule.later(dice.chance(0.5) ? 0.1 : dice.seconds(0.01...3), environment) {
            DaemonActor.assumeIsolated { self.startDaemon() }
        }
    }

    private func endDaemon() {
        schedule.killDaemon()
        let links = daemon?.links ?? []
        schedule.silently { daemon = nil }
        for link in links { link.daemonDied() }
    }

    private func killTrainer() {
        let living = trainers.filter { !$0.isDone }
        guard !living.isEmpty else { return }
        let trainer = dice.pick(living)
        schedule.note("\(trainer.words): killed")
        kill(trainer)
        restart(trainer)
    }

    private func kill(_ trainer: Trainer) {
        trainers.removeAll { $0 === trainer }
        trainer.die()
        model.trainerDied(trainer.session)
    }

    private func restart(_ trainer: Trainer) {
        guard livesLeft > 0 else { return }
        livesLeft -= 1
        schedule.later(dice.chance(0.3) ? 0 : dice.seconds(0...5), environment) {
            DaemonActor.assumeIsolated {
                let resumeAt = trainer.rank == 0 && self.dice.chance(0.7) ? self.model.resumable(run: trainer.run) : nil
                self.startTrainer(run: trainer.run, rank: trainer.rank, resumeAt: resumeAt)
            }
        }
    }

    private func cutPower() {
        model.hadPowerCut = true
        schedule.note("power cut")
        endDaemon()
        let dead = trainers.filter { !$0.isDone }
        for trainer in dead { kill(trainer) }
        if manager != nil { manager = SimulatedManager(self) }
        disk.cutPower()
        model.powerWasCut()
        model.checkAll(isAfterCut: true)
        died = dead
    }

    private var died: [Trainer] = []

    private func restartTrainers() {
        for trainer in died { restart(trainer) }
        died = []
    }

    // MARK: Lives

    private func startDaemon() {
        guard daemon == nil else { return }
        schedule.note("a daemon starts")
        let daemon = SimulatedDaemon(self)
        self.daemon = daemon
        DaemonActor.enter { daemon.start() }
    }

    private func startTrainer(run: Int, rank: Int, resumeAt: Int64?) {
        // One process is a rank of a run.
        guard !trainers.contains(where: { $0.run == run && $0.rank == rank && !$0.isDone }) else { return }
        nextPID += 1
        let trainer = Trainer(self, run: run, rank: rank, pid: nextPID, resumeAt: resumeAt)
        schedule.note("\(trainer.words): starts, resumes at \(resumeAt ?? -1)")
        trainers.append(trainer)
    }

    /// nil where nobody listens.
    func connect(_ trainer: Trainer) -> Link? {
        guard let daemon, daemon.isServing else { return nil }
        nextToken += 1
        let link = Link(self, daemon, trainer, token: nextToken)
        daemon.links.append(link)
        return link
    }

    func startTicks(of pid: Int32) -> UInt64? { trainers.first { $0.pid == pid }?.startTicks }

    // MARK: What the daemon says

    func daemonSays(_ event: CheckpointEvent, of session: Session) {
        guard event.event != .progress else { return }
        schedule.note("session \(session.index) save \(event.sequence): \(event.event) \(event.path ?? "")")
        let files = model.files.filter { $0.session === session && $0.sequence == event.sequence }
        switch event.event {
        case .accepted:
            for file in files {
                file.isAccepted = true
                file.isHeldByDaemon = true
            }
        case .durable:
            if let target = event.target, target < files.count { model.saidDurable(files[target]) }
        default: break
        }
    }

    func finished(_ session: Session, frames: Int) {
        session.ackedFrames = max(session.ackedFrames, frames)
        session.safeFrames = max(session.safeFrames, frames)
        model.checkAll(isAfterCut: false)
    }

    /// For the next world.
    func end() -> [Worker] {
        for trainer in trainers { trainer.die() }
        endDaemon()
        schedule.silently { manager = nil }
        return schedule.end()
    }
}

struct Processes: ProcessTable, @unchecked Sendable {
    unowned let world: World
    func startTicks(of pid: Int32) -> UInt64? { DaemonActor.assumeIsolatedAnywhere { world.startTicks(of: pid) } }
}

extension DaemonActor {
    /// Also on a thread of disk work: the one that decides waits meanwhile.
    static func assumeIsolatedAnywhere<T>(_ work: @DaemonActor () -> T) -> T {
        withoutActuallyEscaping(work) { unsafeBitCast($0, to: (() -> T).self)() }
    }
}
