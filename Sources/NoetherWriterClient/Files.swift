// SPDX-License-Identifier: Apache-2.0
/// Files at any path, for programs that have no runs. One session of this process serves all of them. The daemon works
/// below this process's own root directory, so that a file is where this process looks, whatever the daemon sees.
internal import Posix
internal import Synchronization
internal import TorchFile
internal import Wire

/// Saves, loads and removes files at any path through the daemon, without a run.
///
/// Saves and removals of one path happen in the order of their calls, and the last one counts. Those of other paths do
/// not wait for it.
public enum Files {
    private static let known = Mutex<Session?>(nil)

    /// Saves what torch.load reads, to that path. It returns after one memory copy.
    /// - Parameters:
    ///   - value: what the file holds.
    ///   - path: relative to the working directory of this moment, or absolute; its directory must be there; a link is
    ///     followed. The new file has the mode of the one that it replaces, or else the one that this process's umask
    ///     gives it.
    /// - Throws: ``NoetherWriterError``; nothing was sent then. Failures of earlier saves, each once.
    @discardableResult
    public static func save(_ value: StateValue, to path: String) async throws(NoetherWriterError) -> Ticket {
        let target = try SavedPath(path)
        return try save(value, target, try await session())
    }

    /// As ``save(_:to:)``, and blocks this thread while it connects.
    /// - Throws: ``NoetherWriterError``; nothing was sent then. Failures of earlier saves, each once.
    @discardableResult
    @available(*, noasync, message: "it blocks a thread of the tasks: await save(_:to:)")
    public static func saveBlocking(_ value: StateValue, to path: String) throws(NoetherWriterError) -> Ticket {
        let target = try SavedPath(path)
        return try save(value, target, try openBlocking())
    }

    /// Waits for what is on its way to this path, then loads the file, as ``Checkpoint/load(_:verify:)`` does. It waits
    /// for saves and removals of this process and of all others that use the same daemon. If no daemon runs, nothing is
    /// on its way, and none is started. If the daemon still has the file in memory, and nobody has changed the file
    /// since, nothing is read from storage.
    /// - Throws: ``NoetherWriterError``: also why the last save of this path has failed, if nobody was told; the next
    ///   call reads the file that is there. `CancellationError`.
    public static func load(_ path: String, verify: Bool = false) async throws -> StateValue {
        // What cannot be the path of a save is for the file system to refuse.
        if let place = try? SavedPath.followed(SavedPath.located(path)) { try await waitFor(place) }
        return try await offTasks { () throws(NoetherWriterError) in
            let image = image(of: path)
            defer { withExtendedLifetime(image) {} }
            return try Checkpoint.load(
                path, from: image.map { "/proc/self/fd/\($0.number)" } ?? path, verify: verify)
        }
    }

    /// The bytes of a file in the daemon's memory; nil if the daemon has none of this very file. The file is there:
    /// whatever is wrong with the daemon, it can be read.
    private static func image(of path: String) -> OwnedFD? {
        guard let file = try? OwnedFD(reading: path), let stamp = try? FileStamp(of: file),
            let connection = try? DaemonConnection(
                socket: DaemonConnection.defaultSocket(), startsDaemon: false, Variables(), onEvent: { _, _ in })
        else { return nil }
        defer { connection.close() }
        guard connection.can("restore") else { return nil }
        let question = Restore(
            device: stamp.identity.device, inode: stamp.identity.inode, bytes: stamp.byteCount,
            modifiedNs: stamp.modified, changedNs: stamp.changed)
        guard let image = try? connection.askForDescriptor(.restore, question),
            (try? image.status().size) == stamp.byteCount
        else { return nil }
        return image
    }

    /// Removes a file after the saves of its path that were begun before, and returns at once. What is not there is
    /// removed.
    /// - Parameters:
    ///   - path: a link itself is removed, and not what it leads to.
    ///   - recursive: whether a directory is removed too, with all that is in it and all that was saved below it.
    ///   - after: paths: it happens only when what this process has saved there before is durable. If that has failed,
    ///     nothing is removed, and the ticket has the error.
    /// - Throws: ``NoetherWriterError``; nothing was removed then.
    @discardableResult
    public static func remove(
        _ path: String, recursive: Bool = false, after: [String] = []
    ) async throws(NoetherWriterError) -> Ticket {
        let place = try SavedPath.directory(path)
        if !recursive, (try? PathFacts(place, follows: false))?.isDirectory == true {
            throw .storage(
                path: place,
                message:
                    "\(place) is a directory: remove(path, recursive: true) removes it. Nothing was removed",
                errno: PosixError.isDirectory(place).errno)
        }
        var first: [String] = []
        for each in after { first.append(try SavedPath.directory(each)) }
        let session = try await session()
        let ticket = Ticket(session, paths: [place])
        try session.order(ticket, .remove) { sequence in
            try JSONPayload.encode(
                Remove(sequence: sequence, path: place, recursive: recursive, after: first.isEmpty ? nil : first))
        }
        return ticket
    }

    /// Returns when all that this process has saved with ``save(_:to:)`` is durable, and all that it has removed is
    /// gone. Holds no thread.
    /// - Parameter timeout: for all of it; nil waits as long as storage accepts data and the daemon is there.
    /// - Throws: ``NoetherWriterError``: the first failure, each once. `CancellationError`.
    public static func wait(timeout: Duration? = nil) async throws {
        guard let session = known.withLock({ $0 }) else { return }
        var patience = Patience(session, timeout)
        for ticket in session.tickets { try await ticket.arrived(&patience) }
        try session.throwFailure()
    }

    /// As ``wait(timeout:)``, and blocks this thread.
    /// - Throws: ``NoetherWriterError``: the first failure, each once.
    @available(*, noasync, message: "it blocks a thread of the tasks: await wait(timeout:)")
    public static func waitBlocking(timeout: Duration? = nil) throws(NoetherWriterError) {
        guard let session = known.withLock({ $0 }) else { return }
        var patience = Patience(session, timeout)
        for ticket in session.tickets { try ticket.wait(&patience) }
        try session.throwFailure()
    }

    // MARK: The session

    private static func message(_ session: String) -> OpenRun {
        var message = OpenRun(
            outputRoot: "/", runID: OpenRun.filesLayout, stageName: nil, debug: false, session: session, log: false,
            node: ThisProcess.hostName)
        message.layout = OpenRun.filesLayout
        message.progress = true
        return message
    }

    private static func session() async throws(NoetherWriterError) -> Session {
        if let session = known.withLock({ $0 }) { return session }
        return try await offTasks { () throws(NoetherWriterError) in try openBlocking() }
    }

    private static func openBlocking() throws(NoetherWriterError) -> Session {
        if let session = known.withLock({ $0 }) { return session }
        let made = try Session(
            socket: DaemonConnection.defaultSocket(), message(Session.newID()), Variables(), Speaker())
        let kept = known.withLock { session in
            if session == nil { session = made }
            return session ?? made
        }
        // Another thread was faster.
        if kept !== made { made.close() }
        return kept
    }

    private static func save(
        _ value: StateValue, _ target: SavedPath, _ session: Session
    ) throws(NoetherWriterError) -> Ticket {
        try session.throwFailure()
        let copy = try SavedCopy(value, session.pool, files: [target.path]) { (layout) throws(NoetherWriterError) in
            let found = try? ArchiveLayout(
                archiveName: target.archive, pickleLength: layout.pickleLength, storageLengths: layout.lengths)
            guard let found, found.imageLength <= Limits.imageBytes else { throw Names.tooLarge(target.path) }
        }
        let ticket = Ticket(session, paths: [target.path])
        try session.save(ticket, copy) { sequence, _ in
            SavePayload(
                sequence: sequence, storageLengths: copy.lengths, storagesLength: copy.storagesEnd,
                buffer: copy.buffer.number, logUpdate: nil, targets: [],
                files: [
                    SavePayload.File(
                        path: target.path, form: .torch, archive: target.archive, offset: copy.pickleStarts[0],
                        length: copy.pickleLength, umask: ThisProcess.fileModeMask, device: target.device)
                ])
        }
        return ticket
    }

    // MARK: Loading

    private static func waitFor(_ place: String) async throws {
        let session = known.withLock { $0 }
        if let session {
            for ticket in session.tickets
            where ticket.paths.contains(where: { SavedPath.isWithin(place, $0) || SavedPath.isWithin($0, place) }) {
                do { try await ticket.waitUntilDurable() } catch let error as NoetherWriterError {
                    throw ticket.failure == nil ? error : withOlder(error, place)
                }
            }
            if let error = session.failure(of: place) { throw withOlder(error, place) }
        }
        try await waitForOthers(place, session?.id)
    }

    /// The error of a save, which says what is to be loaded in its place.
    private static func withOlder(_ error: NoetherWriterError, _ place: String) -> NoetherWriterError {
        let isThere = (try? PathFacts(place, follows: false)) != nil
        let words =
            "the last save of \(place) has failed: \(error). \(place) "
            + "\(isThere ? "holds what was saved before it" : "is not there"); the next call of load reads what is there"
        guard case .storage(_, _, let number) = error else {
            return .storage(path: place, message: words, errno: PosixError.inputOutput(place).errno)
        }
        return .storage(path: place, message: words, errno: number)
    }

    /// After a daemon has died, for how long `load` waits for the next one, and how often it looks.
    private static let againSeconds = 2.0
    private static let againPauseSeconds = 0.05
    /// What other processes were told, and this one has thrown.
    private static let told = Mutex<Set<String>>([])

    /// Waits for what other processes have asked of the daemon for this path.
    /// - Parameter session: this process's: what it was told itself it is not told again.
    private static func waitForOthers(_ place: String, _ session: String?) async throws {
        var lostAt: Double?
        while true {
            do { return try await ask(place, session) } catch let error as NoetherWriterError {
                switch error.code {
                case .daemonNotFound, .wrongSocket:
                    // There is no daemon of this user.
                    if lostAt == nil { return }
                // It has died or left. Whoever waits for something from it starts the next one.
                case .daemonUnavailable: lostAt = lostAt ?? Clock.monotonicSeconds
                default: throw error
                }
            }
            if let lostAt, Clock.monotonicSeconds > lostAt + againSeconds { return }
            try await Task.sleep(for: .seconds(againPauseSeconds))
        }
    }

    private static func ask(_ place: String, _ session: String?) async throws {
        let connection = try await offTasks { () throws(NoetherWriterError) in try opened(session) }
        guard let connection else { return }
        // Who says goodbye ends the session, which may be this process's other connection's too.
        defer { if session == nil { connection.close() } else { connection.drop() } }
        let seconds = Patience.stallSeconds
        while true {
            let question = try NoetherWriterError.typed {
                try JSONPayload.encode(WaitPath(path: place, timeoutSeconds: seconds))
            }
            let waited: Waited = try DaemonConnection.decode(
                await connection.answer(
                    .waitPath, question, timeout: .seconds(seconds) + DaemonConnection.answerTime))
            if waited.done {
                for failure in waited.failed where told.withLock({ $0.insert(failure.message).inserted }) {
                    let number = failure.errno ?? PosixError.inputOutput(place).errno
                    throw withOlder(.storage(path: place, message: failure.message, errno: number), place)
                }
                return
            }
            if let stalled = waited.stalled?.first {
                throw NoetherWriterError.timeout(waitingFor: place, stalled: stalled.message)
            }
        }
    }

    /// A connection that may ask about paths, or nil: an older daemon has no such saves.
    private static func opened(_ session: String?) throws(NoetherWriterError) -> DaemonConnection? {
        let connection = try DaemonConnection(
            socket: DaemonConnection.defaultSocket(), startsDaemon: false, Variables()
        ) { _, _ in }
        do throws(NoetherWriterError) {
            guard connection.can(OpenRun.filesLayout) else {
                connection.close()
                return nil
            }
            _ = try Session.open(connection, message(session ?? Session.newID()))
        } catch {
            connection.drop()
            throw error
        }
        return connection
    }
}
