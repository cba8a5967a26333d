// SPDX-License-Identifier: Apache-2.0
/// What was saved, logged and promised; and whether the disk agrees (DESIGN of the durability contract: README).
import CLinux
import Posix
import SimulatedMachine
import RunFiles
import TorchFile
import Wire
import Writer

/// The first thing that is wrong ends a world.
struct Violation: Error { var words: String }

/// One life of a trainer.
final class Session {
    let index: Int
    let run: Int
    let rank: Int
    /// 32 hexadecimal digits.
    let name: String
    /// What it has logged, in order.
    var frames: [(sequence: UInt64, update: Int64)] = []
    /// Promised: so many frames survive SIGKILL of all, and so many a power cut.
    var ackedFrames = 0
    var safeFrames = 0

    init(index: Int, run: Int, rank: Int) {
        self.index = index
        self.run = run
        self.rank = rank
        let digits = String(index, radix: 16)
        name = String(repeating: "0", count: 32 - digits.count) + digits
    }

    /// A frame's number in its log is its value: it says whose it is.
    static let framesPerSession: Int64 = 1_000_000
    func value(ofFrame index: Int) -> Int64 { Int64(self.index) * Self.framesPerSession + Int64(index) }

    func acknowledge(_ ack: LogAck) {
        ackedFrames = max(ackedFrames, frames.count { $0.sequence <= ack.sequence })
        // An update that is added to later is durable with its first values.
        guard let update = ack.durableUpdate else { return }
        let first = frames.firstIndex { $0.update >= update } ?? frames.count
        let isThere = first < frames.count && frames[first].update == update
        safeFrames = max(safeFrames, first + (isThere ? 1 : 0))
    }
}

/// One file of a save.
final class SavedFile {
    let id: Int
    let session: Session
    let sequence: UInt64
    let target: Int
    let directory: String
    let name: String
    let tag: String
    let logUpdate: Int64?
    let pickle: [UInt8]
    let storage: [UInt8]
    var isAccepted = false
    var isDurable = false
    var isRefused = false
    /// Nobody who lives has it: its end may be that it is not written.
    var mayBeLost = false
    var isHeldByDaemon = false
    var isHeldByTrainer = true

    init(
        id: Int, session: Session, sequence: UInt64, target: Int, directory: String, name: String, tag: String,
        logUpdate: Int64?, pickle: [UInt8], storage: [UInt8]
    ) {
        self.id = id
        self.session = session
        self.sequence = sequence
        self.target = target
        self.directory = directory
        self.name = name
        self.tag = tag
        self.logUpdate = logUpdate
        self.pickle = pickle
        self.storage = storage
    }

    var path: String { "\(directory)/checkpoints/\(name)" }

    /// Whether it was saved later: a name never goes from a later one back to an earlier one.
    func isAfter(_ other: SavedFile) -> Bool {
        (session.index, sequence) > (other.session.index, other.sequence)
    }
}

/// Unchecked: the threads of a simulation never run side by side.
final class Model: @unchecked Sendable {
    private let disk: SimulatedDisk
    private let schedule: Schedule
    var sessions: [Session] = []
    var files: [SavedFile] = []
    /// A journal that was removed may be there again, with nothing that its file has not, and without a note of it.
    var hadPowerCut = false
    /// Ids of runs that a daemon could not note in its state directory, and of which it has said so: no other daemon
    /// looks for their journals until they are opened again.
    var unregistered: Set<String> = []
    /// By path.
    private var byPath: [String: [SavedFile]] = [:]
    private var removedPaths: Set<String> = []
    /// Directories of runs.
    var runs: [String] = []
    private(set) var violation: Violation?
    private(set) var checkCount = 0

    init(_ disk: SimulatedDisk, _ schedule: Schedule) {
        self.disk = disk
        self.schedule = schedule
        disk.named = { [unowned self] directory, name, node, old in self.named(directory, name, node, old) }
        disk.changed = { [unowned self] in self.changed($0) }
        disk.removed = { [unowned self] directory, name, node in self.removed(directory, name) }
    }

    func violate(_ words: String) {
        guard violation == nil else { return }
        schedule.note("VIOLATION \(words)")
        violation = Violation(words: words)
    }

    func newSession(run: Int, rank: Int) -> Session {
        let session = Session(index: sessions.count + 1, run: run, rank: rank)
        sessions.append(session)
        return session
    }

    func add(_ file: SavedFile) {
        files.append(file)
        byPath[file.path, default: []].append(file)
    }

    static func pickle(id: Int, target: Int, count: Int) -> [UInt8] {
        [0x80, 2] + bytes(UInt64(id)) + bytes(UInt64(target))
            + (0..<count).map { UInt8(truncatingIfNeeded: $0 &* 7 &+ id) }
    }

    static func storage(id: Int, count: Int) -> [UInt8] {
        (0..<count).map { UInt8(truncatingIfNeeded: ($0 &* 31 &+ id) ^ ($0 >> 5)) }
    }

    private static func bytes(_ number: UInt64) -> [UInt8] {
        (0..<8).map { UInt8(truncatingIfNeeded: number >> (8 * $0)) }
    }

    private static func number(_ bytes: ArraySlice<UInt8>) -> Int {
        bytes.reversed().reduce(0) { $0 << 8 | Int($1) }
    }

    // MARK: Checkpoints

    /// Which save a file holds; nil where it holds none whole.
    func saved(in bytes: [UInt8]) -> SavedFile? {
        checkCount += 1
        return bytes.withUnsafeBytes { all -> SavedFile? in
            let verifier = ArchiveVerifier(all)
            guard (try? verifier.verify()) != nil, let records = try? verifier.records(checksSums: false),
                let pickle = records["data.pkl"], let storage = records["data/0"], pickle.count >= 18
            else { return nil }
            let start = Int(pickle.lowerBound)
            let id = Self.number(bytes[start + 2..<start + 10])
            let target = Self.number(bytes[start + 10..<start + 18])
            guard id > 0, id <= files.count else { return nil }
            let file = files[id - 1]
            guard file.target == target,
                bytes[start..<Int(pickle.upperBound)].elementsEqual(file.pickle),
                bytes[Int(storage.lowerBound)..<Int(storage.upperBound)].elementsEqual(file.storage)
            else { return nil }
            return file
        }
    }

    private func directory(of node: SimulatedDisk.Node) -> (run: String, isTracker: Bool)? {
        for run in runs {
            if disk.find("\(run)/checkpoints") === node { return (run, false) }
            if disk.find("\(run)/tracker") === node { return (run, true) }
        }
        return nil
    }

    private static func isTemporary(_ name: String) -> Bool { name.hasPrefix(".noether-writer-") }

    /// A name is about to lead to a file. After a power cut it may lead there at once: what the disk has for certain
    /// must be whole now.
    private func named(
        _ directory: SimulatedDisk.Node, _ name: String, _ node: SimulatedDisk.Node, _ old: SimulatedDisk.Node?
    ) {
        guard !Self.isTemporary(name), name.hasSuffix(".th"), let (run, isTracker) = self.directory(of: directory)
        else { return }
        if isTracker {
            if entries(in: node.safeBytes) == nil {
                violate("\(run)/tracker/\(name) is not whole on the disk when it gets its name")
            }
            return
        }
        guard let new = saved(in: node.safeBytes) else {
            return violate("\(run)/checkpoints/\(name) is not whole on the disk when it gets its name")
        }
        schedule.note("  that is save \(new.sequence) of session \(new.session.index)")
        guard new.path == "\(run)/checkpoints/\(name)" else {
            return violate("\(name) gets what was saved as \(new.path)")
        }
        if let old, let before = saved(in: old.bytes), before.isAfter(new) {
            violate(
                "\(name) goes back from save \(before.sequence) of session \(before.session.index) to \(new.sequence) of "
                    + "\(new.session.index)")
        }
    }

    private func changed(_ node: SimulatedDisk.Node) {
        guard node.linkCount > 0 else { return }
        for run in runs {
            guard let directory = disk.find("\(run)/checkpoints") else { continue }
            for (name, there) in directory.entries where there === node && name.hasSuffix(".th") {
                violate("\(run)/checkpoints/\(name) is written to under its name")
            }
        }
    }

    private func removed(_ directory: SimulatedDisk.Node, _ name: String) {
        guard !Self.isTemporary(name), name.hasSuffix(".th"), let (run, isTracker) = self.directory(of: directory)
        else { return }
        let path = "\(run)/checkpoints/\(name)"
        guard !isTracker, let gone = byPath[path]?.last else { return violate("\(run): \(name) is removed") }
        let (beginning, end) = Self.series(gone)
        // A later one of its kind, durable and whole.
        let safe = disk.find("\(run)/checkpoints", isSafe: true)?.safeEntries ?? [:]
        let isFollowed = safe.contains { other, node in
            guard other.hasPrefix(beginning), other.hasSuffix(end), let number = Self.update(other),
                let own = Self.update(name), number > own
            else { return false }
            return saved(in: node.safeBytes) != nil
        }
        if !isFollowed { violate("\(path) is removed, and nothing durable comes after it") }
        removedPaths.insert(path)
    }

    private static func series(_ file: SavedFile) -> (String, String) {
        let parts = file.name.components(file.tag)
        return parts
    }

    /// The update in a tag of progress.
    private static func update(_ name: String) -> Int? {
        guard let start = name.firstIndex(of: "U") else { return nil }
        return Int(name[name.index(after: start)...].prefix { $0.isNumber })
    }

    // MARK: Promises

    /// A save is said to be durable: the disk has it, or a later one, for certain.
    func saidDurable(_ file: SavedFile) {
        file.isDurable = true
        if let words = missing(file, isSafe: true) { violate("said to be durable: \(words)") }
    }

    /// - Returns: what is wrong where its name does not lead to it or to a later one.
    private func missing(_ file: SavedFile, isSafe: Bool) -> String? {
        guard let node = disk.find(file.path, isSafe: isSafe) else {
            return removedPaths.contains(file.path) ? nil : "\(file.path) is not there"
        }
        guard let there = saved(in: isSafe ? node.safeBytes : node.bytes) else { return "\(file.path) is not whole" }
        // What was removed makes room for what comes late.
        if file.isAfter(there), !removedPaths.contains(file.path) {
            return "\(file.path) has save \(there.sequence) of session \(there.session.index), not \(file.sequence) of "
                + "\(file.session.index)"
        }
        return nil
    }

    /// A client that connects again is told what the daemon has, and does not keep it: as good as an acknowledgement.
    func taken(_ session: Session, _ sequence: UInt64) {
        session.acknowledge(LogAck(sequence: sequence, update: 0, durableUpdate: nil))
    }

    /// The log is said to be safe so far.
    func acknowledged(_ session: Session, _ ack: LogAck) {
        let before = session.safeFrames
        session.acknowledge(ack)
        if session.safeFrames > before { checkLog(ofRun: session.run, isSafe: true) }
    }

    // MARK: The whole disk

    /// What lies under the names of files, whatever happened. After a power cut `isAfterCut`: then what was durable is
    /// there, and of the log what was.
    func checkAll(isAfterCut: Bool) {
        for (index, run) in runs.enumerated() {
            for (name, node) in disk.find("\(run)/checkpoints")?.entries ?? [:]
            where !Self.isTemporary(name) && saved(in: node.bytes) == nil {
                violate("\(run)/checkpoints/\(name) is not whole")
            }
            for (name, node) in disk.find("\(run)/tracker")?.entries ?? [:]
            where name.hasSuffix(".th") && !Self.isTemporary(name) && entries(in: node.bytes) == nil {
                violate("\(run)/tracker/\(name) is not whole")
            }
            checkLog(ofRun: index, isSafe: isAfterCut)
        }
        for file in files where file.isDurable {
            if let words = missing(file, isSafe: isAfterCut) { violate("was durable: \(words)") }
        }
    }

    /// At the end, when nothing fails any more: all that was accepted has become a file.
    func checkEnd() {
        for file in files where file.isAccepted && !file.mayBeLost {
            if let words = missing(file, isSafe: true) { violate("was accepted: \(words)") }
        }
        for (index, run) in runs.enumerated() {
            checkLog(ofRun: index, isSafe: false)
            for name in (disk.find("\(run)/tracker")?.entries ?? [:]).keys.sorted()
            where name == "entries.journal" && !hadPowerCut
                && !unregistered.contains(where: { run.hasSuffix("/\($0)") })
            {
                violate("\(run)/tracker/\(name) is left behind")
            }
        }
    }

    /// - Parameter isSafe: on the disk, for certain; otherwise as a process sees it.
    private func checkLog(ofRun index: Int, isSafe: Bool) {
        var found: [Int: Set<Int>] = [:]
        let tracker = disk.find("\(runs[index])/tracker", isSafe: isSafe)
        for (name, node) in (isSafe ? tracker?.safeEntries : tracker?.entries) ?? [:] where !Self.isTemporary(name) {
            let bytes = isSafe ? node.safeBytes : node.bytes
            let values: [Int64]
            if name.hasSuffix(".th") {
                values = entries(in: bytes) ?? []
            } else if name.hasSuffix(".journal") {
                values = journal(in: bytes)
            } else {
                continue
            }
            checkOrder(values, "\(runs[index])/tracker/\(name)")
            for value in values {
                found[Int(value / Session.framesPerSession), default: []].insert(
                    Int(value % Session.framesPerSession))
            }
        }
        for session in sessions where session.run == index {
            let promised = isSafe ? session.safeFrames : session.ackedFrames
            for frame in 0..<promised where found[session.index]?.contains(frame) != true {
                return violate(
                    "\(runs[index]): frame \(frame) of session \(session.index) is lost, of \(promised) that were said to be "
                        + (isSafe ? "durable" : "acknowledged"))
            }
        }
    }

    /// Of each session a log has the first ones, without a gap.
    private func checkOrder(_ values: [Int64], _ path: String) {
        var frames: [Int: Set<Int>] = [:]
        for value in values {
            frames[Int(value / Session.framesPerSession), default: []].insert(Int(value % Session.framesPerSession))
        }
        for (session, found) in frames {
            guard session >= 1, session <= sessions.count, (found.max() ?? 0) < sessions[session - 1].frames.count
            else {
                return violate("\(path) has what nobody logged")
            }
            let last = found.max() ?? 0
            let gap = (0..<last).filter { !found.contains($0) }
            if !gap.isEmpty {
                return violate("\(path) has frames up to \(last) of session \(session), but not \(gap)")
            }
        }
    }

    /// The values of entries.th; nil where it is not whole.
    private func entries(in bytes: [UInt8]) -> [Int64]? {
        checkCount += 1
        return bytes.withUnsafeBytes { all -> [Int64]? in
            guard let pickle = try? ArchiveVerifier(all).pickle() else { return nil }
            var values: [Int64] = []
            var updates: [String: Int64] = [:]
            var isOrdered = true
            var reader = EntriesReader(
                UnsafeRawBufferPointer(rebasing: all[Int(pickle.lowerBound)..<Int(pickle.upperBound)]))
            let keys = try? reader.read { key, update, value in
                if let last = updates[key], last >= update { isOrdered = false }
                updates[key] = update
                if case .int(let value) = value { values.append(value) }
            }
            return keys == nil || !isOrdered ? nil : values
        }
    }

    private func journal(in bytes: [UInt8]) -> [Int64] {
        checkCount += 1
        guard let log = bytes.withUnsafeBytes({ JournalReader.log(in: $0) }) else { return [] }
        return log.keys.flatMap { key in
            log.values(key: key, from: 0, limit: .max).map { Int64(bitPattern: $0.value.bits) }
        }
    }

    /// An update from which a trainer may go on: of a checkpoint that is durable.
    func resumable(run: Int) -> Int64? {
        files.filter { $0.session.run == run && $0.session.rank == 0 && $0.isDurable }.compactMap(\.logUpdate).max()
    }

    // MARK: Deaths

    func trainerDied(_ session: Session) {
        for file in files where file.session === session {
            file.isHeldByTrainer = false
            if !file.isHeldByDaemon, !file.isDurable { file.mayBeLost = true }
        }
    }

    /// Of what was acknowledged, what was durable is left.
    func powerWasCut() {
        daemonDied { _ in false }
        for session in sessions { session.ackedFrames = session.safeFrames }
    }

    /// - Parameter kept: whether the service manager has the save.
    func daemonDied(keeping kept: (SavedFile) -> Bool) {
        for file in files where !file.isDurable {
            file.isHeldByDaemon = file.isHeldByDaemon && kept(file)
            if !file.isHeldByDaemon, !file.isHeldByTrainer { file.mayBeLost = true }
        }
    }
}

extension String {
    /// What comes before and after this part.
    fileprivate func components(_ part: String) -> (String, String) {
        guard let range = firstRange(of: part) else { return (self, "") }
        return (String(self[..<range.lowerBound]), String(self[range.upperBound...]))
    }
}
