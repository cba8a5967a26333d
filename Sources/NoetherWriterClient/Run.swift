// SPDX-License-Identifier: Apache-2.0
/// A facade: `Session` keeps the session, `Ticket` what becomes of a save.
internal import Dispatch
public import FoundationEssentials
public import Logging
internal import Posix
internal import RunFiles
internal import Synchronization
internal import TorchFile
internal import Wire

/// A run with the daemon: its log and its checkpoints. Any thread may call.
///
/// The daemon may go away and come back: what it has not taken is kept here, and sent to the next one. A run that is
/// let go of without `finish(timeout:)` counts as interrupted; its log is written all the same.
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
    /// The update at which the run continues, or nil if it begins anew.
    public let resumedAt: Int64?
    private let session: Session

    /// What a run is opened with.
    private struct Opening: Sendable {
        var message: OpenRun
        var variables: Variables
        var socket: String
        var speaker: Speaker
        let resume: Resume?

        init(
            _ outputRoot: String, _ runID: String, _ stageName: String?, _ debug: Bool, _ configYAML: String?,
            _ tensorboard: Bool?, _ resumeAt: Int64?, _ resume: Resume?, _ keepLast: Int?, _ keepEvery: Int?,
            _ rank: Int?, _ worldSize: Int?, _ socket: String, _ logger: Logger?
        ) throws(NoetherWriterError) {
            variables = try Variables()
            self.socket = socket
            speaker = Speaker(logger: logger)
            self.resume = resume
            for (count, name) in [(keepLast, "keepLast"), (keepEvery, "keepEvery")] {
                guard let count, count < 0 else { continue }
                throw .unsupportedValue("\(name) must be a number of checkpoints, 0 or more, not \(count)")
            }
            if resume != nil, resumeAt != nil {
                throw .unsupportedValue("give either resume: .auto or resumeAt:, not both: nothing was begun")
            }
            try Names.check(runID, "runID")
            if let stageName { try Names.check(stageName, "stageName") }
            guard !outputRoot.utf8.contains(0) else {
                throw .refusedName("outputRoot \(outputRoot.debugDescription) holds a NUL; nothing was written")
            }
            if let configYAML, configYAML.utf8.count > Limits.payloadBytes / 2 {
                throw .unsupportedValue(
                    "config has \(configYAML.utf8.count) bytes as YAML; at most \(Limits.payloadBytes / 2): give "
                        + "hyperparameters, and no data")
            }
            let rank = rank ?? variables.rank
            message = OpenRun(
                outputRoot: FileSystem.absolute(outputRoot), runID: runID, stageName: stageName, debug: debug,
                session: Session.newID(), log: rank == 0, node: ThisProcess.hostName)
            message.configYaml = configYAML
            message.tensorboard = tensorboard ?? variables.tensorboard
            message.resumeAt = resumeAt
            message.progress = true
            message.umask = ThisProcess.fileModeMask
            message.keepLast = keepLast ?? variables.keepLast
            message.keepEvery = keepEvery ?? variables.keepEvery
            message.rank = rank
            message.worldSize = worldSize ?? variables.worldSize
        }

        func open() throws(NoetherWriterError) -> Opened {
            var message = message
            if resume == .auto {
                let parts = [
                    message.outputRoot, message.debug == true ? "debug" : nil, message.runId, message.stageName,
                ]
                Checkpoint.waitForRun(message.runId, socket: socket, speaker)
                message.resumeAt = try Checkpoint.resumableUpdate(
                    in: parts.compactMap(\.self).joined(separator: "/"))
            }
            let session = try Session(socket: socket, message, variables, speaker)
            do throws(NoetherWriterError) { try beginLog(session, message) } catch {
                session.close()
                throw error
            }
            return Opened(session: session, message: message)
        }

        private func beginLog(_ session: Session, _ message: OpenRun) throws(NoetherWriterError) {
            guard message.rank == 0 else { return }
            let directory = session.opened.runDirectory
            let entries = "\(directory)/tracker/entries.th"
            if let resumeAt = message.resumeAt {
                try resume(session, at: resumeAt, entries)
            } else if FileFacts(entries) != nil {
                speaker.warn(
                    "run \(message.runId) has a log already: \(entries). It is kept beside the new one, under a name with a "
                        + "number. To continue that log instead, open the run with resumeAt:, the last update to keep")
            }
        }

        /// Takes the log up to `update` on: from the daemon where it still has it, else from entries.th.
        private func resume(_ session: Session, at update: Int64, _ path: String) throws(NoetherWriterError) {
            let directory = session.opened.runDirectory
            if let count = session.opened.logEntries, count > 0 {
                session.resume(at: session.opened.logUpdate)
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
                    try session.waitForRoom()
                    try session.log(values.map { ($0.key, Scalar($0.value)) }, update: row)
                }
            }
            if (session.lastUpdate ?? .min) < update {
                let end = session.lastUpdate.map { "ends at update \($0)" } ?? "is empty"
                speaker.warn(
                    "resumeAt: \(update), but the log of run \(message.runId) \(end) (\(directory)): it continues from there"
                )
            }
        }
    }

    private struct Opened: Sendable {
        var session: Session
        var message: OpenRun
    }

    private init(_ opened: Opened) {
        session = opened.session
        runID = opened.message.runId
        rank = opened.message.rank ?? 0
        resumedAt = opened.message.resumeAt
        directory = session.opened.runDirectory
    }

    /// How an earlier training is continued.
    public enum Resume: Sendable, Equatable {
        /// At the update of its newest checkpoint; the run begins if it has none.
        case auto
    }

    /// Opens a run with the daemon; starts a daemon for this user if none listens. Holds no thread of the tasks.
    /// - Parameters:
    ///   - outputRoot: a directory, created if missing.
    ///   - runID: a path component.
    ///   - stageName: a path component, for runs in several stages.
    ///   - debug: puts the run below `debug/`.
    ///   - configYAML: text that becomes `tracker/config.yaml`.
    ///   - tensorboard: whether event files for TensorBoard are written; nil: as NOETHER_WRITER_TENSORBOARD says, else
    ///     as the daemon is set.
    ///   - resumeAt: keeps the log up to this update, also in the later entries.th; what comes after it is dropped. nil
    ///     begins an empty log.
    ///   - resume: `.auto` continues the run at the update of its newest checkpoint, as `resumeAt` does, or begins it
    ///     if it has none: see ``resumedAt``, and ``Checkpoint/latest(in:name:kind:info:update:verify:damaged:)`` for
    ///     the checkpoint to load. What an earlier process has handed to the daemon is waited for, for up to 30
    ///     seconds.
    ///   - keepLast: how many checkpoints with a tag of progress (E1_U200_S800) are kept, of each model and kind: the
    ///     newest ones; 0 keeps all. nil: as NOETHER_WRITER_KEEP_LAST says, else as the daemon is set.
    ///   - keepEvery: older ones whose update is a multiple of this stay too; 0 keeps none of them. nil: as
    ///     NOETHER_WRITER_KEEP_EVERY says, else as the daemon is set.
    ///   - rank: of this process in its job; ranks of one job share a run. nil: as RANK says, else 0.
    ///   - worldSize: how many processes the job has. nil: as WORLD_SIZE says, else 1.
    ///   - socket: the daemon's.
    ///   - logger: gets what this run says by itself: that the daemon is away, and what is lost when the process ends.
    ///     nil: standard error.
    /// - Throws: ``NoetherWriterError``; `storage` also if the log that is resumed can't be read from its file.
    public convenience init(
        outputRoot: String, runID: String, stageName: String? = nil, debug: Bool = false,
        configYAML: String? = nil, tensorboard: Bool? = nil, resumeAt: Int64? = nil, resume: Resume? = nil,
        keepLast: Int? = nil, keepEvery: Int? = nil, rank: Int? = nil, worldSize: Int? = nil,
        socket: String = DaemonConnection.defaultSocket(), logger: Logger? = nil
    ) async throws(NoetherWriterError) {
        let opening = try Opening(
            outputRoot, runID, stageName, debug, configYAML, tensorboard, resumeAt, resume, keepLast, keepEvery, rank,
            worldSize, socket, logger)
        self.init(try await offTasks { () throws(NoetherWriterError) in try opening.open() })
    }

    /// As the initializer, and blocks this thread.
    /// - Throws: ``NoetherWriterError``.
    @available(*, noasync, message: "it blocks a thread of the tasks: await Run(outputRoot:runID:)")
    public static func openBlocking(
        outputRoot: String, runID: String, stageName: String? = nil, debug: Bool = false,
        configYAML: String? = nil, tensorboard: Bool? = nil, resumeAt: Int64? = nil, resume: Resume? = nil,
        keepLast: Int? = nil, keepEvery: Int? = nil, rank: Int? = nil, worldSize: Int? = nil,
        socket: String = DaemonConnection.defaultSocket(), logger: Logger? = nil
    ) throws(NoetherWriterError) -> Run {
        let opening = try Opening(
            outputRoot, runID, stageName, debug, configYAML, tensorboard, resumeAt, resume, keepLast, keepEvery, rank,
            worldSize, socket, logger)
        return Run(try opening.open())
    }

    deinit { session.close() }

    // MARK: The log

    /// The last update that was logged, or that the run was resumed with.
    public var lastUpdate: Int64? { session.lastUpdate }
    /// The last update that survives power loss, as far as the daemon has said.
    public var logDurableUpdate: Int64? { session.durableUpdate }

    /// Logs one update's scalars in one frame. Does not wait for the daemon.
    /// - Parameters:
    ///   - values: by key, each key once: floats, integers, truth values and texts, as they are.
    ///   - update: larger than the last one, or equal to it: then the values are added to its row, and a key that the
    ///     row has already gets the later value, which is said once. nil: the update after the last one.
    ///   - epoch: logged under this key.
    ///   - sample: logged under this key.
    ///
    /// A process that is not rank 0 logs nothing, and says so once: the ranks of one job share a run and its log.
    /// - Throws: ``NoetherWriterError``; nothing of this update was logged then. Refusals of earlier ones, each once.
    public func log(
        _ values: KeyValuePairs<String, any ScalarConvertible>, update: (any BinaryInteger)? = nil,
        epoch: (any ScalarConvertible)? = nil, sample: (any ScalarConvertible)? = nil
    ) throws(NoetherWriterError) {
        try log(
            entry: values.map { ($0.key, $0.value.scalar) }, update, epoch: epoch?.scalar, sample: sample?.scalar)
    }

    /// As the above, with each value as a ``Scalar``.
    public func log(
        _ values: KeyValuePairs<String, Scalar>, update: (any BinaryInteger)? = nil, epoch: Scalar? = nil,
        sample: Scalar? = nil
    ) throws(NoetherWriterError) {
        try log(entry: values.map { ($0.key, $0.value) }, update, epoch: epoch, sample: sample)
    }

    /// As the above, of keys that are made while training.
    public func log(
        _ values: [(key: String, value: Scalar)], update: (any BinaryInteger)? = nil, epoch: Scalar? = nil,
        sample: Scalar? = nil
    ) throws(NoetherWriterError) {
        try log(entry: values, update, epoch: epoch, sample: sample)
    }

    /// As the above, of pairs in their order, or of a dictionary, whose keys are sorted.
    // A literal must not become a Dictionary, which has no order.
    @_disfavoredOverload
    public func log<Value: ScalarConvertible>(
        _ values: some Sequence<(key: String, value: Value)>, update: (any BinaryInteger)? = nil,
        epoch: (any ScalarConvertible)? = nil, sample: (any ScalarConvertible)? = nil
    ) throws(NoetherWriterError) {
        var entry = values.map { (key: $0.key, value: $0.value.scalar) }
        if values is [String: Value] { entry.sort { ByteName($0.key) < ByteName($1.key) } }
        try log(entry: entry, update, epoch: epoch?.scalar, sample: sample?.scalar)
    }

    private func log(
        entry values: [(key: String, value: Scalar)], _ update: (any BinaryInteger)? = nil, epoch: Scalar?,
        sample: Scalar?
    ) throws(NoetherWriterError) {
        guard rank == 0 else { return session.sayIsNotRankZero() }
        var number: Int64?
        if let update {
            guard let exact = Int64(exactly: update) else {
                throw .unsupportedValue("update \(update) does not fit into 64 bits")
            }
            number = exact
        }
        try session.throwRefusal()
        var entry: [(key: String, value: Scalar)] = []
        if let epoch { entry.append(("epoch", epoch)) }
        if let sample { entry.append(("sample", sample)) }
        entry += values
        try session.log(entry, update: number)
    }

    /// All values of a key over the run, from the daemon.
    /// - Throws: ``NoetherWriterError``, or `CancellationError`.
    public func values(_ key: String) async throws -> [(update: Int64, value: Scalar)] {
        var found: [(update: Int64, value: Scalar)] = []
        while true {
            let asked = try askValues(key, from: found.count)
            let answer = await asked.arrived(until: .after(DaemonConnection.answerTime))
            if answer == nil { try Task.checkCancellation() }
            if try Self.append(answer, to: &found) { return found }
        }
    }

    /// As `values(_:)`, and blocks this thread.
    /// - Throws: ``NoetherWriterError``.
    @available(*, noasync, message: "it blocks a thread of the tasks: await values(_:)")
    public func valuesBlocking(_ key: String) throws(NoetherWriterError) -> [(update: Int64, value: Scalar)] {
        var found: [(update: Int64, value: Scalar)] = []
        while true {
            let answer = try askValues(key, from: found.count).wait(
                until: .after(DaemonConnection.answerTime))
            if try Self.append(answer, to: &found) { return found }
        }
    }

    private func askValues(
        _ key: String, from start: Int
    ) throws(NoetherWriterError) -> Completion<Session.Answer> {
        let page = PageRequest(key: key, from: start, limit: Limits.pageItems)
        return session.ask(.values, try NoetherWriterError.typed { try JSONPayload.encode(page) })
    }

    /// - Returns: whether that is all.
    private static func append(
        _ answer: Session.Answer?, to found: inout [(update: Int64, value: Scalar)]
    ) throws(NoetherWriterError) -> Bool {
        guard let answer else { throw DaemonConnection.noAnswer(within: DaemonConnection.answerTime) }
        let frame = try answer.get()
        let page = try NoetherWriterError.typed { try ValuesPage(decoding: frame.payload) }
        found += zip(page.updates, page.values).map { ($0, Scalar($1)) }
        return found.count >= page.total || page.updates.isEmpty
    }

    // MARK: Checkpoints

    /// Saves `value` as `checkpoints/<name>[_<info>]_cp=<tag>_<kind>.th`; returns after one memory copy.
    /// - Throws: ``NoetherWriterError``; nothing was sent then. Failures of earlier saves, each once.
    @discardableResult
    public func save(
        _ name: String, tag: String, _ value: StateValue, kind: Kind = .model, info: String? = nil
    ) throws(NoetherWriterError) -> Ticket {
        try save(value, as: [Target(name, tag: tag, kind: kind, info: info)])
    }

    /// One snapshot under several names, from one copy: a tag and `latest`.
    /// - Throws: ``NoetherWriterError``; nothing was sent then. Failures of earlier saves, each once.
    @discardableResult
    public func save(_ value: StateValue, as targets: [Target]) throws(NoetherWriterError) -> Ticket {
        try session.checkOpen()
        var wire = targets.map {
            SavePayload.Target(
                kind: $0.kind.wire, name: $0.name, tag: $0.tag, info: $0.info, pickleOffset: 0,
                pickleLength: 0)
        }
        try Names.check(wire)
        try session.throwFailure()
        let folder = "\(directory)/checkpoints"
        let copy = try SavedCopy(value, session.pool, files: wire.map(\.fileName)) {
            (layout) throws(NoetherWriterError) in
            for target in wire { try Names.checkSize(target, below: folder, layout) }
        }
        for index in wire.indices {
            wire[index].pickleOffset = copy.pickleStarts[index]
            wire[index].pickleLength = copy.pickleLength
        }
        let ticket = Ticket(session, paths: wire.map { "\(folder)/\($0.fileName)" })
        try session.save(ticket, copy) { sequence, update in
            SavePayload(
                sequence: sequence, storageLengths: copy.lengths, storagesLength: copy.storagesEnd,
                buffer: copy.buffer.number, logUpdate: update, targets: wire)
        }
        return ticket
    }

    /// Returns the last update that was in the log when a checkpoint was saved. A run that continues from the
    /// checkpoint passes it as `resumeAt:`. The file keeps it in an extended attribute
    /// (user.noether_writer.log_update).
    /// - Returns: nil if nothing was logged, or if the file has lost the attribute because it was copied without
    ///   attributes or its file system keeps none.
    /// - Throws: ``NoetherWriterError/storage(path:message:errno:)`` if there is no such file.
    public static func logUpdate(ofCheckpoint path: String) throws(NoetherWriterError) -> Int64? {
        guard FileFacts(path) != nil else {
            let error = PosixError.missing(path)
            throw .storage(path: path, message: error.description, errno: error.errno)
        }
        return FileSystem.attribute(SavePayload.logUpdateAttribute, of: path).flatMap { Int64($0) }
    }

    // MARK: The end

    /// Returns when the daemon holds every update that was logged and every save that was begun: from then on they
    /// survive this process. Holds no thread.
    /// - Parameter timeout: for all of it; nil waits as long as the daemon is there.
    /// - Throws: ``NoetherWriterError``: `.unavailable` if the daemon has been away for a minute, `.timeout`; and what
    ///   the daemon refuses, each once. `CancellationError`.
    public func flush(timeout: Duration? = nil) async throws {
        let start = Clock.monotonicSeconds
        while try isWaited(since: start, timeout) { try await Task.sleep(for: .seconds(Self.flushPauseSeconds)) }
    }

    /// As ``flush(timeout:)``, and blocks this thread.
    /// - Throws: ``NoetherWriterError``.
    @available(*, noasync, message: "it blocks a thread of the tasks: await flush(timeout:)")
    public func flushBlocking(timeout: Duration? = nil) throws(NoetherWriterError) {
        let start = Clock.monotonicSeconds
        while try isWaited(since: start, timeout) { Clock.sleep(Self.flushPauseSeconds) }
    }

    /// The daemon acknowledges updates together, a few times in this time.
    private static let flushPauseSeconds = 0.002

    /// Whether the daemon does not have everything yet.
    private func isWaited(since start: Double, _ timeout: Duration?) throws(NoetherWriterError) -> Bool {
        try session.throwRefusal()
        let (updates, saves) = session.notTaken
        guard updates + saves > 0 else { return false }
        if let timeout {
            guard Clock.monotonicSeconds - start >= timeout.seconds else { return true }
            let left =
                "\(updates) update\(updates == 1 ? "" : "s") and \(saves) save\(saves == 1 ? "" : "s")"
            throw .timeout(
                waitingFor: session.awaySeconds > 0
                    ? "the daemon has been away for \(Int(session.awaySeconds)) s, and the time is over; "
                        + Session.keptWords
                    : "the daemon has not taken \(left) within \(Patience.words(timeout)) s; \(Session.keptWords)",
                stalled: nil)
        }
        guard session.awaySeconds <= Patience.awaySeconds else {
            throw .unavailable(
                "the daemon has been away for \(Int(session.awaySeconds)) s; \(Session.keptWords)")
        }
        return true
    }

    /// Returns when all saves of this run are durable. Holds no thread.
    /// - Parameter timeout: for all of it; nil waits as long as storage accepts data and the daemon is there.
    /// - Throws: ``NoetherWriterError``: the first failure, each once. `CancellationError`.
    public func waitUntilDurable(timeout: Duration? = nil) async throws {
        var patience = Patience(session, timeout)
        try await arrived(&patience)
    }

    /// As ``waitUntilDurable(timeout:)``, and blocks this thread.
    /// - Throws: ``NoetherWriterError``: the first failure, each once.
    @available(*, noasync, message: "it blocks a thread of the tasks: await waitUntilDurable(timeout:)")
    public func waitBlocking(timeout: Duration? = nil) throws(NoetherWriterError) {
        var patience = Patience(session, timeout)
        try wait(&patience)
    }

    private func arrived(_ patience: inout Patience) async throws {
        for ticket in session.tickets { try await ticket.arrived(&patience) }
        try session.throwFailure()
    }

    private func wait(_ patience: inout Patience) throws(NoetherWriterError) {
        for ticket in session.tickets { try ticket.wait(&patience) }
        try session.throwFailure()
    }

    /// Returns when entries.th and all checkpoints are durable. Whoever calls it again, or beside, shares its result; a
    /// call after a timeout waits on. What is logged after it opens the log again, and the next `finish` writes all of
    /// it. Holds no thread.
    /// - Parameter timeout: for all of it; nil waits as long as storage accepts data and the daemon answers.
    /// - Returns: where entries.th is, or nil if nothing was logged.
    /// - Throws: ``NoetherWriterError``; the daemon continues: call again to wait for it. `CancellationError`.
    @discardableResult
    public func finish(timeout: Duration? = nil) async throws -> URL? {
        var patience = Patience(session, timeout)
        let answer = try await session.finish().arrived(&patience, nil)
        let path = try Self.entriesPath(answer)
        try await arrived(&patience)
        try session.throwLogDamage()
        try session.throwRefusal()
        return path.map { URL(filePath: $0) }
    }

    /// As `finish(timeout:)`, and blocks this thread.
    /// - Returns: where entries.th is, or nil if nothing was logged.
    /// - Throws: ``NoetherWriterError``; the daemon continues: call again to wait for it.
    @discardableResult
    @available(*, noasync, message: "it blocks a thread of the tasks: await finish(timeout:)")
    public func finishBlocking(timeout: Duration? = nil) throws(NoetherWriterError) -> URL? {
        var patience = Patience(session, timeout)
        let path = try Self.entriesPath(session.finish().wait(&patience, nil))
        try wait(&patience)
        try session.throwLogDamage()
        try session.throwRefusal()
        return path.map { URL(filePath: $0) }
    }

    private static func entriesPath(_ answer: Session.Answer) throws(NoetherWriterError) -> String? {
        let finished: Finished = try DaemonConnection.decode(answer.get())
        return finished.entriesPath
    }

    /// As ``waitBlocking(timeout:)``.
    @available(*, deprecated, renamed: "waitBlocking(timeout:)")
    @available(*, noasync, message: "it blocks a thread of the tasks: await waitUntilDurable(timeout:)")
    public func wait(timeout: Duration? = nil) throws(NoetherWriterError) { try waitBlocking(timeout: timeout) }

    /// Nothing more is taken. What the daemon has accepted it finishes; what it does not have yet is kept in this
    /// process and sent, and tickets end as their saves do.
    public func close() { session.close() }
}

/// Opens a run for the time of `body`: finishes it when that returns, and closes it when that throws. The parameters
/// are
/// those of the initializer of ``Run``.
public func withRun<Result>(
    outputRoot: String, runID: String, stageName: String? = nil, debug: Bool = false,
    configYAML: String? = nil, tensorboard: Bool? = nil, resumeAt: Int64? = nil, resume: Run.Resume? = nil,
    keepLast: Int? = nil, keepEvery: Int? = nil, rank: Int? = nil, worldSize: Int? = nil,
    socket: String = DaemonConnection.defaultSocket(), logger: Logger? = nil,
    isolation: isolated (any Actor)? = #isolation, _ body: (Run) async throws -> Result
) async throws -> Result {
    let run = try await Run(
        outputRoot: outputRoot, runID: runID, stageName: stageName, debug: debug, configYAML: configYAML,
        tensorboard: tensorboard, resumeAt: resumeAt, resume: resume, keepLast: keepLast, keepEvery: keepEvery,
        rank: rank, worldSize: worldSize, socket: socket, logger: logger)
    defer { run.close() }
    let result = try await body(run)
    try await run.finish()
    return result
}
