// SPDX-License-Identifier: Apache-2.0
/// `noether-writer runs`: the daemon's runs, a line each.
import ArgumentParser
import Posix
import Wire

struct Runs: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Lists the runs that the daemon knows, one line each.",
        discussion: examples("noether-writer runs", "noether-writer runs --json | jq -r '.[].run_directory'"))
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption

    func run() throws {
        let report = try socket.status()
        if try output.print(report.runs) { return }
        guard !report.runs.isEmpty else { return print("no runs yet") }
        var table = Table([
            .init(title: "RUN", isName: true), .init(title: "STATE"), .init(title: "UPDATE", right: true),
            .init(title: "AGE", right: true), .init(title: "DURABLE", right: true),
            .init(title: "IN FLIGHT", right: true, canBeMissed: 1),
            .init(title: "FAILED", right: true, canBeMissed: 2),
            .init(title: "PROCESS", right: true, canBeMissed: 3),
            .init(title: "DIRECTORY", isName: true, canBeMissed: 4),
        ])
        for run in report.runs {
            let checkpoints = run.checkpoints
            table.add([
                .init(run.runId), .init(run.stateText, run.stateColour),
                .init(run.lastUpdate.map { "\($0)" } ?? "-"), .init(run.age), .init("\(checkpoints.durable)"),
                .init("\(checkpoints.inFlight)"),
                .init("\(checkpoints.failed)", checkpoints.failed > 0 ? .red : nil),
                .init("\(run.pid)"), .init(run.runDirectory),
            ])
        }
        table.print()
    }
}

extension RunStatus {
    /// Of the last update.
    var age: String { lastUpdateAt.map { Text.duration(Clock.wallSeconds - $0, coarse: true) } ?? "-" }

    var stateText: String { stalled == nil ? state.rawValue : "STALLED" }

    var stateColour: Text.Colour? {
        if stalled != nil { return .red }
        return switch state {
        case .running: .green
        case .interrupted: .yellow
        case .finished: nil
        }
    }
}
