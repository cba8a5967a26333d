// SPDX-License-Identifier: Apache-2.0
/// `noether-writer stop` and `restart`: a daemon that a trainer or a person has started finishes and leaves.
import ArgumentParser
import NoetherWriterClient
import Posix
import Wire

struct Stop: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Ends the daemon when everything that it has accepted is durable.",
        discussion: """
            Returns when its process is gone. A trainer that has something to send then starts the next daemon, and \
            loses nothing. A daemon that systemd keeps is left as it is: the systemctl command for it is printed.
            Exit status: 0 it has left and everything is durable, 1 something failed, or systemd keeps it, 2 it has \
            not left within the time (it continues to), 3 there is no daemon.

            """ + examples("noether-writer stop", "noether-writer stop --timeout 60"))
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption
    @OptionGroup var limit: TimeoutOption

    func run() throws {
        var departure = Departure()
        try departure.endDaemon(at: socket, within: limit, asking: \.stop)
        try departure.tell(output)
    }
}

struct Restart: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Ends the daemon as stop does, and starts the next one.",
        discussion: """
            Trainers connect to the next one by themselves, and lose nothing. It is the program that \
            NOETHER_WRITER_DAEMON names, or the noether-writerd beside this program, or the one on PATH. If no daemon \
            is there, one is started.
            Exit status: 0 the next daemon serves and everything is durable, 1 something failed, or systemd keeps the \
            daemon, 2 it has not left within the time, and none was started, 3 none could be started.

            """ + examples("noether-writer restart"))
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption
    @OptionGroup var limit: TimeoutOption

    func validate() throws {
        guard socket.user == nil else {
            throw ValidationError("the next daemon would be root's: run restart as that user, or use stop --user")
        }
    }

    func run() throws {
        var departure = Departure()
        do { try departure.endDaemon(at: socket, within: limit, asking: \.restart) } catch {
            guard (error as? NoetherWriterError)?.isNoDaemon == true else { throw error }
        }
        if departure.gone {
            let next = try DaemonConnection(startingAt: socket.path)
            departure.started = next.welcome?.pid
            next.close()
        }
        try departure.tell(output)
    }
}

/// systemd would start it again.
struct KeptByService: Error, CustomStringConvertible {
    let socket: String
    let command: String?

    var description: String {
        "a service manager keeps the daemon at \(socket), and would start it again: "
            + (command.map { "run `\($0)`" } ?? "end it with that manager's command")
    }
}

/// How a daemon went, and which came.
private struct Departure: Encodable {
    /// The daemon's process; nil: there was none.
    var left: Int32?
    /// Its process is no more.
    var gone = true
    /// Everything that it had accepted is durable or failed.
    var done = true
    var pending = 0
    var failed: [Waited.Failure] = []
    var stalled: [Waited.Failure] = []
    /// The process of the next one.
    var started: Int32?

    /// - Parameter command: of systemd's, if that one keeps the daemon.
    /// - Throws: `NoetherWriterError.notListening` if there is none.
    mutating func endDaemon(
        at socket: SocketOption, within limit: TimeoutOption,
        asking command: KeyPath<Welcome.Service, String?>
    ) throws {
        let connection: DaemonConnection
        switch Result(catching: { try socket.connect(within: limit.duration) }) {
        case .success(let found): connection = found
        case .failure(let error):
            // One that is on its way out listens no more, and closes what came too late.
            guard let known = error as? NoetherWriterError, known.isNoDaemon || known == .closed,
                let last = ListeningPath.holder(of: socket.path)
            else { throw error }
            left = last.pid
            gone = Self.wait(limit) { last.hasEnded }
            return
        }
        let isGone = connection.lifeline()
        let welcome = connection.welcome
        left = welcome?.pid
        if let service = welcome?.service {
            throw KeptByService(socket: socket.path, command: service[keyPath: command])
        }
        let reason = Leave(reason: "noether-writer stop or restart")
        switch Result(catching: { try connection.ask(.leave, reason, Waited.self, timeout: limit.duration) }) {
        case .success(let waited):
            (done, pending, failed, stalled) = (waited.done, waited.pending, waited.failed, waited.stalled ?? [])
            gone = Self.wait(limit, isGone)
        case .failure(let error):
            guard (error as? NoetherWriterError)?.isTimeout == true else { throw error }
            (gone, done) = (false, false)
            look(connection)
        }
    }

    /// At what it still does.
    private mutating func look(_ connection: DaemonConnection) {
        guard let report = try? connection.ask(.status, Empty(), StatusReport.self, timeout: .seconds(1)) else {
            return
        }
        pending = report.allCheckpoints.reduce(0) { $0 + $1.inFlight }
        stalled = report.runs.compactMap { run in
            run.stalled.map { Waited.Failure(path: run.runDirectory, message: $0) }
        }
    }

    private static func wait(_ limit: TimeoutOption, _ isOver: () -> Bool) -> Bool {
        while !isOver() {
            guard limit.seconds ?? 1 > 0 else { return false }
            Clock.sleep(0.01)
        }
        return true
    }

    /// - Throws: the exit status, if it is not 0.
    func tell(_ output: JSONOption) throws {
        if try !output.print(self) {
            for failure in failed { print(Text.printable("failed  \(failure.words)")) }
            for stall in stalled { ThisProcess.writeToStandardError(Text.printable("stalled  \(stall.words)")) }
            print(words)
        }
        if !gone { throw ExitCode.timeout }
        if !done || !failed.isEmpty { throw ExitCode.failure }
    }

    private var words: String {
        var words: String
        if let left {
            words = "process \(left) "
            let inFlight = Text.count(pending, "checkpoint")
            if !gone {
                words += "has not left yet: \(inFlight) in flight; it takes nothing new, writes these, and leaves"
            } else if !done {
                words += "has left; within its drain_seconds storage did not take \(inFlight)"
            } else {
                words += "has left; "
                words += failed.isEmpty ? "everything that it had accepted is durable" : "the rest is durable"
            }
        } else {
            words = "no daemon was there"
        }
        return words + (started.map { "; process \($0) serves" } ?? "")
    }
}
