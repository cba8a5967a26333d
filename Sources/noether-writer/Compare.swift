// SPDX-License-Identifier: Apache-2.0
/// `noether-writer compare RUN RUN...`: in what runs differ, side by side.
import ArgumentParser
import Posix
import RunFiles
import Wire
import Writer

struct Compare: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract:
            "Shows runs side by side: the hyperparameters in which they differ, the best and last value of each key.",
        discussion: """
            The runs are read from their files. Without --key, --min or --max the keys of tracker/summary.yaml are shown, with their \
            best value as that file has it.

            """
                + examples(
                    "noether-writer compare sweep/a sweep/b",
                    "noether-writer compare a b c --key loss/val --max accuracy",
                    "noether-writer compare a b --json | jq .differing"))
    @Argument(
        help: ArgumentHelp(
            "Ids or directories of runs, or patterns of them such as 'sweep/*'.",
            valueName: "run"),
        completion: .knownRuns)
    var names: [String]
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption
    @OptionGroup var chosen: ChosenKeys
    @Option(help: ArgumentHelp("Show at most this many keys, if none are chosen.", valueName: "count")) var keys = 20

    func run() throws {
        let found = try NamedRun.find(names, socket: socket)
        guard found.count > 1 else { throw ValidationError("name at least two different runs") }
        let runs = try zip(found, NamedRun.labels(of: found)).map { try FiledRun($0.directory, name: $1) }
        var problems = 0
        for run in runs {
            for problem in run.problems {
                problems += 1
                ThisProcess.writeToStandardError(Text.printable("noether-writer: run \(run.name): \(problem)"))
            }
        }
        var columns = chosen.columns
        if chosen.isEmpty {
            columns = Sweep.names(runs.map { $0.log.keys.map(\.name) }).filter(SummaryFile.isSummed)
                .map { ChosenKeys.Column(key: $0) }
        }
        try ChosenKeys.check(columns, in: runs)
        let sweep = Sweep(runs: runs, columns: columns)
        let differing = Hyperparameters.differing(runs.map(\.hyperparameters))
        if output.json {
            print(Text.json(object: [("differing", Self.json(differing, runs)), ("runs", sweep.json)]))
        } else {
            show(sweep, differing)
        }
        if problems > 0 { throw ExitCode.failure }
    }

    /// An object that has the values of all runs under each name, in the order of the runs.
    private static func json(_ names: [String], _ runs: [FiledRun]) -> String {
        Text.json(
            object: names.map { name in
                (name, Text.json(array: runs.map { $0.hyperparameters[name].map { Text.json($0) } ?? "null" }))
            })
    }

    private func show(_ sweep: Sweep, _ differing: [String]) {
        let runs = sweep.runs
        var table = Table(
            [.init(title: "", isName: true)]
                + runs.enumerated().map { place, run in
                    .init(title: Text.printable(run.name), right: true, canBeMissed: max(0, place - 1))
                })
        func add(_ name: String, _ cells: [Table.Cell]) { table.add([.init(name)] + cells) }
        func begin(_ section: String) {
            for title in ["", section] { table.add([.init(title, .bold)] + runs.map { _ in .init("") }) }
        }
        add("state", runs.map { .init($0.stateText, $0.stateColour) })
        add("last update", runs.map { .init($0.log.lastUpdate.map { "\($0)" } ?? "-") })
        if !differing.isEmpty { begin("HYPERPARAMETERS") }
        for name in differing { add(name, runs.map { Sweep.cell(hyperparameter: $0.hyperparameters[name]) }) }
        let shown = chosen.isEmpty ? sweep.columns.prefix(max(0, keys)) : sweep.columns[...]
        if !shown.isEmpty { begin("KEYS") }
        for column in shown {
            let found = runs.map { $0.log[column.key] }
            add("\(column.mode) \(column.key)", found.map { Sweep.cell($0.flatMap(column.best)?.value) })
            add("last \(column.key)", found.map { Sweep.cell($0?.last?.value) })
        }
        table.print(saysWhatIsMissing: true)
        var notes: [String] = []
        let left = sweep.columns.count - shown.count
        if left > 0 { notes.append("\(Text.count(left, "more key")) (--keys)") }
        let same = Sweep.names(runs.map(\.hyperparameters.names)).count - differing.count
        let rest = same > 0 ? "\(Text.count(same, "hyperparameter")) \(same == 1 ? "is" : "are") the same" : ""
        if differing.isEmpty {
            notes.append(rest.isEmpty ? "no hyperparameters are known" : "no hyperparameter differs; \(rest)")
        } else if !rest.isEmpty {
            notes.append(rest)
        }
        if !notes.isEmpty { print("") }
        for note in notes { print(Text.paint(note, .dim)) }
    }
}
