// SPDX-License-Identifier: Apache-2.0
/// `noether-writer runs`: the daemon's runs, a line each; `runs DIR`: those below a directory, as the table of a sweep.
import ArgumentParser
import NoetherWriterClient
import Posix
import RunFiles
import Wire
import Writer

struct Runs: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Lists the runs that the daemon knows, or the runs below a directory with their hyperparameters.",
        discussion: """
            Without DIR the daemon is asked. With DIR the runs are found by their files, also ended ones, and no daemon is needed. \
            The table has the last update of each run, the best and the last value of each chosen key, and the hyperparameters in \
            which the runs differ. STATE is live if a daemon holds the run, unfinished if a daemon has left its log in a journal, or \
            else ended.

            """
                + examples(
                    "noether-writer runs", "noether-writer runs --json | jq -r '.[].run_directory'",
                    "noether-writer runs sweep --key loss/val --sort loss/val",
                    "noether-writer runs sweep --max accuracy --json | jq '.[].config'"))
    @Argument(
        help: ArgumentHelp("Show the runs at and below this directory. May be given several times.", valueName: "dir"),
        completion: .directory)
    var directories: [String] = []
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption
    @OptionGroup var chosen: ChosenKeys
    @Option(
        help: ArgumentHelp(
            "Sort by a key's best value, the best first, or by a hyperparameter, or by run, state or update.",
            valueName: "name"))
    var sort: String?
    @Flag(help: "Sort the other way round.") var reverse = false

    func validate() throws {
        if directories.isEmpty, sort != nil || reverse || !chosen.isEmpty {
            throw ValidationError("--key, --min, --max, --sort and --reverse are for `runs DIR`")
        }
    }

    func run() throws {
        if !directories.isEmpty { return try showSweep() }
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

    private func showSweep() throws {
        let (runs, isComplete) = try FiledRun.find(in: directories)
        var columns = chosen.columns
        if let sort, sort.isLogKey(of: runs), !columns.contains(where: { $0.key.isSame(as: sort) }) {
            columns.append(ChosenKeys.Column(key: sort))
        }
        try ChosenKeys.check(columns, in: runs)
        let sweep = Sweep(runs: try sorted(runs, columns), columns: columns)
        if output.json {
            print(sweep.json)
        } else if runs.isEmpty {
            print("no runs below \(Text.printable(directories.joined(separator: ", ")))")
        } else {
            sweep.table.print(saysWhatIsMissing: true)
        }
        if !isComplete { throw ExitCode.failure }
    }

    private func sorted(_ runs: [FiledRun], _ columns: [ChosenKeys.Column]) throws -> [FiledRun] {
        guard let sort else { return reverse ? runs.reversed() : runs }
        let order: [Sweep.Rank]
        if let column = columns.first(where: { $0.key.isSame(as: sort) }) {
            order = runs.map { .init($0.log[sort].flatMap(column.best)?.value, highestFirst: column.isHighest) }
        } else if runs.contains(where: { $0.hyperparameters[sort] != nil }) {
            order = runs.map { .init($0.hyperparameters[sort]) }
        } else {
            switch sort {
            case "run": order = runs.map { .init(.string($0.name)) }
            case "state": order = runs.map { .init(.string($0.stateText)) }
            case "update": order = runs.map { .init($0.log.lastUpdate.map { .int($0) }) }
            default:
                guard !runs.isEmpty else { return [] }
                let known =
                    Sweep.names(runs.map { $0.log.keys.map(\.name) }) + Sweep.names(runs.map(\.hyperparameters.names))
                throw NotFound(
                    description: "--sort \(sort): no run has a key or a hyperparameter of this name; "
                        + Names.hint(
                            for: sort, among: ["run", "state", "update"] + known, owner: "there", nothing: ""))
            }
        }
        let places = runs.indices.sorted { first, second in
            if order[first].isMissing || order[second].isMissing {
                return !order[first].isMissing || order[second].isMissing && first < second
            }
            if order[first].isBefore(order[second]) { return !reverse }
            if order[second].isBefore(order[first]) { return reverse }
            return first < second
        }
        return places.map { runs[$0] }
    }
}

extension String {
    fileprivate func isLogKey(of runs: [FiledRun]) -> Bool { runs.contains { $0.log[self] != nil } }
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
