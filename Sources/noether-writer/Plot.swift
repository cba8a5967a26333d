// SPDX-License-Identifier: Apache-2.0
/// `noether-writer plot RUN KEY...`: lines of braille in the terminal, or a picture.
import ArgumentParser
import Chart
import Posix
import RunFiles
import Wire

struct Plot: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Draws keys of one run, or of several, over their updates.",
        discussion: """
            RUN may be a pattern such as 'sweep/*', in quotes: then all runs that match it are drawn, one over the other. Without a \
            KEY the keys of the runs are listed. NaN and infinite values are gaps, marked × on the axis.

            """
                + examples(
                    "noether-writer plot 2026-01-01_abcde loss", "noether-writer plot 'sweep/*' loss/val --log",
                    "noether-writer plot abcde loss --run other third --smooth 0.9",
                    "noether-writer plot abcde loss accuracy --out loss.svg", "noether-writer plot abcde"))
    @OptionGroup var argument: RunArgument
    @OptionGroup var output: JSONOption
    @Argument(
        help: ArgumentHelp("What to plot; without it the keys are listed.", valueName: "key"), completion: .knownKeys)
    var keys: [String] = []
    @Option(
        name: .customLong("run"), parsing: .upToNextOption,
        help: ArgumentHelp("Other runs in the same chart, or patterns of them.", valueName: "run"),
        completion: .knownRuns)
    var others: [String] = []
    @Flag(help: "A logarithmic axis; values of at most 0 are gaps.") var log = false
    @Option(
        help: ArgumentHelp(
            "Average exponentially: this much of what was before, 0 to below 1.", valueName: "weight"))
    var smooth = 0.0
    @Option(
        help: ArgumentHelp("Write a picture to this file instead.", valueName: "file.svg|file.png"),
        completion: .file(extensions: ["svg", "png"]))
    var out: String?
    @Option(help: ArgumentHelp("Width in characters; default: the terminal's.", valueName: "columns")) var width: Int?
    @Option(help: ArgumentHelp("Height in lines; default: most of the terminal.", valueName: "lines")) var height: Int?

    func validate() throws {
        guard smooth >= 0, smooth < 1 else { throw ValidationError("--smooth must be at least 0 and below 1") }
        for size in [width, height] where !(1...10_000).contains(size ?? 1) {
            throw ValidationError("--width and --height must be 1 to 10000")
        }
        guard !keys.isEmpty || out == nil else {
            throw ValidationError("name at least one key, as `noether-writer plot RUN` lists them")
        }
        if let out, !out.hasSuffix(".svg"), !out.hasSuffix(".png") {
            throw ValidationError("--out must be a name that ends in .svg or .png")
        }
    }

    private struct Line: Encodable {
        var name: String
        var updates: [Double]
        var values: [Double?]
        /// The picture that was written.
        var file: String?
    }

    private static let palette: [Text.Colour] = [.cyan, .yellow, .magenta, .green, .red, .blue, .white]

    func run() throws {
        let first = try NamedRun.find([argument.run], socket: argument.socket)
        let (keys, unquoted) = try split(of: first[0])
        let others = try NamedRun.find(unquoted + others, socket: argument.socket)
        let seen = Set(first.map { ByteName($0.directory) })
        let runs = first + others.filter { !seen.contains(ByteName($0.directory)) }
        if keys.isEmpty { return try list(runs) }
        let lines = try lines(of: keys, runs)
        if let out { try write(lines, of: keys, runs, to: out) }
        let file = out.map { FileSystem.absolute($0) }
        let points = lines.map { line in
            // nan and inf are no JSON numbers: null.
            Line(
                name: line.name, updates: line.points.map(\.x),
                values: line.points.map { $0.y.isFinite ? $0.y : nil }, file: file)
        }
        if try output.print(points) { return }
        if let out { return print(out) }
        let size = Terminal.size
        let columns = width ?? size?.columns ?? 80
        // A line for the prompt.
        let rows = height ?? size.map { max(8, min($0.rows - 1, $0.columns / 3)) } ?? 20
        let chart = BrailleChart(lines, isLog: log, columns: columns, rows: rows)
        let shown = chart.lines { text, index in Text.paint(text, Self.palette[index % Self.palette.count]) }
        guard let shown else { throw nothing(keys) }
        for line in shown { print(line) }
    }

    private func nothing(_ keys: [String]) -> NotFound {
        NotFound(
            description:
                "\(keys.joined(separator: ", ")): no value that the chart could show\(log ? " on a logarithmic axis" : "")"
        )
    }

    /// A pattern without quotes has become many arguments: those that are directories of runs, and no keys, are runs.
    private func split(of run: NamedRun) throws -> (keys: [String], runs: [String]) {
        guard keys.contains(where: RunFiles.isRun) else { return (keys, []) }
        let known = Set(try run.log(keys: []).keys.map(ByteName.init))
        func isKey(_ name: String) -> Bool { known.contains(ByteName(name)) || !RunFiles.isRun(name) }
        return (keys.filter(isKey), keys.filter { !isKey($0) })
    }

    private func list(_ runs: [NamedRun]) throws {
        let names = Sweep.names(try runs.map { try $0.log(keys: []).keys })
        if try output.print(names) { return }
        for name in names { print(Text.printable(name)) }
    }

    /// - Throws: `NotFound` if no run has one of the keys.
    private func lines(of keys: [String], _ runs: [NamedRun]) throws -> [Series] {
        let labels = NamedRun.labels(of: runs)
        var lines: [Series] = []
        var known: [[String]] = []
        var missing: [(run: String, key: String)] = []
        var without: [ByteName: Int] = [:]
        for (run, label) in zip(runs, labels) {
            let data = try run.log(keys: Set(keys.map(ByteName.init)))
            known.append(data.keys)
            for key in keys {
                let series = data.series(key)
                let points = zip(series?.updates ?? [], series?.values ?? []).compactMap { update, value in
                    value.number.map { (x: Double(update), y: $0) }
                }
                if points.isEmpty {
                    if series == nil { without[ByteName(key), default: 0] += 1 }
                    missing.append((label, key))
                } else {
                    let name = runs.count == 1 ? key : keys.count == 1 ? label : "\(label) \(key)"
                    lines.append(Series(Text.printable(name), points).smoothed(smooth))
                }
            }
        }
        for key in keys {
            guard missing.filter({ $0.key.isSame(as: key) }).count == runs.count else { continue }
            let owner = runs.count == 1 ? "run \(runs[0].runID)" : "no run here"
            if without[ByteName(key)] != runs.count {
                throw NotFound(
                    description: runs.count == 1 ? "\(key) of \(owner) holds no numbers" : "\(key) holds no numbers")
            }
            let all = Sweep.names(known)
            throw NotFound(
                description: runs.count == 1
                    ? "\(owner) has no values of \(key); \(Names.hint(for: key, among: all))"
                    : "\(owner) has values of \(key); "
                        + Names.hint(for: key, among: all, owner: "their log", nothing: "they have no log"))
        }
        // One run may lack what another has.
        for each in missing {
            ThisProcess.writeToStandardError(
                Text.printable("noether-writer: run \(each.run) has no numbers of \(each.key), and is left out"))
        }
        return lines
    }

    private func write(_ lines: [Series], of keys: [String], _ runs: [NamedRun], to path: String) throws {
        let title = Text.printable(
            runs.count == 1
                ? "\(runs[0].runID): \(keys.joined(separator: ", "))" : keys.joined(separator: ", "))
        let sink: TextSink
        if path.hasSuffix(".png") {
            guard let bytes = PNGChart(lines, isLog: log, title: title).bytes() else { throw nothing(keys) }
            sink = try TextSink(path)
            try sink.write(bytes)
        } else {
            guard let text = SVGChart(lines, isLog: log, title: title).text() else { throw nothing(keys) }
            sink = try TextSink(path)
            try sink.write(text)
        }
        try sink.finish()
    }
}
