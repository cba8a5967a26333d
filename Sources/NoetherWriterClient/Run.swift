/// A run with the daemon: its log and its checkpoints. Any thread may call.
/// A facade: `Link` keeps the session, `Ticket` what becomes of a save.
internal import Dispatch
internal import CCopy
internal import Posix
internal import Synchronization
internal import TorchFile
internal import Wire

public final class Run: Sendable {
    /// What a file holds; a part of its name.
    public enum Kind: String, Sendable, CaseIterable {
        case model, optim, trainer

        var wire: CheckpointKind {
            switch self {
            case .model: .model
            case .optim: .optim
            case .trainer: .trainer
            }
        }
    }

    /// One file of a save: `<name>[_<info>]_cp=<tag>_<kind>.th`; info counts for models only.
    public struct Target: Sendable {
        public var name: String
        public var tag: String
        public var kind: Kind
        public var info: String?

        public init(_ name: String, tag: String, kind: Kind = .model, info: String? = nil) {
            self.name = name
            self.tag = tag
            self.kind = kind
            self.info = info
        }
    }

    public let runID: String
    /// `<output_root>[/debug]/<run_id>[/<stage_name>]`.
    public let directory: String
    private let link: Link
    private let isFinished = Mutex(false)

    /// Opens a run with the daemon; starts a daemon for this user where none listens.
    /// - Parameters:
    ///   - outputRoot: an absolute path, created where missing.
    ///   - configYAML: text that becomes `tracker/config.yaml`.
    ///   - tensorboard: whether event files for TensorBoard are written; nil leaves it to the daemon's setting.
    ///   - rank: of this process in its job; ranks of one job share a run.
    /// - Throws: `ClientError`.
    public init(
        outputRoot: String, runID: String, stageName: String? = nil, debug: Bool = false,
        configYAML: String? = nil, tensorboard: Bool? = nil,
        rank: Int = 0, worldSize: Int = 1, socket: String = DaemonConnection.defaultSocket()
    ) throws {
        self.runID = runID
        var message = OpenRun(
            outputRoot: outputRoot, runID: runID, stageName: stageName, debug: debug,
            session: Self.newSession(),
            log: rank == 0, node: Process.hostName)
        message.configYaml = configYAML
        message.tensorboard = tensorboard
        message.progress = true
        message.rank = rank
        message.worldSize = worldSize
        link = try Link(socket: socket, message)
        directory = link.opened.runDirectory
    }

    deinit { link.close() }

    private static func newSession() -> String {
        let words = [UInt64.random(in: 0 ... .max), UInt64.random(in: 0 ... .max)]
        return words.map { word in
            let text = String(word, radix: 16)
            return String(repeating: "0", count: 16 - text.count) + text
        }.joined()
    }

    // MARK: The log

    /// The last update that survives power loss, as far as the daemon has said.
    public var logDurableUpdate: Int64? { link.durableUpdate }

    /// Logs one update's scalars in one frame. Does not wait for the daemon.
    /// - Parameter update: larger than the last one.
    /// - Throws: `ClientError`; nothing of this update was logged then. Refusals of earlier ones, each once.
    public func log(
        _ values: KeyValuePairs<String, Scalar>, update: Int64, epoch: Scalar? = nil, sample: Scalar? = nil
    ) throws(ClientError) {
        try log(values.map { ($0.key, $0.value) }, update: update, epoch: epoch, sample: sample)
    }

    public func log(
        _ values: [(key: String, value: Scalar)], update: Int64, epoch: Scalar? = nil, sample: Scalar? = nil
    ) throws(ClientError) {
        try link.throwFailure()
        var entry: [(key: String, value: Scalar)] = []
        if let epoch { entry.append(("epoch", epoch)) }
        if let sample { entry.append(("sample", sample)) }
        entry += values
        try link.log(entry, update: update)
    }

    /// All values of a key over the run, from the daemon.
    /// - Throws: `ClientError`.
    public func values(_ key: String) throws -> [(update: Int64, value: Scalar)] {
        var found: [(update: Int64, value: Scalar)] = []
        while true {
            let page = PageRequest(key: key, from: found.count, limit: Limits.pageItems)
            let answer = try link.request(
                .values, JSONPayload.encode(page), timeout: DaemonConnection.answerTime)
            let values = try ValuesPage(decoding: answer.payload)
            found += zip(values.updates, values.values).map { ($0, Scalar($1)) }
            if found.count >= values.total || values.updates.isEmpty { return found }
        }
    }

    // MARK: Checkpoints

    /// Saves `value` as `checkpoints/<name>[_<info>]_cp=<tag>_<kind>.th`; returns after one memory copy.
    /// - Throws: `ClientError`; nothing was sent then. Failures of earlier saves, each once.
    public func save(
        _ name: String, tag: String, _ value: StateValue, kind: Kind = .model, info: String? = nil
    ) throws -> Ticket {
        try save(value, as: [Target(name, tag: tag, kind: kind, info: info)])
    }

    /// One snapshot under several names, from one copy: a tag and `latest`.
    public func save(_ value: StateValue, as targets: [Target]) throws -> Ticket {
        try link.throwFailure()
        let pickle = try StatePickle(value)
        let lengths = pickle.storages.map { UInt64($0.byteCount) }
        var wire = targets.map {
            SavePayload.Target(
                kind: $0.kind.wire, name: $0.name, tag: $0.tag, info: $0.info, pickleOffset: 0,
                pickleLength: UInt64(pickle.bytes.count))
        }
        guard !wire.isEmpty, lengths.count <= Limits.storages, wire.count <= Limits.targets else {
            throw ClientError.unsupportedValue(
                "a save has 1 to \(Limits.targets) targets and at most \(Limits.storages) storages")
        }
        guard let places = SavePayload.storagePlaces(lengths) else {
            throw ClientError.unsupportedValue("the tensors have more bytes than can be counted")
        }
        // Each target has a pickle of its own, though all are equal here.
        var end = places.end
        for index in wire.indices {
            wire[index].pickleOffset = end
            end += UInt64(pickle.bytes.count)
        }
        let buffer = try BufferPool.shared.take(Int(end))
        let memory = buffer.memory.bytes
        for target in wire {
            UnsafeMutableRawBufferPointer(rebasing: memory[Int(target.pickleOffset)...]).copyBytes(
                from: pickle.bytes)
        }
        copy(pickle.storages, to: memory, places.starts, isFresh: buffer.isFresh)
        let ticket = Ticket(count: wire.count) { [weak link] in link?.awaySeconds ?? 0 }
        do {
            try link.save(ticket, buffer) { sequence, update in
                try SavePayload(
                    sequence: sequence, storageLengths: lengths, storagesLength: places.end,
                    buffer: buffer.number, logUpdate: update, targets: wire
                ).encoded()
            }
        } catch {
            BufferPool.shared.release(buffer.number)
            throw error
        }
        return ticket
    }

    /// On two threads: one does not reach the memory's speed, and a trainer has other use for the rest.
    private func copy(
        _ storages: [TensorStorage], to memory: UnsafeMutableRawBufferPointer, _ starts: [UInt64],
        isFresh: Bool
    ) {
        let pieces = zip(storages, starts).filter { $0.0.byteCount > 0 }
        guard let base = memory.baseAddress, !pieces.isEmpty else { return }
        let targets = pieces.map { UInt64(UInt(bitPattern: base)) + $0.1 }
        let sources = pieces.map { UInt64(UInt(bitPattern: $0.0.bytes.baseAddress)) }
        var end: UInt64 = 0
        let ends = pieces.map { piece in
            end += UInt64(piece.0.byteCount)
            return end
        }
        targets.withUnsafeBufferPointer { targets in
            sources.withUnsafeBufferPointer { sources in
                ends.withUnsafeBufferPointer { ends in
                    var copy = nw_copy(
                        targets: targets.baseAddress, sources: sources.baseAddress, ends: ends.baseAddress,
                        count: UInt64(ends.count), fresh: isFresh ? 1 : 0, next: 0, done: 0, helpers: 0)
                    withUnsafeMutablePointer(to: &copy) {
                        nw_copy_start($0)
                        nw_copy_run($0, .max)
                        nw_copy_wait($0)
                    }
                }
            }
        }
        withExtendedLifetime(storages) {}
    }

    // MARK: The end

    /// Blocks until all saves of this run are durable.
    /// - Throws: `ClientError`: the first failure, each once.
    public func wait(timeout: Duration? = nil) throws(ClientError) {
        let start = Clock.monotonicSeconds
        for ticket in link.tickets {
            let left = timeout.map { max(.zero, $0 - .seconds(Clock.monotonicSeconds - start)) }
            do throws(ClientError) { try ticket.wait(timeout: left) } catch {
                // It is thrown here; the next save need not say it again.
                link.forget(error)
                throw error
            }
        }
        try link.throwFailure()
    }

    /// Blocks until entries.th and all checkpoints are durable.
    /// - Returns: the path of entries.th, or nil where nothing was logged.
    /// - Throws: `ClientError`.
    @discardableResult
    public func finish(timeout: Duration? = nil) throws -> String? {
        let wasFinished = isFinished.withLock { isFinished in
            defer { isFinished = true }
            return isFinished
        }
        guard !wasFinished else { return nil }
        let answer = try link.request(
            .finish, JSONPayload.encode(Finish(sequence: link.nextSequence())), timeout: timeout)
        let finished = try JSONPayload.decode(Finished.self, from: answer.payload)
        try wait(timeout: timeout)
        return finished.entriesPath
    }

    /// Lets go of the daemon; what it has accepted it finishes.
    public func close() { link.close() }
}
