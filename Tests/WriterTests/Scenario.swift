// SPDX-License-Identifier: Apache-2.0
/// The Writer on a machine of its own: a disk in memory, a virtual clock, and one order of events. Nothing measures
/// time, and nothing waits for it: seconds pass as fast as there is nothing to do in them.
///
/// The machine is the whole process's, so each test that uses one runs in a process of its own:
///
///     await #expect(processExitsWith: .success) { try await Scenario.run { ... } }
import Dispatch
import Posix
import SimulatedMachine
import Wire

@testable import Writer

struct Unmet: Error { var words: String }

private final class LivingProcesses: ProcessTable, @unchecked Sendable {
    // Unchecked: the threads of a simulation never run side by side.
    var startTicks: [Int32: UInt64] = [:]
    func startTicks(of pid: Int32) -> UInt64? { startTicks[pid] }
}

/// A trainer's connection to a run, as the daemon's end of it sees it.
@DaemonActor
final class Trainer {
    let session: String
    let rank: Int
    let pid: Int32
    let token: UInt64
    fileprivate(set) var opened: Result<RunOpened, WireError>?
    fileprivate(set) var acks: [LogAck] = []
    fileprivate(set) var events: [CheckpointEvent] = []
    fileprivate var heldRun: Run?
    fileprivate var memories: [SharedMemory] = []

    fileprivate init(session: String, rank: Int, pid: Int32, token: UInt64) {
        (self.session, self.rank, self.pid, self.token) = (session, rank, pid, token)
    }

    var run: Run {
        get throws {
            guard let heldRun else { throw Unmet(words: "the run is not open") }
            return heldRun
        }
    }
    var kinds: [CheckpointEvent.Kind] { events.map(\.event) }
    var refusal: WireError.Code? { if case .failure(let error) = opened { error.code } else { nil } }

    /// - Parameter newKeys: are defined before it.
    func log(_ update: Int64, sequence: UInt64? = nil, newKeys: [String] = []) throws {
        _ = try run.log.columns(for: newKeys)
        let columns = try run.log.columns(for: ["loss"])
        try run.log.append(
            LogPayload(
                sequence: sequence ?? UInt64(update), update: update, wallTime: 0, keyIDs: [0],
                values: [ScalarBits(update)]), columnIDs: columns, session: session)
    }

    /// - Parameter sequence: one that was used before stands for the same save again.
    func save(_ tag: String, sequence: UInt64) throws {
        let (storage, pickle) = (64, 20)
        let memory = try SharedMemory(capacity: storage + pickle)
        memory.bytes.initializeMemory(as: UInt8.self, repeating: UInt8(truncatingIfNeeded: sequence))
        memories.append(memory)
        let target = SavePayload.Target(
            kind: .model, name: "net\(rank)", tag: tag, info: nil, pickleOffset: UInt64(storage),
            pickleLength: UInt64(pickle))
        let payload = SavePayload(
            sequence: sequence, storageLengths: [UInt64(storage)], storagesLength: UInt64(storage), buffer: sequence,
            logUpdate: nil, targets: [target])
        try run.save(payload, fd: memory.fd, session: session, rank: rank, connection: token) { event in
            self.events.append(event)
        }
    }

    func leave(clean: Bool = true) throws {
        try run.detach(rank: rank, connection: token, clean: clean, keepsJournal: false)
        heldRun = nil
    }
}

@DaemonActor
final class Scenario {
    static let directory = "/data/r"

    let schedule: Schedule
    let disk: SimulatedDisk
    private let processes = LivingProcesses()
    private(set) var store: RunStore
    private var nextToken: UInt64 = 0
    private var isRecovered = false
    /// What the operator is told.
    private(set) var said: [RunEvent.What] = []

    /// Runs it on the daemon's queue. An error ends the process with a failure.
    nonisolated static func run(_ body: @escaping @Sendable @DaemonActor (Scenario) throws -> Void) async throws {
        let result: Result<Void, any Error> = await withCheckedContinuation { continuation in
            DaemonActor.queue.async {
                continuation.resume(
                    returning: DaemonActor.assumeIsolated { Result { try body(Scenario()) } })
            }
        }
        if case .failure(let error) = result {
            ThisProcess.writeToStandardError("\(error)")
            throw error
        }
    }

    private init() {
        let schedule = Schedule(Dice(seed: 1), workers: [])
        let disk = SimulatedDisk(schedule)
        (self.schedule, self.disk) = (schedule, disk)
        disk.makeSafeDirectory("/data")
        disk.makeSafeDirectory(SimulatedDisk.aloneDirectory)
        Machine.replace(files: disk, time: schedule, processes: processes, scheduler: schedule)
        store = Self.newStore()
        hear()
    }

    private static func newStore() -> RunStore {
        RunStore(
            diskQueues: 2, stateDirectory: SimulatedDisk.aloneDirectory, logBytesPerRun: 1 << 24,
            retention: Retention(keepLast: 0, keepEvery: 0),
            budget: SnapshotBudget(limit: 1 << 30, limitPerRun: 1 << 30), fileModeMask: 0o022)
    }

    private func hear() {
        store.report = { [weak self] event in DaemonActor.assumeIsolated { self?.said.append(event.what) } }
    }

    // MARK: Time

    func until(_ words: String, _ condition: () throws -> Bool) throws {
        let end = schedule.now + 600
        while try !condition() {
            guard schedule.now < end, schedule.step() else { throw Unmet(words: "not in ten minutes: \(words)") }
        }
    }

    /// Whatever happens in this time has happened.
    func pass(seconds: Double) {
        let end = schedule.now + seconds
        while schedule.now < end, schedule.step() {}
    }

    func require(_ condition: Bool, _ words: String) throws { if !condition { throw Unmet(words: words) } }

    // MARK: Trainers

    /// - Parameter waits: for the answer.
    func open(
        session: Character = "a", rank: Int = 0, pid: Int32 = 100, log: Bool = true, keepLast: Int? = nil,
        waits: Bool = true
    ) throws -> Trainer {
        nextToken += 1
        if processes.startTicks[pid] == nil { processes.startTicks[pid] = UInt64(pid) }
        let trainer = Trainer(session: String(repeating: session, count: 32), rank: rank, pid: pid, token: nextToken)
        var message = OpenRun(
            outputRoot: "/data", runID: "r", stageName: nil, debug: false, session: trainer.session, log: log,
            node: "node")
        (message.rank, message.worldSize, message.keepLast) = (rank, 8, keepLast)
        let sent = message
        let peer = PeerCredentials(
            process: PeerProcess(pid: pid, startTicks: processes.startTicks[pid]), uid: ThisProcess.userID)
        store.open(try RunName(sent), sent, root: nil, peer: peer) { result in
            switch result {
            case .failure(let error): trainer.opened = .failure(error)
            case .success(let run):
                trainer.heldRun = run
                run.opened(sent, on: trainer.token, acknowledge: { trainer.acks.append($0) }) {
                    trainer.opened = .success($0)
                }
            }
        }
        if waits { try until("the run is opened, or refused") { trainer.opened != nil } }
        return trainer
    }

    func endProcess(_ pid: Int32) { processes.startTicks[pid] = nil }

    // MARK: The daemon

    /// SIGKILL, and the next one recovers.
    func killDaemon() throws {
        schedule.killDaemon()
        schedule.silently { store = Self.newStore() }
        disk.closeAll()
        hear()
        isRecovered = false
        store.recover { _ in self.isRecovered = true }
        try until("the daemon has recovered") { isRecovered }
    }

    // MARK: The disk

    func refuse(_ calls: Set<SimulatedDisk.Call>, _ code: Int32) {
        disk.faults = [SimulatedDisk.Fault(calls: calls, code: code, share: 1, until: .infinity)]
    }
    func takeAll() { disk.faults = [] }

    /// The disk takes another byte than it is given.
    nonisolated func damageFile(named prefix: String, filledWith byte: UInt8) {
        disk.named = { _, name, node, _ in
            guard name.hasPrefix(prefix) else { return }
            let place = node.bytes.indices.dropFirst(2).first { node.bytes[$0 - 2...$0].allSatisfy { $0 == byte } }
            if let place { node.bytes[place] = ~byte }
        }
    }

    /// A bit of a file is another one on the disk, and has been for a while.
    func flipBit(of path: String, at position: Int) throws {
        guard let node = disk.find("\(Self.directory)/\(path)") else { throw Unmet(words: "there is no \(path)") }
        node.bytes[position] ^= 0x10
        if position < node.safeBytes.count { node.safeBytes[position] ^= 0x10 }
    }

    func cut(_ path: String, by count: Int) throws {
        guard let node = disk.find("\(Self.directory)/\(path)") else { throw Unmet(words: "there is no \(path)") }
        node.bytes.removeLast(count)
        node.safeBytes = node.bytes
    }

    func bytes(of path: String) -> [UInt8]? { disk.find("\(Self.directory)/\(path)")?.bytes }

    func has(_ path: String) -> Bool { disk.find("\(Self.directory)/\(path)") != nil }

    /// The number of the save that a checkpoint's file holds.
    func saved(_ name: String) -> UInt64? {
        let mark = disk.find("\(Self.directory)/checkpoints/\(name)")?.attributes["user.noether_writer.save"]
        return mark?.split(separator: " ").dropFirst(2).first.flatMap { UInt64($0) }
    }
}
