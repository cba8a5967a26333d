/// The command line tool: what the daemon does, and whether files are whole.
import ArgumentParser
import NoetherWriterClient
import Posix
import TorchFile
import Wire

@main
struct NoetherWriter: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "noether-writer",
        abstract: "Looks after checkpoints and logs that noether-writerd writes.",
        subcommands: [Status.self, Runs.self, Wait.self, Drain.self, Verify.self, MetricsCommand.self])
}

struct SocketOption: ParsableArguments {
    @Option(help: ArgumentHelp("The daemon's socket.", valueName: "path"))
    var socket: String?

    func connect() throws -> DaemonConnection {
        try DaemonConnection(socket: socket ?? DaemonConnection.defaultSocket())
    }
}

/// JSON messages that go out as they came.
struct Empty: Encodable {}

struct Status: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "What the daemon is doing.")
    @OptionGroup var socket: SocketOption
    @Flag(help: "Print the daemon's answer as JSON.") var json = false

    func run() throws {
        let report = try socket.connect().ask(.status, Empty(), StatusReport.self)
        if json { return print(String(decoding: try JSONPayload.encode(report), as: UTF8.self)) }
        let live = report.runs.filter { $0.state == .running }
        let inFlight = report.runs.reduce(0) { $0 + $1.checkpoints.inFlight }
        print(
            "noether-writerd \(report.version), process \(report.pid), \(report.state), up \(Int(report.uptimeS)) s"
        )
        print("socket       \(report.socket)")
        print("connections  \(report.connections)")
        print("runs         \(live.count) live, \(report.runs.count - live.count) ended")
        print(
            "checkpoints  \(inFlight) in flight, \(report.runs.reduce(0) { $0 + $1.checkpoints.durable }) durable"
        )
        for run in report.runs {
            if let stalled = run.stalled { print("STALLED      \(run.runId): \(stalled)") }
        }
    }
}

struct Runs: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "The runs that the daemon knows, a line each.")
    @OptionGroup var socket: SocketOption
    @Flag(help: "Print JSON.") var json = false

    func run() throws {
        let report = try socket.connect().ask(.status, Empty(), StatusReport.self)
        if json { return print(String(decoding: try JSONPayload.encode(report.runs), as: UTF8.self)) }
        for run in report.runs {
            let update = run.lastUpdate.map { "update \($0)" } ?? "no log"
            print(
                "\(run.runId)  \(run.state.rawValue)  process \(run.pid)  \(update)  "
                    + "\(run.checkpoints.durable) durable, \(run.checkpoints.inFlight) in flight, "
                    + "\(run.checkpoints.failed) failed  \(run.runDirectory)")
        }
    }
}

struct Wait: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Waits until all that was accepted is durable.",
        discussion: "Exit status: 0 all durable, 1 something failed, 2 not done within the time.")
    @OptionGroup var socket: SocketOption
    @Option(help: ArgumentHelp("At most so long.", valueName: "seconds")) var timeout: Double?
    @Argument(help: ArgumentHelp("Only this run.", valueName: "run")) var runID: String?

    func run() throws {
        let result = try socket.connect().ask(
            .wait, WaitRequest(runID: runID, timeoutSeconds: timeout), Waited.self)
        try result.tell()
    }
}

extension Waited {
    /// What is not durable, in words.
    /// - Throws: the exit status of `wait` and `drain` where something is not.
    func tell() throws {
        for failure in failed { print("failed  \(failure.path): \(failure.message)") }
        if !done {
            print("\(pending) checkpoints are still in flight")
            throw ExitCode(2)
        }
        if !failed.isEmpty { throw ExitCode(1) }
    }
}

struct Verify: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Checks files: structure, and the CRC of each record.",
        discussion: "Exit status: 0 all are whole, 1 one is broken or can't be read.")
    @Argument(help: "Files that torch.save or noether-writerd wrote.") var paths: [String]

    func run() throws {
        var broken = false
        for path in paths {
            do {
                let file = try MappedFile(path)
                let records = try ArchiveVerifier(file.bytes).verify()
                print("\(path): ok, \(records.count) records")
                withExtendedLifetime(file) {}
            } catch {
                broken = true
                print("\(path): BROKEN: \(error)")
            }
        }
        if broken { throw ExitCode(1) }
    }
}
