// SPDX-License-Identifier: Apache-2.0
/// A facade: `Link` keeps the session, `Ticket` what becomes of a save.
internal import Dispatch
internal import CCopy
internal import Posix
internal import RunFiles
internal import Synchronization
internal import TorchFile
internal import Wire

/// A run with the daemon: its log and its checkpoints. Any thread may call.
///
/// The daemon may go away and come back: what it has not taken is kept here, and sent to the next one. A run that is
/// let go of without ``finish(timeout:)`` counts as interrupted; its log is written all the same.
public final class Run: Sendable {
    /// What a file holds; a part of its name.
    public enum Kind: String, Sendable, CaseIterable {
        /// A model's weights.
        case model
        /// An optimizer's state.
        case optim
        /// Where the training is.
        case trainer

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
        /// The model's.
        public var name: String
        /// When it was saved, as `E1_U200_S800`, or `latest`.
        public var tag: String
        /// What the file holds.
        public var kind: Kind
        /// More about a model, as `ema=0.9`.
        public var info: String?

        /// A file's name; each part is a path component, without slashes and control characters.
        public init(_ name: String, tag: String, kind: Kind = .model, info: String? = nil) {
            self.name = name
            self.tag = tag
            self.kind = kind
            self.info = info
        }
    }

    /// As it was opened with.
    public let runID: String
    /// This process's number among those that share the run; 0 logs.
    public let rank: Int
    /// `<output_root>[/debug]/<run_id>[/<stage_name>]`.
    public let directory: String
    private let link: Link
    private let isFinished = Mutex(false)

    /// Opens a run with the daemon; starts a daemon for this user if none listens.
    /// - Parameters:
    ///   - outputRoot: an absolute path; it is created if it is missing.
    ///   - runID: a path component.
    ///   - stageName: a path component, for runs in several stages.
    ///   - debug: puts the run below `debug/`.
    ///   - configYAML: text that becomes `tracker/config.yaml`.
    ///   - tensorboard: whether event files for TensorBoard are written; nil: as NOETHER_WRITER_TENSORBOARD says, else
    ///     as the daemon is set.
    ///   - resumeAt: keeps the log up to this update, also in the later entries.th; what comes after it is dropped. nil
    ///     begins an empty log.
    ///   - rank: of this process in its job; ranks of one job share a run. nil: as RANK says, else 0.
    ///   - worldSize: how many processes the job has. nil: as WORLD_SIZE says, else 1.
    ///   - socket: the daemon's.
    /// - Throws: ``ClientError``; `storage` also if the log to resume cannot be read from its file.
    public init(
        outputRoot: String, runID: String, stageName: String? = nil, debug: Bool = false,
        configYAML: String? = nil, tensorboard: Bool? = nil, resumeAt: Int64? = nil,
        rank: Int? = nil, worldSize: Int? = nil, socket: String = DaemonConnection.defaultSocket()
    ) throws {
        let variables = try Variables()
        self.runID = runID
        self.rank = rank ?? variables.rank
        var message = OpenRun(
            outputRoot: outputRoot, runID: runID, stageName: stageName, debug: debug,
            session: Self.newSession(),
            log: self.rank == 0, node: Process.hostName)
        message.configYaml = configYAML
        message.tensorboard = tensorboard ?? variables.tensorboard
        message.resumeAt = resumeAt
        message.progress = true
        message.umask = Process.fileModeMask
        message.rank = self.rank
        message.worldSize = worldSize ?? variables.worldSize
        link = try Link(socket: socket, message, variables)
        directory = link.opened.runDirectory
        guard self.rank == 0 else { return }
        let entries = "\(directory)/tracker/entries.th"
        if let resumeAt {
            try resume(at: resumeAt, entries)
        } else if FileFacts(entries) != nil {
            Link.warn(
                "run \(runID) has a log already: \(entries). When this one ends, that one is kept beside it under another name. "
                    + "To continue that log instead, open the run with resumeAt:"
            )
        }
    }

    /// Resumes the log up to `update`: from the daemon if it still has it, or else from entries.th.
    private func resume(at update: Int64, _ path: String) throws(ClientError) {
        if let count = link.opened.logEntries, count > 0 {
            link.resume(at: link.opened.logUpdate)
        } else if FileFacts(path) != nil {
            let entries: RunLogData
            do throws(RunFilesError) { entries = try RunFiles(directory).log() } catch {
                throw .storage(
                    path: path,
                    message:
                        "the log to resume can't be read (\(error)): it is left as it is. `noether-writer verify` "
                        + "says what is broken; move it away to begin with an empty log",
                    errno: PosixError.inputOutput(path).errno)
            }
            for (row, values) in entries.rows(through: update) {
                try link.waitForRoom()
                try link.log(values.map { ($0.key, Scalar($0.value)) }, update: row)
            }
        }
        if (lastUpdate ?? .min) < update {
            let end = lastUpdate.map { "ends at update \($0)" } ?? "is empty"
            Link.warn(
                "resumeAt: \(update), but the log of run \(runID) \(end) (\(directory)): it continues from there"
            )
        }
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

    /// The last update that was logged, or that the run was resumed with.
    public var lastUpdate: Int64? { link.lastUpdate }
    /// The last update that survives power loss, as far as the daemon has said.
    public var logDurableUpdate: Int64? { link.durableUpdate }

    /// Logs one update's scalars in one frame. Does not wait for the daemon.
    /// - Parameters:
    ///   - values: by key, each key once.
    ///   - update: larger than the last one.
    ///   - epoch: logged under this key.
    ///   - sample: logged under this key.
    /// - Throws: ``ClientError``; nothing of this update was logged then. Refusals of earlier ones, each once.
    public func log(
        _ values: KeyValuePairs<String, Scalar>, update: Int64, epoch: Scalar? = nil, sample: Scalar? = nil
    ) throws(ClientError) {
        try log(values.map { ($0.key, $0.value) }, update: update, epoch: epoch, sample: sample)
    }

    /// As ``log(_:update:epoch:sample:)-(KeyValuePairs<String,Scalar>,_,_,_)``, of keys that are made while training.
    public func log(
        _ values: [(key: String, value: Scalar)], update: Int64, epoch: Scalar? = nil, sample: Scalar? = nil
    ) throws(ClientError) {
        guard rank == 0 else { throw .notRankZero(rank: rank) }
        try link.throwFailure()
        var entry: [(key: String, value: Scalar)] = []
        if let epoch { entry.append(("epoch", epoch)) }
        if let sample { entry.append(("sample", sample)) }
        entry += values
        try link.log(entry, update: update)
    }

    /// All values of a key over the run, from the daemon.
    /// - Throws: ``ClientError``.
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
    /// - Throws: ``ClientError``; nothing was sent then. Failures of earlier saves, each once.
    @discardableResult
    public func save(
        _ name: String, tag: String, _ value: StateValue, kind: Kind = .model, info: String? = nil
    ) throws -> Ticket {
        try save(value, as: [Target(name, tag: tag, kind: kind, info: info)])
    }

    /// One snapshot under several names, from one copy: a tag and `latest`.
    /// - Throws: ``ClientError``; nothing was sent then. Failures of earlier saves, each once.
    @discardableResult
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
                "a save must have 1 to \(Limits.targets) targets, and at most \(Limits.storages) storages")
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
        let buffer = try link.pool.take(Int(end))
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
            link.pool.release(buffer.number)
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
                        count: UInt64(ends.count), fresh: isFresh ? 1 : 0, next: 0, done: 0, helpers: 0,
                        guarded: 0, failed: 0)
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

    /// The last update in the log when a checkpoint was saved: `resumeAt:` continues the log from there. It is an
    /// extended attribute of the file (user.noether_writer.log_update).
    /// - Returns: nil if nothing was logged, or if the file has lost it: by a copy without attributes, or on a file
    ///   system that keeps none.
    /// - Throws: ``ClientError/storage(path:message:errno:)`` if there is no such file.
    public static func logUpdate(ofCheckpoint path: String) throws(ClientError) -> Int64? {
        guard FileFacts(path) != nil else {
            let error = PosixError.missing(path)
            throw .storage(path: path, message: error.description, errno: error.errno)
        }
        return FileSystem.attribute(SavePayload.logUpdateAttribute, of: path).flatMap { Int64($0) }
    }

    // MARK: The end

    /// Blocks until all saves of this run are durable.
    /// - Throws: ``ClientError``: the first failure, each once.
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
    /// - Returns: the path of entries.th, or nil if nothing was logged.
    /// - Throws: ``ClientError``.
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
