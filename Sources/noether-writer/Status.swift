// SPDX-License-Identifier: Apache-2.0
/// `noether-writer status`: the daemon in a few lines.
import ArgumentParser
import Posix
import Wire

struct Status: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Shows what the daemon is doing.",
        discussion: examples("noether-writer status", "noether-writer status --json | jq .runs[].stalled"))
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption

    func run() throws {
        let report = try socket.status()
        if try output.print(report) { return }
        let live = report.runs.filter { $0.state == .running }.count
        let checkpoints = report.runs.map(\.checkpoints)
        let inFlight = checkpoints.reduce(0) { $0 + $1.inFlight }
        let total = checkpoints.reduce(0) { $0 + $1.bytesInFlight }
        let written = checkpoints.reduce(0) { $0 + ($1.bytesWritten ?? 0) }
        let failed = checkpoints.reduce(0) { $0 + $1.failed }
        func line(_ title: String, _ text: String, _ colour: Text.Colour? = nil) {
            print(Text.paint(Text.padded(title, 13), .bold) + Text.paint(Text.printable(text), colour))
        }
        let state = Text.paint(report.state, report.state == "serving" ? .green : .yellow)
        print(
            "noether-writerd \(report.version), process \(report.pid), \(state), up \(Text.duration(report.uptimeS))"
        )
        if let problem = report.settingsProblem { line("SETTINGS", problem, .red) }
        line("socket", report.socket)
        line("connections", "\(report.connections)")
        if let memory = report.memoryBytes { line("memory", Text.bytes(memory)) }
        line("runs", "\(live) live, \(report.runs.count - live) ended")
        let bytes = inFlight > 0 ? " (\(Text.bytes(written)) of \(Text.bytes(total)))" : ""
        line(
            "checkpoints",
            "\(inFlight) in flight\(bytes), \(checkpoints.reduce(0) { $0 + $1.durable }) durable, \(failed) failed",
            failed > 0 ? .red : nil)
        if let files = report.files {
            let bytes =
                files.checkpoints.inFlight > 0
                ? " (\(Text.bytes(files.checkpoints.bytesWritten ?? 0)) of \(Text.bytes(files.checkpoints.bytesInFlight)))"
                : ""
            line(
                "files",
                "\(files.checkpoints.inFlight) in flight\(bytes), \(files.checkpoints.durable) durable, "
                    + "\(files.checkpoints.failed) failed, of \(files.processes) process\(files.processes == 1 ? "" : "es")",
                files.checkpoints.failed > 0 ? .red : nil)
            if let stalled = files.stalled { line("STALLED", stalled, .red) }
        }
        for run in report.runs {
            // guard: said-by-the-cli (never)
            if let stalled = run.stalled { line("STALLED", "\(run.runId): \(stalled)", .red) }
        }
    }
}
