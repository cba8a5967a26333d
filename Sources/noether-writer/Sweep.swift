// SPDX-License-Identifier: Apache-2.0
/// The table of a sweep: runs, the best and the last value of chosen keys, and hyperparameters in which they differ.
import ArgumentParser
import Chart
import RunFiles
import Wire
import Writer

/// Keys of the log, each with the direction in which it is better.
struct ChosenKeys: ParsableArguments {
    @Option(
        name: .shortAndLong,
        help: ArgumentHelp(
            "Show the best and the last value of this key. The lowest is the best if its name has loss or error in it, or else "
                + "the highest. May be given several times.", valueName: "key"))
    var key: [String] = []
    @Option(help: ArgumentHelp("The same; the lowest value is the best.", valueName: "key")) var min: [String] = []
    @Option(help: ArgumentHelp("The same; the highest value is the best.", valueName: "key")) var max: [String] = []

    struct Column {
        var key: String
        var isHighest: Bool

        /// As tracker/summary.yaml has it.
        init(key: String) { self.init(key: key, isHighest: SummaryFile.isHigherBetter(key)) }

        init(key: String, isHighest: Bool) { (self.key, self.isHighest) = (key, isHighest) }

        func best(of found: LogDigest.Key) -> LogDigest.Place? { isHighest ? found.highest : found.lowest }

        var mode: String { isHighest ? "max" : "min" }
    }

    var isEmpty: Bool { key.isEmpty && min.isEmpty && max.isEmpty }

    var columns: [Column] {
        key.map { Column(key: $0) } + min.map { Column(key: $0, isHighest: false) }
            + max.map { Column(key: $0, isHighest: true) }
    }

    /// - Throws: `NotFound` if no run has one of the keys.
    static func check(_ columns: [Column], in runs: [FiledRun]) throws {
        guard !runs.isEmpty else { return }
        for column in columns where !runs.contains(where: { $0.log[column.key] != nil }) {
            let known = Sweep.names(runs.map { $0.log.keys.map(\.name) })
            throw NotFound(
                description: "no run here has the key \(column.key); "
                    + Names.hint(for: column.key, among: known, owner: "their log", nothing: "they have no log"))
        }
    }
}

struct Sweep {
    var runs: [FiledRun]
    var columns: [ChosenKeys.Column]

    /// Longer values lose their middle.
    private static let widestValue = 40

    var table: Table {
        let differing = Hyperparameters.differing(runs.map(\.hyperparameters))
        var titles: [Table.Column] = [
            .init(title: "RUN", isName: true), .init(title: "STATE"), .init(title: "UPDATE", right: true),
        ]
        for column in columns {
            titles.append(.init(title: Text.printable("\(column.mode) \(column.key)"), right: true))
            // Before the hyperparameters.
            titles.append(
                .init(title: Text.printable("last \(column.key)"), right: true, canBeMissed: 1 + differing.count))
        }
        for (place, name) in differing.enumerated() {
            titles.append(.init(title: Text.printable(name), right: true, canBeMissed: 1 + place))
        }
        var table = Table(titles)
        for run in runs {
            var cells: [Table.Cell] = [
                .init(run.name), .init(run.stateText, run.stateColour),
                .init(run.log.lastUpdate.map { "\($0)" } ?? "-"),
            ]
            for column in columns {
                let found = run.log[column.key]
                cells.append(Self.cell(found.flatMap(column.best)?.value))
                cells.append(Self.cell(found?.last?.value))
            }
            for name in differing { cells.append(Self.cell(hyperparameter: run.hyperparameters[name])) }
            table.add(cells)
        }
        return table
    }

    /// The cell for a value of the log.
    static func cell(_ value: EntryValue?) -> Table.Cell {
        let isOdd = value?.number.map { !$0.isFinite } ?? false
        return cell(value.map { Text.short($0) }, isOdd ? .red : nil)
    }

    /// As the person wrote it who chose it.
    static func cell(hyperparameter value: EntryValue?) -> Table.Cell { cell(value?.text, nil) }

    private static func cell(_ text: String?, _ colour: Text.Colour?) -> Table.Cell {
        .init(text.map { Text.clippedInTheMiddle(Text.printable($0), widestValue) } ?? "-", colour)
    }

    var json: String {
        let differing = Hyperparameters.differing(runs.map(\.hyperparameters))
        return Text.json(
            array: runs.map { run in
                func values(_ names: [String]) -> String {
                    Text.json(object: names.map { name in (name, run.hyperparameters[name].map { Text.json($0) }) })
                }
                return Text.json(object: [
                    ("run", Text.json(run.name)), ("run_directory", Text.json(run.directory)),
                    ("state", Text.json(run.stateText)), ("last_update", run.log.lastUpdate.map { "\($0)" }),
                    ("keys", Self.json(columns, of: run)), ("differing", values(differing)),
                    ("config", values(run.hyperparameters.names)),
                    ("problems", run.problems.isEmpty ? nil : Text.json(array: run.problems.map { Text.json($0) })),
                ])
            })
    }

    /// The best and the last value of keys, as a JSON object.
    static func json(_ columns: [ChosenKeys.Column], of run: FiledRun) -> String {
        Text.json(
            object: columns.map { column in
                let found = run.log[column.key]
                let best = found.flatMap(column.best)
                return (
                    column.key,
                    found.map { found in
                        Text.json(object: [
                            ("mode", Text.json(column.mode)), ("best", best.map { Text.json($0.value) }),
                            ("best_update", best.map { "\($0.update)" }),
                            ("last", found.last.map { Text.json($0.value) }),
                            ("last_update", found.last.map { "\($0.update)" }),
                        ])
                    }
                )
            })
    }

    /// All names of many lists, each once, in their order.
    static func names(_ lists: [[String]]) -> [String] {
        var seen: Set<ByteName> = []
        return lists.flatMap { $0 }.filter { seen.insert(ByteName($0)).inserted }
    }

    /// The order of runs: numbers come before texts, and missing values come last in either direction.
    struct Rank {
        private let number: Double?
        private let text: String
        private let highestFirst: Bool
        let isMissing: Bool

        init(_ value: EntryValue?, highestFirst: Bool = false) {
            number = value?.number.flatMap { $0.isNaN ? nil : $0 }
            text = value?.text ?? ""
            self.highestFirst = highestFirst
            isMissing = value == nil
        }

        func isBefore(_ other: Rank) -> Bool {
            switch (number, other.number) {
            case (let number?, let another?): highestFirst ? number > another : number < another
            case (.some, nil): true
            case (nil, .some): false
            case (nil, nil): ByteName(text) < ByteName(other.text)
            }
        }
    }
}
