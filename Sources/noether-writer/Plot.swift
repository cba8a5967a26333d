// SPDX-License-Identifier: Apache-2.0
/// `noether-writer plot RUN KEY...`: lines of braille in the terminal, or an SVG file.
import ArgumentParser
import Chart
import Posix
import RunFiles
import Wire

struct Plot: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Draws keys of one run, or of several, over their updates.",
        discussion:
            "NaN and infinite values are gaps, marked × on the axis. Several runs go over one another.\n\n"
            + examples(
                "noether-writer plot 2026-01-01_abcde loss",
                "noether-writer plot abcde loss --run other --log --smooth 0.9",
                "noether-writer plot abcde loss accuracy --out loss.svg"))
    @OptionGroup var argument: RunArgument
    @OptionGroup var output: JSONOption
    @Argument(help: ArgumentHelp("What to plot.", valueName: "key"), completion: .knownKeys)
    var keys: [String]
    @Option(
        name: .customLong("run"),
        help: ArgumentHelp("Another run in the same chart. May be given several times.", valueName: "run"),
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
        guard !keys.isEmpty else {
            throw ValidationError("name at least one key, as `noether-writer show RUN` lists them")
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
        let runs = [argument.run] + others
        var lines: [Series] = []
        for name in runs {
            lines += try series(of: NamedRun(name, socket: argument.socket), isOneOf: runs.count)
        }
        if let out { try write(lines, to: out) }
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
        guard let shown else { throw nothing }
        for line in shown { print(line) }
    }

    private var nothing: NotFound {
        NotFound(
            description:
                "\(keys.joined(separator: ", ")): no value that the chart could show\(log ? " on a logarithmic axis" : "")"
        )
    }

    private func series(of run: NamedRun, isOneOf count: Int) throws -> [Series] {
        let data = try run.log(keys: Set(keys.map(ByteName.init)))
        return try keys.compactMap { key -> Series? in
            guard let series = data.series(key) else {
                // One run may lack what another has.
                if count > 1, data.keys.contains(where: { known in keys.contains { $0.isSame(as: known) } }) {
                    return nil
                }
                let known =
                    data.keys.isEmpty ? "it has no log" : "it has " + data.keys.joined(separator: ", ")
                throw NotFound(
                    description: "run \(run.runID) has no values of \(key); \(Text.clipped(known, 400))")
            }
            let points = zip(series.updates, series.values).compactMap { update, value in
                value.number.map { (x: Double(update), y: $0) }
            }
            guard !points.isEmpty else {
                throw NotFound(description: "\(key) of run \(run.runID) holds no numbers")
            }
            return Series(name(key, of: run, among: count), points).smoothed(smooth)
        }
    }

    /// What tells the lines apart, and no more.
    private func name(_ key: String, of run: NamedRun, among count: Int) -> String {
        Text.printable(count == 1 ? key : keys.count == 1 ? run.runID : "\(run.runID) \(key)")
    }

    private func write(_ lines: [Series], to path: String) throws {
        let title = Text.printable(
            others.isEmpty
                ? "\(FileSystem.parts(of: argument.run).last ?? "/"): \(keys.joined(separator: ", "))"
                : keys.joined(separator: ", "))
        let sink: TextSink
        if path.hasSuffix(".png") {
            guard let bytes = PNGChart(lines, isLog: log, title: title).bytes() else { throw nothing }
            sink = try TextSink(path)
            try sink.write(bytes)
        } else {
            guard let text = SVGChart(lines, isLog: log, title: title).text() else { throw nothing }
            sink = try TextSink(path)
            try sink.write(text)
        }
        try sink.finish()
    }
}
