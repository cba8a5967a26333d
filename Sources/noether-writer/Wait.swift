// SPDX-License-Identifier: Apache-2.0
/// `noether-writer wait`: until what was accepted is durable.
import ArgumentParser
import NoetherWriterClient
import Posix
import Wire

struct Wait: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Waits until everything that was accepted is durable.",
        discussion: "Exit status: 0 everything is durable, 1 something failed, 2 not done within the time.\n\n"
            + examples("noether-writer wait", "noether-writer wait 2026-01-01_abcde --timeout 60"))
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption
    @OptionGroup var limit: TimeoutOption
    @Argument(
        help: ArgumentHelp("Only this run: its id, or its directory.", valueName: "run"),
        completion: .knownRuns) var runID: String?

    func run() throws {
        let connection = try socket.connect(within: limit.duration)
        var known: String?
        if let name = runID {
            let report = try connection.ask(
                .status, Empty(), StatusReport.self, timeout: limit.duration)
            // A name that is mistyped has nothing in flight, and would be said to be durable.
            let found = try NamedRun(name, known: report.runs, socket)
            guard found.status != nil else {
                throw NotFound(description: "the daemon does not know a run \(name); its files were not touched")
            }
            known = found.runID
        }
        let result = try connection.ask(
            .wait, WaitRequest(runID: known, timeoutSeconds: limit.seconds), Waited.self,
            timeout: limit.withGrace)
        try result.tell(output)
    }
}

extension Waited {
    /// What is not durable, in words.
    /// - Throws: the exit status of `wait` and `drain` if something is not durable.
    func tell(_ output: JSONOption) throws {
        if try !output.print(self) {
            for failure in failed { print(Text.printable("failed  \(failure.words)")) }
            if !done { print("\(Text.count(pending, "checkpoint")) still in flight") }
            // For the log of the hook that asked.
            for stall in stalled ?? [] {
                ThisProcess.writeToStandardError(Text.printable("stalled  \(stall.words)"))
            }
        }
        if !done { throw ExitCode.timeout }
        if !failed.isEmpty { throw ExitCode.failure }
        if !output.json { print("all durable") }
    }
}

extension Waited.Failure {
    /// The path once.
    var words: String { message.contains(path) ? message : "\(path): \(message)" }
}
