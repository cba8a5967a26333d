// SPDX-License-Identifier: Apache-2.0
/// `noether-writer export RUN`: the log for other programs.
import ArgumentParser
import Posix
import RunFiles
import Wire

struct Export: ParsableCommand {
    enum Format: String, ExpressibleByArgument, CaseIterable {
        case csv, json, long
    }

    static let configuration = CommandConfiguration(
        abstract: "Writes a run's log as CSV or JSON.",
        discussion: """
            csv: one row for each update, one column for each key. A cell is empty if the key has no value; NaN and infinities are \
            nan and inf. A key with the name update has the column update.1, or the first free one after it.
            json, or --json: {key: {update: value}}, like entries.th. NaN and infinities are the strings "nan", "inf", "-inf".
            long: one row for each value: key,update,type,number,text. Each column has one type, as Parquet needs it. number is empty \
            if the value is not a number; text holds strings, and the digits of integers that a float64 cannot hold.

            """
                + examples(
                    "noether-writer export abcde --format csv --out abcde.csv",
                    "noether-writer export abcde --format long --out abcde.csv",
                    "python -c 'from pyarrow import csv, parquet; parquet.write_table(",
                    "  csv.read_csv(\"abcde.csv\", None,",
                    "    csv.ParseOptions(newlines_in_values=True),",
                    // An empty number is none, and NaN stays one.
                    "    csv.ConvertOptions(null_values=[\"\"], column_types={",
                    "      \"key\": \"string\", \"number\": \"float64\", \"text\": \"string\"})),",
                    "  \"abcde.parquet\")'"))
    @OptionGroup var argument: RunArgument
    @OptionGroup var output: JSONOption
    @Option(name: .shortAndLong, help: "Default: csv.") var format: Format?
    @Option(
        name: .shortAndLong, help: ArgumentHelp("Only this key. May be given several times.", valueName: "key"),
        completion: .knownKeys)
    var key: [String] = []
    @Option(
        name: .shortAndLong, help: ArgumentHelp("Default: standard output.", valueName: "file"),
        completion: .file())
    var out: String?

    func validate() throws {
        if output.json, let format, format != .json {
            throw ValidationError("--json and --format \(format.rawValue) are two formats: give only one of them")
        }
    }

    func run() throws {
        let run = try argument.find()
        let log = try run.log(keys: key.isEmpty ? nil : Set(key.map(ByteName.init)))
        if let missing = key.first(where: { key in !log.keys.contains { $0.isSame(as: key) } }) {
            throw NotFound(
                description: "run \(run.runID) has no key \(missing); \(Names.hint(for: missing, among: log.keys))")
        }
        let keys = log.keys.filter { log.series($0) != nil }
        let sink = try TextSink(out)
        switch format ?? (output.json ? .json : .csv) {
        case .csv: try csv(log, keys, sink)
        case .json: try json(log, keys, sink)
        case .long: try long(log, keys, sink)
        }
        try sink.finish()
    }

    private func csv(_ log: RunLogData, _ keys: [String], _ sink: TextSink) throws {
        try sink.write((["update"] + Self.columns(keys)).map(Self.quoted).joined(separator: ",") + "\n")
        var positions = [Int](repeating: 0, count: keys.count)
        let series = keys.map { log.series($0) ?? RunLogData.Series() }
        for update in log.updates {
            var line = "\(update)"
            for index in keys.indices {
                line += ","
                let at = positions[index]
                guard at < series[index].updates.count, series[index].updates[at] == update else { continue }
                line += Self.quoted(series[index].values[at].text)
                positions[index] += 1
            }
            try sink.write(line + "\n")
        }
    }

    /// The keys, but for the one that has the first column's name.
    private static func columns(_ keys: [String]) -> [String] {
        let taken = Set(keys.map(ByteName.init))
        var number = 1
        while taken.contains(ByteName("update.\(number)")) { number += 1 }
        return keys.map { $0 == "update" ? "update.\(number)" : $0 }
    }

    private func long(_ log: RunLogData, _ keys: [String], _ sink: TextSink) throws {
        try sink.write("key,update,type,number,text\n")
        for key in keys {
            guard let series = log.series(key) else { continue }
            let name = Self.quoted(key)
            for (update, value) in zip(series.updates, series.values) {
                let cells: (String, String, String) =
                    switch value {
                    case .float: ("float", value.text, "")
                    case .int(let number):
                        ("int", value.text, Int64(exactly: Double(number)) == number ? "" : value.text)
                    case .bool(let truth): ("bool", truth ? "1" : "0", "")
                    case .none: ("none", "", "")
                    case .string(let text): ("str", "", Self.quoted(text))
                    case .bigInt: ("bigint", "", value.text)
                    }
                try sink.write("\(name),\(update),\(cells.0),\(cells.1),\(cells.2)\n")
            }
        }
    }

    private func json(_ log: RunLogData, _ keys: [String], _ sink: TextSink) throws {
        var isFirst = true
        for key in keys {
            try sink.write("\(isFirst ? "{" : ",\n ")\(Text.json(key)): {")
            isFirst = false
            guard let series = log.series(key) else { continue }
            for (index, update) in series.updates.enumerated() {
                try sink.write("\(index == 0 ? "" : ", ")\"\(update)\": \(Text.json(series.values[index]))")
            }
            try sink.write("}")
        }
        try sink.write(isFirst ? "{}\n" : "}\n")
    }

    /// RFC 4180.
    private static func quoted(_ text: String) -> String {
        guard text.utf8.contains(where: { $0 == 0x22 || $0 == 0x2C || $0 == 0x0A || $0 == 0x0D }) else {
            return text
        }
        return "\"" + text.replacing("\"", with: "\"\"") + "\""
    }
}
