// SPDX-License-Identifier: Apache-2.0
/// The daemon as a whole: its listeners, connections and runs, from recovery to leaving. Owned by the daemon's queue.
import Dispatch
public import Posix
import Wire
public import Writer

@DaemonActor
public final class Daemon: ConnectionHost {
    /// At most so long from the start to the first connection.
    private static let recoverySeconds = 20.0
    /// Event files are for the eye: what storage does not take in this time after the end they lack.
    private static let showSeconds = 5.0

    private(set) var settings: Settings
    private let settingsSource: SettingsSource
    /// What is wrong with the settings that are wanted, and what is used in their place.
    private(set) var settingsProblem: String?
    let runs: RunStore
    private var listeners: [OwnedFD]
    /// The socket that this daemon has bound; nil if sockets were handed over.
    private let listeningPath: ListeningPath?
    /// The sockets that were handed over, with their locks, and those that this daemon has bound in their places.
    private var adopted: [ListeningPath] = []
    private var hasToldOfLostSocket = false
    private let inherited: InheritedDescriptors
    private var listenSources: [any DispatchSourceRead] = []
    private let signals: SignalWatch
    /// By token.
    private var connections: [UInt64: Connection] = [:]
    private var nextToken: UInt64 = 0
    private let poller: Poller
    private let shared: ConnectionResources
    private var connectionsOfUser: [UInt32: Int] = [:]
    /// Of all connections, in bytes (`Connection.heldByteCount`).
    private(set) var heldByteCount = 0
    private var isShedding = false
    private let startSeconds = Clock.monotonicSeconds
    private var idleSince = Clock.monotonicSeconds
    private(set) var isDraining = false
    /// What storage does not take is left to the next daemon.
    private var isGivingUp = false
    private var whenGivingUp: (() -> Void)?
    /// Who has asked this daemon to leave, and is told at its end what became of what it had accepted.
    private var farewells: [@DaemonActor (Waited) -> Void] = []
    var connectionCount: Int { connections.count }
    var subscriptionCount: Int { shared.subscriptionCount }
    private var metrics: Metrics { shared.metrics }
    let lifetime: LifetimeCounters
    private var metricsFile: MetricsFile?
    private let service: ServiceManager
    /// nil without a service manager.
    private var store: FDStore?
    /// nil: nobody starts this daemon again but a client.
    let commands: Welcome.Service?
    private var statusLine = ""
    /// The limits of the trainer that started this daemon which the daemon could not remove from itself; nil if none.
    private let confinement: Confinement?

    /// - Parameters:
    ///   - fileModeMask: of files of runs that bring none.
    ///   - settingsProblem: what is wrong with the settings that are wanted, and what is used in their place.
    ///   - settingsSource: read again on SIGHUP.
    /// - Throws: `ListenRefusal` where the socket can't be had.
    public nonisolated init(
        settings: Settings, inherited: InheritedDescriptors, signals: SignalWatch, fileModeMask: UInt32,
        startedByTrainer: Bool, settingsProblem: String?, reading settingsSource: SettingsSource
    ) throws(ListenRefusal) {
        self.settings = settings
        self.settingsProblem = settingsProblem
        self.settingsSource = settingsSource
        self.signals = signals
        let service = ServiceManager()
        self.service = service
        let confinement = startedByTrainer ? Confinement(of: ThisProcess.id) : nil
        self.confinement = confinement?.words.isEmpty == false ? confinement : nil
        runs = RunStore(
            diskQueues: settings.diskQueues, stateDirectory: settings.stateDirectory,
            logBytesPerRun: settings.logBytesPerRun, logBytes: settings.logBytes,
            retention: Retention(keepLast: settings.keepLast, keepEvery: settings.keepEvery),
            budget: SnapshotBudget(
                limit: UInt64(settings.snapshotBytes), limitPerRun: UInt64(settings.snapshotBytesPerRun),
                limitOfKeeper: service.isPresent
                    ? max(1, service.storeCapacity / FDStore.descriptorsPerSnapshot) : .max),
            vault: SnapshotVault(limit: UInt64(settings.restoreBytes)), fileModeMask: fileModeMask)
        lifetime = LifetimeCounters(in: settings.stateDirectory)
        self.inherited = inherited
        commands = service.isPresent || !inherited.listeners.isEmpty ? ServiceManager.commands : nil
        do { poller = try Poller() } catch { throw .system(error) }
        shared = ConnectionResources(poller: poller, runs: runs)
        if inherited.listeners.isEmpty {
            let path = try ListeningPath(settings.socket)
            listeningPath = path
            listeners = [path.socket]
        } else {
            listeningPath = nil
            listeners = inherited.listeners
        }
    }

    /// Recovers what a daemon before this one left, and only then listens and is ready.
    public func start() {
        for line in inherited.unrecognized { Log.write(.warning, line) }
        if let settingsProblem { Log.write(.error, settingsProblem) }
        lifetime.start(kept: service.isPresent ? inherited.keptNames : nil) {
            Log.write(
                .error,
                "lost: \($0), which a daemon before this one had accepted and not written when it was stopped: systemd's "
                    + "store has it no more", ["CHECKPOINT": $0])
        }
        runs.report = { Report.write($0) }
        runs.tensorboard = settings.tensorboard
        runs.startVault()
        runs.vault.livingSessions = { [unowned self] in Set(connections.values.map(\.session)) }
        runs.vault.hasGivenUp = { count, bytes in
            Log.writeLimited(
                .notice,
                "memory is short: \(count) of the files that restore_bytes keeps in memory were given up, \(bytes) bytes. "
                    + "They are on disk, and are read from there")
        }
        let paths = listeningPath.map { [$0.path] } ?? inherited.paths.map(\.path)
        runs.hasPredecessor = { paths.contains(where: ListeningPath.isBeingLeft) }
        signals.handler = { self.handle(signal: $0) }
        service.startWatchdog()
        adopt(until: Clock.monotonicSeconds + Self.handOverSeconds) { self.recover() }
    }

    /// Takes the locks of the sockets that were handed over. A daemon that a trainer has started may have them: it has
    /// lost its socket to the service manager's, notices that, and finishes what it has.
    private func adopt(until deadline: Double, _ completion: @escaping @Sendable @DaemonActor () -> Void) {
        guard !isDraining else { return }
        var held: [String] = []
        for (path, socket) in inherited.paths where !adopted.contains(where: { $0.path.isSame(as: path) }) {
            do throws(PosixError) {
                guard let locked = try ListeningPath(adopting: socket, at: path) else {
                    held.append("\(path) by \(ListeningPath.holder(of: path)?.name ?? "another daemon")")
                    continue
                }
                adopted.append(locked)
            } catch {
                // Where this user can make no file, no daemon of this user can replace the socket.
                guard !error.isForbidden else { continue }
                Log.write(.warning, "the socket is served without a lock: \(error)")
            }
        }
        guard !held.isEmpty else { return completion() }
        let words = "the lock of \(held.joined(separator: ", ")) is held"
        guard Clock.monotonicSeconds < deadline else {
            Log.write(
                .warning,
                "\(words), and was not given up within \(Int(Self.handOverSeconds)) s: this daemon serves without it. "
                    + "Run `noether-writer status` to see which daemon trainers find")
            return completion()
        }
        service.notify(
            ServiceManager.status("\(words): waiting for that daemon to finish") + "\nEXTEND_TIMEOUT_USEC=30000000")
        DaemonActor.enter(after: Self.handOverLookSeconds) { self.adopt(until: deadline, completion) }
    }

    /// How long a daemon that has lost its socket may take to finish what it has.
    private static let handOverSeconds = 60.0
    private static let handOverLookSeconds = 0.1

    private func recover() {
        service.notify(ServiceManager.status("recovering"))
        let store = FDStore(service) { self.lifetime.lostAtStart() }
        if service.isPresent { runs.keeper = store }  // guard: fd-store-keeps (never)
        self.store = service.isPresent ? store : nil
        // Checkpoints of storage that hangs are not waited for.
        DaemonActor.enter(after: Self.recoverySeconds) { self.serve() }
        // Logs first: a run whose checkpoints came back alone would end without its log. A long one comes while others
        // are served: what belongs to its run waits for it.
        var isLeft = true
        func restore() {
            guard isLeft else { return }
            isLeft = false
            // guard: fd-store-restores (= [:] for inherited.claimKept())
            store.restore(inherited.claimKept(), into: runs) { self.serve() }
        }
        runs.recover { problems in
            for problem in problems { Log.write(.error, "not recovered: \(problem)") }
            restore()
        }
        DaemonActor.enter(after: Self.logSeconds) { restore() }
    }

    private static let logSeconds = 1.0

    private func serve() {
        guard !isDraining, listenSources.isEmpty else { return }
        poller.start { event in
            DaemonActor.enter {
                let connection = self.connections[event.token & ~Connection.processBit]
                if event.token & Connection.processBit == 0 {
                    connection?.ready(event)
                } else {
                    connection?.processEnded()  // guard: lease-ends-with-its-process (skip)
                }
            }
        }
        for index in listeners.indices { listen(on: index) }
        Log.write(
            .notice,
            "serving \(listeningPath?.path ?? "\(listeners.count) socket(s) that were handed over"), version "
                + "\(Release.version)")
        if let confinement {
            Log.write(
                .warning,
                "as the trainer that started this daemon, and not to be changed: \(confinement.words.joined(separator: ", ")); "
                    + "it leaves when a process comes that may do more, which starts the next one")
        }
        service.notify("READY=1")
        sendStatus()
        checkIdle()
        if let path = settings.metricsFile {
            let file = MetricsFile(path, each: settings.metricsFileSeconds) { [unowned self] in
                hasSuccessor ? nil : metricsText(.prometheus)
            }
            metricsFile = file
            file.start()
        }
    }

    // MARK: Connections

    private func listen(on index: Int) {
        let source = DispatchSource.makeReadSource(
            fileDescriptor: listeners[index].number, queue: DaemonActor.queue)
        source.setEventHandler { DaemonActor.assumeIsolated { self.acceptAll(on: index) } }
        source.activate()
        listenSources.append(source)
    }

    /// The service manager still listens on a socket whose file somebody has removed, and does not notice: nobody finds
    /// this daemon there, and nobody else can have its lock.
    private func takeBack(_ index: Int) {
        let lost = adopted[index]
        let words = "somebody has removed or replaced \(lost.path) or its lock file"
        let reason: String
        do throws(PosixError) {
            if let found = try lost.restored() {
                adopted[index] = found
                if found.socket !== lost.socket {
                    listeners.append(found.socket)
                    listen(on: listeners.count - 1)
                }
                return Log.write(
                    .warning,
                    "\(words): this daemon has made it again, until it ends. Restart the unit of the socket, so that the "
                        + "next daemon is found too")
            }
            reason = "something else is there"
        } catch { reason = "\(error)" }
        guard !hasToldOfLostSocket else { return }
        hasToldOfLostSocket = true
        Log.write(
            .error,
            "\(words): trainers cannot find this daemon (\(reason)). Restart the unit of its socket")
    }

    private func acceptAll(on index: Int) {
        do throws(PosixError) {
            // A few at a time: a flood must not keep those that are connected waiting. The source fires again where
            // more wait.
            for _ in 0..<Self.acceptsAtOnce {
                guard !isDraining, let socket = try UnixSocket.accept(on: listeners[index]) else { return }
                let peer = try UnixSocket.peerCredentials(of: socket)
                // guard: uid-of-the-peer (always)
                guard peer.uid == ThisProcess.userID || peer.uid == 0, !ThisProcess.isNobody(peer.uid) else {
                    refuse(
                        socket, peer,
                        WireError(
                            .wrongUser,
                            "process \(peer.pid) is of uid \(peer.uid): only uid \(ThisProcess.userID) and root are served. Use a daemon "
                                + "of your own (NOETHER_WRITER_SOCKET)"))
                    continue
                }
                if connectionsOfUser[peer.uid, default: 0] >= Limits.connections { closeSilent(of: peer.uid) }
                // guard: connections-of-a-user (always)
                guard connectionsOfUser[peer.uid, default: 0] < Limits.connections else {
                    refuse(
                        socket, peer,
                        WireError(
                            .tooMany, "\(Limits.connections) connections are open; close some, or try again later"))
                    continue
                }
                nextToken += 1
                let connection = Connection(socket: socket, token: nextToken, peer: peer, host: self, shared: shared)
                try connection.start()
                connections[nextToken] = connection
                metrics.accepted()
                connectionsOfUser[peer.uid, default: 0] += 1
            }
        } catch {
            // Out of descriptors, most likely: the waiting connection would make the source fire without end.
            Log.writeLimited(.error, "accept: \(error)")
            listenSources[index].suspend()
            DaemonActor.enter(after: 1) { self.listenSources[index].resume() }
        }
    }

    private static let acceptsAtOnce = 32

    /// Makes room when a user has as many connections as are allowed. One process that connects and says nothing must
    /// not keep the others out.
    private func closeSilent(of uid: UInt32) {
        let silent = connections.values.filter { !$0.greeted && $0.peer.uid == uid }
        let byProcess = Dictionary(grouping: silent) { $0.peer.pid }
        guard let (pid, most) = byProcess.max(by: { $0.value.count < $1.value.count }),
            most.count > Limits.silentConnectionsPerProcess
        else { return }
        Log.writeLimited(
            .warning,
            "closing connections of process \(pid), which has \(most.count) that have said nothing: others need room"
        )
        for connection in most.sorted(by: { $0.token < $1.token }).dropLast(Limits.silentConnectionsPerProcess) {
            connection.fail(
                WireError(.tooMany, "\(most.count) connections of this process have said nothing, and others need room")
            )
        }
    }

    /// Before anything is made for it.
    private func refuse(_ socket: OwnedFD, _ peer: PeerCredentials, _ error: WireError) {
        metrics.refused(error.code)
        Log.writeLimited(.warning, "refused a connection of process \(peer.pid): \(error.message)")
        var message = ErrorMessage(error)
        message.fatal = true
        guard let payload = try? JSONPayload.encode(message) else { return }
        _ = try? Frame(.error, payload: payload).encoded().withUnsafeBytes {
            try UnixSocket.send(on: socket, $0)
        }
    }

    func metricsText(_ format: MetricsText.Format) -> String {
        lifetime.refresh()
        return metrics.text(format, of: self)
    }

    /// Whether another daemon serves where this one has stepped aside. The file of metrics is that one's.
    private var hasSuccessor: Bool { listeningPath?.isTakenOver ?? false }

    func forget(_ connection: Connection) {
        guard connections.removeValue(forKey: connection.token) != nil else { return }
        connectionsOfUser[connection.peer.uid, default: 1] -= 1  // guard: closed-ones-count-no-more (skip)
        idleSince = Clock.monotonicSeconds
    }

    /// Where all of them hold too much, those that hold most are closed: not one that happens to send just now.
    func holds(more change: Int) {
        heldByteCount += change
        guard heldByteCount > Limits.heldBytes, !isShedding else { return }  // guard: held-bytes (never)
        isShedding = true
        // Not from within the connection that told it.
        DaemonActor.enter {
            self.isShedding = false
            while self.heldByteCount > Limits.heldBytes,
                let largest = self.connections.values.max(by: { $0.heldByteCount < $1.heldByteCount })
            {
                largest.fail(
                    WireError(
                        .tooMany,
                        "all connections hold \(self.heldByteCount) bytes of unread and unfinished frames, this one most"
                    ))
                largest.close()
            }
        }
    }

    private func checkIdle() {
        for connection in connections.values { connection.checkDeadlines() }
        if let listeningPath, !listeningPath.isHeld {
            return leave(because: "somebody has removed or replaced \(listeningPath.path) or its lock file")
        }
        for index in adopted.indices where !isDraining && !adopted[index].isHeld { takeBack(index) }
        let limit = settings.exitIdleSeconds
        let idle = connections.isEmpty && runs.isIdle
        if !idle { idleSince = Clock.monotonicSeconds }
        if limit > 0, idle, Clock.monotonicSeconds - idleSince >= limit {
            return leave(because: "idle for \(Int(limit)) s")
        }
        let wait = limit > 0 ? min(1, max(0.05, limit / 4)) : 1
        DaemonActor.enter(after: wait) { self.checkIdle() }
    }

    // MARK: Signals

    private func handle(signal number: Int32) {
        if number == ThisProcess.hangUp {
            reload()
        } else {
            leave(because: number == ThisProcess.terminate ? "SIGTERM" : "SIGINT")
        }
    }

    /// Reads the settings anew. Bad ones change nothing.
    private func reload() {
        guard !isDraining else { return }
        service.notify("RELOADING=1\nMONOTONIC_USEC=\(UInt64(Clock.monotonicSeconds * 1e6))")
        do throws(SettingsError) {
            let new = try settingsSource.read()
            let fixed = settings.changedFixed(new)
            if !fixed.isEmpty {
                Log.write(
                    .warning, "\(fixed.joined(separator: ", ")) changed: that takes a restart of the daemon")
            }
            settings.applyChangeable(from: new)
            settingsProblem = nil
            if inherited.isByManager { settingsSource.keepCopy() }
            Log.write(.notice, "settings read again")
        } catch {
            settingsProblem = "\(error); the settings are as before"
            Log.write(.error, "settings not changed: \(error)")
        }
        service.notify("READY=1")
        statusLine = ""
    }

    // MARK: Status

    /// At most once a second, and only when the words have changed.
    private func sendStatus() {
        guard service.isPresent else { return }
        let line = StatusLine.text(
            runs.all, runs.paths, isDraining: isDraining, settingsProblem: settingsProblem)
        if line != statusLine {
            statusLine = line
            service.notify(ServiceManager.status(line))
        }
        DaemonActor.enter(after: 1) { self.sendStatus() }
    }

    var status: StatusReport {
        Faults.interrupt(at: "status")
        var report = StatusReport(
            version: Release.version, pid: ThisProcess.id, uptimeSeconds: Clock.monotonicSeconds - startSeconds,
            socket: listeningPath?.path ?? inherited.paths.first?.path ?? settings.socket,
            state: isDraining ? "draining" : "serving",
            connections: connections.count, runs: runs.all.map(\.status))
        report.memoryBytes = ThisProcess.memory.own
        report.settingsProblem = settingsProblem
        report.files = runs.paths.status
        return report
    }

    /// The living runs first, and as many as a frame holds.
    func fittingStatus() throws(WireError) -> StatusReport {
        var report = status
        report.runs =
            report.runs.filter { $0.state == .running } + report.runs.filter { $0.state != .running }
        let count = report.runs.count
        while try JSONPayload.encode(report).count > Limits.payloadBytes - 1024 {
            report.runs.removeLast(report.runs.count / 8 + 1)
            report.runsLeftOut = count - report.runs.count
        }
        return report
    }

    // MARK: Leaving

    /// A daemon whose limits are those of the trainer that started it is no daemon for one that has none. All that it
    /// has accepted
    /// it finishes first.
    func givesWay(to peer: PeerCredentials) -> Bool {
        guard let confinement, let theirs = Confinement(of: peer.pid), confinement.isTighter(than: theirs) else {
            return false
        }
        DaemonActor.enter {
            self.leave(because: "process \(peer.pid) may do more than this daemon, and needs another one")
        }
        return true
    }

    /// - Parameter answer: gets, at the very end, what is durable and what is not.
    func leave(because reason: String, _ answer: @escaping @DaemonActor (Waited) -> Void) {
        farewells.append(answer)
        leave(because: reason)
    }

    /// Takes nothing new, finishes all that was accepted, and exits.
    private func leave(because reason: String) {
        guard !isDraining else { return }
        isDraining = true
        Log.write(.notice, "leaving: \(reason)")
        service.notify("STOPPING=1")
        for source in listenSources { source.cancel() }
        // New trainers must find no socket of a daemon that is going.
        listeningPath?.remove()
        for path in adopted { path.remove() }
        let end = Clock.monotonicSeconds + settings.drainSeconds
        askForTime(until: end)
        makeWay(written: nil)
        for run in runs.all { run.forgetFailures() }
        runs.paths.forgetFailures()
        // First what is in flight, with the clients still listening; then the logs, which end with their connections.
        // All of it within one time, of which files leave the logs a moment.
        let ofLogs = min(Self.logSeconds, settings.drainSeconds / 4)
        whenDurable(runID: nil, timeoutSeconds: settings.drainSeconds - ofLogs, isLast: true) { _ in
            for connection in self.connections.values where !connection.hasAskedToLeave { connection.close() }
            self.runs.endAll()
            let limit = self.isGivingUp ? Self.logSeconds : max(0, end - Clock.monotonicSeconds)
            self.whenDurable(runID: nil, timeoutSeconds: limit, isLast: true) { result in
                let left = max(0, end - Clock.monotonicSeconds)
                self.runs.whenEventFilesAreWritten(within: min(Self.showSeconds, left)) { self.exit(result) }
            }
        }
    }

    private var bytesWritten: UInt64 {
        let files = (runs.paths.status?.checkpoints.bytesWritten ?? 0) + UInt64(runs.paths.outcomes.durableCount)
        return runs.all.reduce(files) {
            $0 + ($1.status.checkpoints.bytesWritten ?? 0) + UInt64($1.outcomes.durableCount)
        }
    }

    /// What storage does not take must not hold up trainers that write elsewhere. The next daemon may serve as soon as
    /// nothing moves here but that.
    private func makeWay(written before: UInt64?) {
        let now = bytesWritten
        let stalled = runs.all.flatMap(\.stalledFiles) + runs.paths.stalledFiles
        // Of files at any path the newest counts: one process writes them in order.
        guard now == before, !stalled.isEmpty, listeningPath == nil || runs.paths.isIdle else {
            return DaemonActor.enter(after: Self.makeWaySeconds) { self.makeWay(written: now) }
        }
        if let listeningPath {
            Log.write(.notice, "storage holds this daemon up: the next one may serve meanwhile, except runs held here")
            return listeningPath.stepAside()
        }
        // The manager starts the next one only after this one has ended. What is not written it keeps if it says so
        // (systemd 254).
        guard service.isPresent, service.keepsStore else { return }
        // If the trainer is gone, only this process has the rows that are not in a journal yet.
        guard runs.all.allSatisfy({ $0.isLive || $0.log.rowsNotWritten == 0 }) else {
            return DaemonActor.enter(after: Self.makeWaySeconds) { self.makeWay(written: now) }
        }
        isGivingUp = true
        whenGivingUp?()
    }

    private static let makeWaySeconds = 1.0

    /// Asks for more time until drain_seconds are over: whoever is killed before names nothing of what it gives up.
    private func askForTime(until end: Double) {
        guard service.isPresent else { return }
        service.notify("EXTEND_TIMEOUT_USEC=30000000")
        // In case that it is killed all the same, and says no last words.
        lifetime.leaves(inStore: store?.orphans ?? [:])
        guard Clock.monotonicSeconds < end else { return }
        DaemonActor.enter(after: 1) { self.askForTime(until: end) }
    }

    private static let keptWords = "; systemd's store has it for the next daemon"

    private func exit(_ result: Waited) {
        let failed = runs.all.flatMap(\.outcomes.newFailures) + runs.paths.outcomes.newFailures
        for failure in failed { Log.write(.error, "not written: \(failure.path): \(failure.message)") }
        if !result.done {
            // What an fd store keeps is not lost yet, nor is a log, which has a journal.
            let keeper =
                !service.isPresent
                ? "" : service.keepsStore ? Self.keptWords : "\(Self.keptWords) of a restart, and loses it at a stop"
            func fate(_ path: String) -> String {
                path.hasSuffix("/tracker/entries.th") ? "; its journal is kept for the next daemon" : keeper
            }
            let within = isGivingUp ? "not written" : "not written within \(Int(settings.drainSeconds)) s"
            for path in runs.paths.pendingPaths {
                Log.write(.error, "\(within): \(path)\(fate(path))", ["CHECKPOINT": path])
            }
            for run in runs.all {
                for path in run.pendingPaths {
                    Log.write(
                        .error,
                        "\(within): \(path)\(run.stalled.map { ": \($0)" } ?? "")\(fate(path))",
                        ["RUN_ID": run.name.runID, "CHECKPOINT": path])
                }
            }
        }
        if let store {
            lifetime.leaves(inStore: store.orphans)
            lifetime.wait()
        } else if !result.done {
            lifetime.lostAtStop(result.pending)
        }
        if !hasSuccessor { metricsFile?.remove() }
        var told = result
        told.failed = Array(failed.suffix(Limits.failuresRemembered))
        for tell in farewells { tell(told) }
        service.notifyAndWait(
            ServiceManager.status(result.done ? "all written" : "\(result.pending) checkpoints not written"))
        ThisProcess.exit(result.done && failed.isEmpty ? 0 : 1)
    }

    // MARK: Answers about all runs

    /// Answers when everything accepted so far has ended, and every log is durable, or when the time is over.
    func whenDurable(
        runID: String?, timeoutSeconds: Double?, _ answer: @escaping @Sendable @DaemonActor (Waited) -> Void
    ) {
        whenDurable(runID: runID, timeoutSeconds: timeoutSeconds, isLast: false, answer)
    }

    private func whenDurable(
        runID: String?, timeoutSeconds: Double?, isLast: Bool,
        _ answer: @escaping @Sendable @DaemonActor (Waited) -> Void
    ) {
        // A daemon that leaves does not wait for these: journals are on disk, and the fd store has the snapshots.
        if !isLast, !runs.notRestored(runID: runID).isEmpty {
            let start = Clock.monotonicSeconds
            let restored = Once<Bool> { isRestored in
                let left = timeoutSeconds.map { max(0, $0 - (Clock.monotonicSeconds - start)) }
                if isRestored { return self.whenDurable(runID: runID, timeoutSeconds: left, answer) }
                let missing = self.runs.notRestored(runID: runID)
                answer(
                    Waited(
                        done: false, pending: missing.count, failed: [],
                        stalled: Array(missing.prefix(Limits.failuresRemembered))))
            }
            runs.whenRestored(runID: runID) { restored.give(true) }
            if let timeoutSeconds { restored.give(after: timeoutSeconds) { false } }
            return
        }
        let waited = runs.all.filter { run in runID.map { run.name.runID.isSame(as: $0) } ?? true }
        // Files of no run are of nobody's run.
        let paths = runID == nil ? runs.paths : nil
        let reply = Once<Bool>(counting: waited.count * 2 + 1) { done in
            // Both together as many as a frame holds.
            let stalled = waited.flatMap(\.stalledFiles) + (paths?.stalledFiles ?? [])
            let stalls = done ? [] : Array(stalled.prefix(Limits.failuresRemembered))
            answer(
                Waited(
                    done: done,
                    // What came after the question is nobody's concern here.
                    pending: done
                        ? 0
                        : waited.reduce(paths?.status?.checkpoints.inFlight ?? 0) {
                            $0 + $1.status.checkpoints.inFlight
                        },
                    failed: Array(
                        (waited.flatMap(\.outcomes.failures) + (paths?.outcomes.failures ?? [])).suffix(
                            2 * Limits.failuresRemembered - stalls.count)),
                    stalled: stalls))
        }
        if let paths { paths.whenEnded { reply.count(then: true) } } else { reply.count(then: true) }
        for run in waited {
            run.whenEnded { reply.count(then: true) }
            run.log.sync { reply.count(then: true) }
        }
        if let timeoutSeconds { reply.give(after: timeoutSeconds) { false } }
        if isLast { whenGivingUp = { reply.give(false) } }
    }
}
