// SPDX-License-Identifier: Apache-2.0
/// `noether-writer show RUN`: all that is known of one run.
import ArgumentParser
import Posix
import RunFiles
import Wire

struct Show: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Shows one run: who writes it, how far it is, the last value of each key, its last checkpoints.",
        discussion: examples(
            "noether-writer show 2026-01-01_abcde", "noether-writer show /data/runs/2026-01-01_abcde --json"))
    @OptionGroup var argument: RunArgument
    @OptionGroup var output: JSONOption
    @Option(help: ArgumentHelp("Show at most this many keys.", valueName: "count")) var keys = 20

    private struct Shown: Encodable {
        struct Key: Encodable {
            var key: String
            var values: Int
            var lastUpdate: Int64?
            var lastValue: String?
            /// As a person reads it; no part of the JSON.
            var shown: String?

            private enum CodingKeys: String, CodingKey { case key, values, lastUpdate, lastValue }
        }
        var runId: String
        var runDirectory: String
        /// running, finished or interrupted; of a run that the daemon does not know: ended, or in words what is
        /// missing.
        var state: String
        var run: RunStatus?
        var lastUpdate: Int64?
        var keys: [Key]
        var checkpoints: [CheckpointRow]
    }

    func run() throws {
        let found = try argument.find()
        let log = try found.log()
        let all = log.keys.map { key in
            let series = log.series(key)
            return Shown.Key(
                key: key, values: series?.updates.count ?? 0, lastUpdate: series?.updates.last,
                lastValue: series?.values.last?.text, shown: series?.values.last.map { Text.short($0) })
        }
        let shown = Shown(
            runId: found.runID, runDirectory: found.directory,
            state: try found.status?.state.rawValue ?? found.stateOfFiles(), run: found.status,
            lastUpdate: found.status?.lastUpdate ?? log.lastUpdate, keys: all,
            checkpoints: try CheckpointRow.all(of: found))
        if try output.print(shown) { return }
        show(shown)
    }

    private func show(_ shown: Shown) {
        func line(_ title: String, _ text: String, _ colour: Text.Colour? = nil) {
            print(Text.paint(Text.padded(title, 13), .bold) + Text.paint(Text.printable(text), colour))
        }
        line("run", shown.runId)
        line("state", shown.run?.stateText ?? shown.state, shown.run?.stateColour)
        if let run = shown.run {
            if let stalled = run.stalled { line("STALLED", stalled, .red) }
            line("process", "\(run.pid) on \(run.node)")
        }
        line("directory", shown.runDirectory)
        let ago = shown.run?.lastUpdateAt.map {
            ", \(Text.duration(Clock.wallSeconds - $0, coarse: true)) ago (\(Clock.local($0)))"
        }
        line("last update", shown.lastUpdate.map { "\($0)\(ago ?? "")" } ?? "none logged")
        if let run = shown.run, run.lastUpdate != nil {
            if run.state != .running, run.logDurableUpdate == run.lastUpdate {
                line("log", "all of it is in tracker/entries.th, safe from power loss")
            } else {
                let written = run.logWrittenUpdate.map { "to \($0)" } ?? "nothing yet"
                let durable = run.logDurableUpdate.map { "to \($0)" } ?? "nothing yet"
                line("log is safe", "\(durable) from power loss, \(written) from the daemon's death")
            }
        }
        let counts = Dictionary(grouping: shown.checkpoints, by: \.state).mapValues(\.count)
        let states = ["durable", "writing", "accepted", "written", "stalled", "failed"].compactMap { state in
            counts[state].map { "\($0) \(state)" }
        }
        line("checkpoints", states.isEmpty ? "none" : states.joined(separator: ", "))
        if !shown.keys.isEmpty {
            print("")
            var table = Table([
                .init(title: "KEY", isName: true), .init(title: "VALUES", right: true),
                .init(title: "AT", right: true),
                .init(title: "LAST"),
            ])
            for key in shown.keys.prefix(max(0, keys)) {
                table.add([
                    .init(key.key), .init("\(key.values)"), .init(key.lastUpdate.map { "\($0)" } ?? ""),
                    .init(key.shown ?? ""),
                ])
            }
            table.print()
            let left = shown.keys.count - max(0, keys)
            if left > 0 { print("... and \(left) more (--keys)") }
        }
        if !shown.checkpoints.isEmpty {
            print("")
            CheckpointRow.table(shown.checkpoints.suffix(8)).print()
            if shown.checkpoints.count > 8 {
                print("... and \(shown.checkpoints.count - 8) before (noether-writer checkpoints)")
            }
        }
    }
}
