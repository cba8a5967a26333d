// SPDX-License-Identifier: Apache-2.0
/// `noether-writer tail RUN`: the run's log and checkpoints as they come, a line each.
import ArgumentParser
import NoetherWriterClient
import Posix
import RunFiles
import Wire

struct Tail: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract:
            "Prints a run's last updates and the next ones as they come in, with what happens to its checkpoints.",
        discussion: "It ends when the run ends.\n\n"
            + examples(
                "noether-writer tail 2026-01-01_abcde",
                "noether-writer tail abcde -k loss -k 'accuracy/*' -n 100",
                "noether-writer tail abcde --json | jq .values.loss"))
    @OptionGroup var argument: RunArgument
    @OptionGroup var output: JSONOption
    @Option(
        name: .shortAndLong,
        help: ArgumentHelp(
            "Only this key; a * at its end stands for any text. May be given several times.", valueName: "key"),
        completion: .knownKeys)
    var key: [String] = []
    @Option(name: .shortAndLong, help: ArgumentHelp("How many updates from before to print.", valueName: "count"))
    var number = 10
    @Flag(help: "Print what is there now, and do not wait for more.") var noFollow = false

    private struct EventLine: Encodable {
        var event: String
        var checkpoint: String?
        var state: String?
        var bytes: UInt64?
        var bytesDone: UInt64?
        var seconds: Double?
        var error: String?
    }

    func run() throws {
        let found = try argument.find()
        guard let status = found.status, found.isRunning || (try? found.files.hasEntries) != true else {
            try printFile(found)
            return
        }
        let wanted = max(0, status.entries - max(0, number))
        let subscription = try found.subscribe(from: wanted)
        let last = subscription.run?.entries ?? 0
        if noFollow, last <= wanted { return }
        var shown = Shown()
        while let event = try subscription.nextBlocking() {
            for event in shown.new(in: event) { show(event) }
            if noFollow, case .row(let row) = event, row.index + 1 >= last { return }
        }
    }

    /// What is on the screen already: a row that comes again, since it has got more values, is shown by those.
    private struct Shown {
        private var last: Subscription.Row?
        /// The log may have been cut before that row, or the row comes again.
        private var held: Subscription.Event?

        mutating func new(in event: Subscription.Event) -> [Subscription.Event] {
            if case .restarted(let rows) = event, let last, rows == last.index {
                held = event
                return []
            }
            let (held, before) = (held, last)
            self.held = nil
            guard case .row(let row) = event else { return [held, event].compactMap { $0 } }
            last = row
            guard let held else { return [event] }
            guard let before, before.update == row.update else { return [held, event] }
            let known = Dictionary(
                before.values.map { (ByteName($0.key), $0.value) }, uniquingKeysWith: { $1 })
            var added = row
            added.values.removeAll { known[ByteName($0.key)] == $0.value }
            return [.row(added)]
        }
    }

    private func printFile(_ found: NamedRun) throws {
        let log = try found.log()
        let first = log.updates.suffix(max(0, number)).first ?? .max
        for (update, values) in log.rows(from: first) { show(update, wallTime: 0, values) }
        if !output.json {
            print(
                Text.paint(
                    "run \(found.status?.state.rawValue ?? "ended"), from \(try found.files.entriesPath)",
                    .dim))
        }
    }

    private func show(_ event: Subscription.Event) {
        switch event {
        case .row(let row):
            show(row.update, wallTime: row.wallTime, row.values.map { ($0.key, EntryValue($0.value)) })
        case .checkpoint(let info):
            var line = EventLine(event: "checkpoint")
            (line.checkpoint, line.state, line.bytes) = (info.file, info.state.rawValue, info.bytes)
            (line.bytesDone, line.seconds, line.error) = (info.bytesDone, info.seconds, info.error)
            tell(line, words(info), colour(info.state))
        case .opened: tell(EventLine(event: "opened"), "run opened again", .dim)
        case .restarted(let rows):
            tell(EventLine(event: "restarted"), "the log continues after its first \(rows) updates", .yellow)
        case .missed(let count, _):
            tell(
                EventLine(event: "missed"), "\(Text.count(count, "event")) left out: this reader is slow",
                .yellow)
        case .ended(let outcome):
            var line = EventLine(event: "ended")
            line.state = outcome.rawValue
            tell(line, "run \(outcome.rawValue)", outcome == .finished ? .green : .yellow)
        case .report: break
        }
    }

    /// Values as Python prints them: nan and inf are no JSON numbers. By hand, since Foundation takes keys for one that
    /// only Unicode takes for the same.
    private static func json(
        _ update: Int64, wallTime: Double, _ values: [(key: String, value: EntryValue)]
    ) -> String {
        let pairs = values.sorted { ByteName($0.key) < ByteName($1.key) }.map {
            "\(Text.json($0.key)):\(Text.json($0.value.text))"
        }
        let time = wallTime > 0 ? ",\"wall_time\":\(wallTime)" : ""
        return "{\"update\":\(update),\"values\":{\(pairs.joined(separator: ","))}\(time)}"
    }

    private func words(_ info: Checkpoint) -> String {
        let size = Text.bytes(info.bytes)
        return switch info.state {
        case .writing:
            info.bytesDone == 0
                ? "writing \(info.file), \(size)"
                : "writing \(info.file), \(Text.bytes(info.bytesDone)) of \(size)"
        case .durable:
            "durable \(info.file), \(size)" + (info.seconds.map { " in \(Text.duration($0))" } ?? "")
        case .stalled, .failed: "\(info.state.rawValue) \(info.file): \(info.error ?? "")"
        case .accepted, .written: "\(info.state.rawValue) \(info.file), \(size)"
        }
    }

    private func colour(_ state: Checkpoint.State) -> Text.Colour {
        switch state {
        case .durable: .green
        case .stalled, .failed: .red
        default: .dim
        }
    }

    private func tell(_ line: EventLine, _ words: String, _ colour: Text.Colour) {
        if (try? output.print(line)) == true { return NoetherWriter.flush() }
        print(Text.paint(Text.printable(words), colour))
        NoetherWriter.flush()
    }

    private func show(_ update: Int64, wallTime: Double, _ values: [(key: String, value: EntryValue)]) {
        let shown = values.filter { item in
            key.isEmpty
                || key.contains {
                    $0.ends(with: "*")
                        ? item.0.begins(with: $0.dropping(first: 0, last: 1)) : item.0.isSame(as: $0)
                }
        }
        guard !shown.isEmpty else { return }
        let columns = Terminal.isTerminal ? Terminal.width : nil
        if output.json {
            print(Self.json(update, wallTime: wallTime, shown))
            return NoetherWriter.flush()
        }
        let head = [
            wallTime > 0 ? (String(Clock.local(wallTime).suffix(8)), Text.Colour.dim) : nil,
            ("\(update)", .bold),
        ]
        var words = head.compactMap { $0.map { Text.paint($0.0, $0.1) } }.joined(separator: " ")
        var used = head.compactMap { $0?.0 }.joined(separator: " ").count
        for (key, value) in shown {
            let (name, text) = (Text.printable(key), Text.printable(Text.short(value)))
            let isOdd = value.number.map { !$0.isFinite } ?? false
            let width = Text.width(name) + 1 + Text.width(text)
            // On a terminal no number is broken in its middle.
            if let columns, used + 2 + width > columns {
                words += "\n    "
                used = 4
            } else {
                words += "  "
                used += 2
            }
            words += Text.paint(name, .cyan) + "=" + Text.paint(text, isOdd ? .red : nil)
            used += width
        }
        print(words)
        NoetherWriter.flush()
    }
}
