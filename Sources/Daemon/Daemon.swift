/// The daemon as a whole: its listeners, connections and runs, and how it leaves. Owned by the intake queue.
import Dispatch
public import Posix
import Wire
public import Writer

@Intake
public final class Daemon {
    public nonisolated static let version = "0.1.0"

    let settings: Settings
    let runs: RunStore
    private let listeners: [OwnedFD]
    private let listeningPath: ListeningPath?
    private var listenSources: [any DispatchSourceRead] = []
    private var signalSources: [any DispatchSourceSignal] = []
    private var connections: [ObjectIdentifier: Connection] = [:]
    private let startSeconds = Clock.monotonicSeconds
    private var idleSince = Clock.monotonicSeconds
    private(set) var isDraining = false
    private let service = ServiceManager()
    /// All connections read through one buffer: the intake queue handles one event at a time.
    let receiveBuffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 16)

    /// - Throws: `ListenRefusal` where the socket can't be had.
    public nonisolated init(settings: Settings) throws(ListenRefusal) {
        self.settings = settings
        runs = RunStore(diskQueues: settings.diskQueues)
        let handed = ServiceManager.listeningSockets()
        if handed.isEmpty {
            let path = try ListeningPath(settings.socket)
            listeningPath = path
            listeners = [path.socket]
        } else {
            listeningPath = nil
            listeners = handed
        }
    }

    public func start() {
        for number in [Process.terminate, Process.interrupt] {
            Process.ignoreSignal(number)
            let source = DispatchSource.makeSignalSource(signal: number, queue: Intake.queue)
            source.setEventHandler { Intake.assumeIsolated { self.leave(because: "signal \(number)") } }
            source.activate()
            signalSources.append(source)
        }
        for listener in listeners {
            let source = DispatchSource.makeReadSource(fileDescriptor: listener.number, queue: Intake.queue)
            source.setEventHandler { Intake.assumeIsolated { self.acceptAll(on: listener) } }
            source.activate()
            listenSources.append(source)
        }
        journal("serving \(settings.socket), version \(Self.version)")
        service.notify("READY=1\nSTATUS=serving")
        if settings.exitIdleSeconds > 0 { checkIdle() }
    }

    private func acceptAll(on listener: OwnedFD) {
        do throws(PosixError) {
            while let socket = try UnixSocket.accept(on: listener) {
                let peer = try UnixSocket.peerCredentials(of: socket)
                guard peer.uid == Process.userID || peer.uid == 0 else {
                    journal(
                        "refused process \(peer.pid) of uid \(peer.uid): only uid \(Process.userID) and root are served"
                    )
                    continue
                }
                guard connections.count < Limits.connections, !isDraining else { continue }
                let connection = Connection(socket: socket, peer: peer, daemon: self)
                connections[ObjectIdentifier(connection)] = connection
                connection.start()
            }
        } catch { journal("accept: \(error)") }
    }

    func forget(_ connection: Connection) {
        connections[ObjectIdentifier(connection)] = nil
        idleSince = Clock.monotonicSeconds
    }

    private func checkIdle() {
        let idle = connections.isEmpty && runs.isIdle
        if !idle { idleSince = Clock.monotonicSeconds }
        if idle, Clock.monotonicSeconds - idleSince >= settings.exitIdleSeconds {
            return leave(because: "idle for \(Int(settings.exitIdleSeconds)) s")
        }
        let wait = min(1, max(0.05, settings.exitIdleSeconds / 4))
        Intake.queue.asyncAfter(deadline: .now() + wait) { Intake.assumeIsolated { self.checkIdle() } }
    }

    // MARK: Leaving

    /// Takes nothing new, finishes all that was accepted, and exits.
    private func leave(because reason: String) {
        guard !isDraining else { return }
        isDraining = true
        journal("leaving: \(reason)")
        service.notify("STOPPING=1\nSTATUS=finishing what was accepted")
        for source in listenSources { source.cancel() }
        // New trainers must find no socket of a daemon that is going.
        listeningPath?.remove()
        // First what is in flight, with the clients still listening; then the logs, which end with their connections.
        whenDurable(runID: nil, timeoutSeconds: settings.drainSeconds) { _ in
            for connection in self.connections.values { connection.close() }
            self.whenDurable(runID: nil, timeoutSeconds: self.settings.drainSeconds) { self.exit($0) }
        }
    }

    private func exit(_ result: Waited) {
        for failure in result.failed { journal("not written: \(failure.path): \(failure.message)") }
        if !result.done {
            journal("\(result.pending) checkpoints were not written within \(Int(settings.drainSeconds)) s")
            for run in runs.all { if let stalled = run.stalled { journal("stalled: \(stalled)") } }
        }
        Process.exit(result.done ? 0 : 1)
    }

    // MARK: Answers about all runs

    func whenDurable(
        runID: String?, timeoutSeconds: Double?, _ answer: @escaping @Sendable @Intake (Waited) -> Void
    ) {
        let waited = runs.all.filter { runID == nil || $0.name.runID == runID }
        let reply = Reply(remaining: waited.count) { done in
            answer(
                Waited(
                    done: done, pending: waited.reduce(0) { $0 + $1.status.checkpoints.inFlight },
                    failed: waited.flatMap(\.failures)))
        }
        if waited.isEmpty { return reply.give(done: true) }
        for run in waited { run.whenIdle { reply.oneEnded() } }
        if let timeoutSeconds {
            Intake.queue.asyncAfter(deadline: .now() + timeoutSeconds) {
                Intake.assumeIsolated { reply.give(done: false) }
            }
        }
    }

    /// Answers once: when all have ended, or when the time has.
    @Intake
    private final class Reply {
        private var remaining: Int
        private var answer: (@Sendable @Intake (Bool) -> Void)?

        init(remaining: Int, answer: @escaping @Sendable @Intake (Bool) -> Void) {
            self.remaining = remaining
            self.answer = answer
        }

        func oneEnded() {
            remaining -= 1
            if remaining == 0 { give(done: true) }
        }

        func give(done: Bool) {
            answer?(done)
            answer = nil
        }
    }

    var status: StatusReport {
        StatusReport(
            version: Self.version, pid: Process.id, uptimeSeconds: Clock.monotonicSeconds - startSeconds,
            socket: settings.socket, state: isDraining ? "draining" : "serving",
            connections: connections.count,
            runs: runs.all.map(\.status))
    }

    /// A line for the operator: systemd's journal, or the terminal.
    nonisolated func journal(_ line: String) { Process.writeToStandardError("noether-writerd: \(line)") }
}
