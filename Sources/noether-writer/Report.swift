// SPDX-License-Identifier: Apache-2.0
/// `noether-writer report RUN|DIR...`: runs as a page of HTML that needs nothing else. What the page shows is data in
/// it (JSON), and Page/page.js makes the elements of it, with no text as HTML.
import ArgumentParser
import Chart
import NoetherWriterClient
import Posix
import RunFiles
import Wire
import Writer

struct Report: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Writes one HTML page with the curves, the checkpoints and the hyperparameters of runs.",
        discussion: """
            The page needs no network and no other file. The runs are read from their files; a directory that is no run gives all \
            runs below it. Without --key, --min or --max it has every key with a number, and the table has the best values as \
            tracker/summary.yaml has them. Long curves are sampled: of each part the lowest and the highest value stay.

            """
                + examples(
                    "noether-writer report 2026-01-01_abcde --out report.html",
                    "noether-writer report sweep --out sweep.html",
                    "noether-writer report a b -k loss/val --max accuracy --out a-b.html"))
    @Argument(
        help: ArgumentHelp("A run's id or directory, or a directory with runs below it.", valueName: "run|dir"),
        completion: .knownRuns)
    var targets: [String]
    @OptionGroup var socket: SocketOption
    @OptionGroup var chosen: ChosenKeys
    @Option(
        name: .shortAndLong,
        help: ArgumentHelp("The file, which is replaced as a whole; - is standard output.", valueName: "file.html"),
        completion: .file(extensions: ["html"]))
    var out: String

    func run() throws {
        let (runs, isComplete) = try FiledRun.find(named: targets, socket: socket)
        guard runs.count <= ReportPage.runLimit else {
            throw Refused(
                description: "\(runs.count) runs; a report shows at most \(ReportPage.runLimit): name fewer")
        }
        try ChosenKeys.check(chosen.columns, in: runs)
        let page = ReportPage(runs, chosen, title: targets.joined(separator: ", "), isComplete: isComplete)
        guard page.hasContent else {
            throw NotFound(description: "no run here has logged a value or saved a checkpoint yet")
        }
        for problem in page.problems { ThisProcess.writeToStandardError(Text.printable("noether-writer: \(problem)")) }
        if out == "-" {
            let sink = try TextSink(nil)
            try sink.write(page.html)
            try sink.finish()
        } else {
            let path = FileSystem.absolute(out)
            let name = FileSystem.parts(of: path).last ?? ""
            let parent = path.dropping(first: 0, last: name.utf8.count)
            try DurableFile.write(name, bytes: Array(page.html.utf8), in: Directory.open(parent))
            print(out)
        }
        if !isComplete || !page.problems.isEmpty { throw ExitCode.failure }
    }
}

/// The data of the page, and its limits.
struct ReportPage {
    static let runLimit = 500
    /// Points of all curves together, so that a page has a few megabytes: about 25 bytes each, at most 50.
    private static let pointLimit = 160_000
    /// The most buckets of one curve: more than a wide screen has columns.
    private static let mostBuckets = 2000
    private static let leastBuckets = 8
    /// Five of its points, and its average.
    private static let pointsOfBucket = 6
    /// Charts of one page.
    private static let keyLimit = 200
    /// The last checkpoints of each run that are shown.
    private static let checkpointLimit = 500
    /// The cells of the table. Each has at most about 100 bytes.
    private static let cellLimit = 20_000
    /// In the table, if none are chosen.
    private static let summedLimit = 20
    private static let nameLimit = 200

    private let runs: [FiledRun]
    private let title: String
    private let isComplete: Bool
    private var keys: [String] = []
    /// By keys, then by runs, as JSON; nil: the run has no number of the key.
    private var curves: [[String?]] = []
    private var checkpoints: [[CheckpointFile]] = []
    private var notes: [String] = []
    private let summary: Table
    private(set) var problems: [String] = []

    var hasContent: Bool { !keys.isEmpty || checkpoints.contains { !$0.isEmpty } }

    init(_ runs: [FiledRun], _ chosen: ChosenKeys, title: String, isComplete: Bool) {
        (self.runs, self.title, self.isComplete) = (runs, title, isComplete)
        let all =
            chosen.isEmpty
            ? Sweep.names(runs.map { $0.log.keys.filter(\.hasNumber).map(\.name) })
            : Sweep.names([chosen.columns.map(\.key)])
        // Each curve has room for its least.
        let room = min(
            Self.keyLimit, max(1, Self.pointLimit / (Self.pointsOfBucket * Self.leastBuckets * max(1, runs.count))))
        keys = Array(all.prefix(room))
        if all.count > keys.count {
            notes.append("\(Text.count(all.count - keys.count, "more key")) left out; choose some by --key")
        }
        let shown = Set(keys.map(ByteName.init))
        let columns =
            chosen.isEmpty
            ? keys.filter(SummaryFile.isSummed).prefix(Self.summedLimit).map { ChosenKeys.Column(key: $0) }
            : chosen.columns.filter { shown.contains(ByteName($0.key)) }
        summary = Sweep(runs: runs, columns: columns).table
        let columnsLeft = summary.columnCount - Self.columnLimit(runs.count)
        if columnsLeft > 0 { notes.append("the table has \(Text.count(columnsLeft, "more column")), left out") }
        // Points that short curves do not need are given to the long ones.
        let counts = runs.flatMap { run in keys.map { run.log[$0]?.count ?? 0 } }
        let buckets = Self.buckets(for: counts)
        curves = keys.map { _ in [] }
        for run in runs {
            var log: RunLogData?
            do { if !run.log.keys.isEmpty { log = try FiledRun.log(RunFiles(run.directory), keys: shown) } } catch {
                problems.append("run \(run.name): \(error)")
            }
            for (place, key) in keys.enumerated() {
                curves[place].append(log?.series(key).flatMap { Self.curve($0, buckets) })
            }
            do { checkpoints.append(try RunFiles(run.directory).checkpoints()) } catch {
                checkpoints.append([])
                problems.append("run \(run.name): \(error)")
            }
        }
    }

    private static func columnLimit(_ runs: Int) -> Int { max(3, cellLimit / max(1, runs)) }

    /// As many parts of each long curve as the limit has room for.
    private static func buckets(for counts: [Int]) -> Int {
        var (low, high) = (leastBuckets, mostBuckets)
        func points(_ buckets: Int) -> Int {
            counts.reduce(0) { $0 + ($1 > 4 * buckets ? pointsOfBucket * buckets : $1) }
        }
        while low < high {
            let middle = (low + high + 1) / 2
            if points(middle) <= pointLimit { low = middle } else { high = middle - 1 }
        }
        return low
    }

    private static func curve(_ values: RunLogData.Series, _ buckets: Int) -> String? {
        let points = zip(values.updates, values.values).compactMap { update, value in
            value.number.map { (x: Double(update), y: $0) }
        }
        guard !points.isEmpty else { return nil }
        let whole = Series("", points)
        let shown = whole.thinned(to: buckets).points
        let averages = whole.averages(of: buckets)
        let unshown = points.reduce(0) { $0 + ($1.y.isFinite ? 0 : 1) }
        return Text.json(object: [
            ("count", "\(points.count)"), ("unshown", unshown > 0 ? "\(unshown)" : nil),
            ("x", steps(shown.map(\.x))), ("y", Text.json(array: shown.map { number($0.y) })),
            (
                "averages",
                averages.map { averages in
                    Text.json(object: [
                        ("x", steps(averages.map(\.x))), ("y", Text.json(array: averages.map { number($0.y) })),
                        ("count", Text.json(array: averages.map { "\($0.count)" })),
                    ])
                }
            ),
        ])
    }

    /// The first, and how far each is from the one before.
    private static func steps(_ updates: [Double]) -> String {
        var before = 0.0
        return Text.json(
            array: updates.map { update in
                defer { before = update }
                return number(update - before)
            })
    }

    private static func number(_ value: Double) -> String {
        if let whole = Int64(exactly: value) { return "\(whole)" }
        return Text.json(EntryValue.float(value.bitPattern))
    }

    // MARK: The page

    private static func name(_ text: String) -> String {
        Text.json(Text.clippedInTheMiddle(Text.printable(text), nameLimit))
    }

    private var data: String {
        let runs = zip(runs, checkpoints).map { run, files in
            let shown = files.suffix(Self.checkpointLimit)
            return Text.json(object: [
                ("name", Self.name(run.name)), ("directory", Self.name(run.directory)),
                ("state", Text.json(run.stateText)), ("checkpoint_count", "\(files.count)"),
                (
                    "checkpoints",
                    Text.json(
                        array: shown.map { file in
                            Text.json(object: [
                                ("file", Self.name(file.file)), ("update", file.update.map { "\($0)" }),
                                ("at", Self.number(file.modifiedAt)), ("bytes", "\(file.byteCount)"),
                            ])
                        })
                ),
            ])
        }
        let keys = zip(keys, curves).map { key, curves in
            Text.json(object: [
                ("name", Self.name(key)), ("curves", Text.json(array: curves.map { $0 ?? "null" })),
            ])
        }
        return Text.json(object: [
            ("title", Self.name(title)), ("version", Text.json(Release.version)),
            ("made_at", Self.number(Clock.wallSeconds.rounded())), ("runs", Text.json(array: runs)),
            ("keys", Text.json(array: keys)), ("summary", summary.json(columns: Self.columnLimit(self.runs.count))),
            ("notes", Text.json(array: notes.map { Text.json($0) })),
            (
                "problems",
                Text.json(
                    array: (self.runs.flatMap { run in run.problems.map { "run \(run.name): \($0)" } } + problems).map(
                        Self.name))
            ),
        ])
    }

    var html: String {
        // Only what has this number is run or used, whatever a name or a value holds.
        let nonce = (0..<2).map { _ in String(UInt64.random(in: .min ... .max), radix: 36) }.joined()
        let style = String(decoding: PackageResources.page_css, as: UTF8.self)
        let script = String(decoding: PackageResources.page_js, as: UTF8.self)
        return """
            <!doctype html>
            <html lang="en">
            <head>
            <meta charset="utf-8">
            <meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none'; form-action 'none'; \
            script-src 'nonce-\(nonce)'; style-src 'nonce-\(nonce)'">
            <meta name="viewport" content="width=device-width, initial-scale=1">
            <meta name="color-scheme" content="light dark">
            <meta name="referrer" content="no-referrer">
            <meta name="generator" content="noether-writer \(Release.version)">
            <title>\(Self.escaped(Text.clippedInTheMiddle(Text.printable(title), Self.nameLimit)))</title>
            <style nonce="\(nonce)">
            \(style)</style>
            </head>
            <body>
            <noscript>This page draws its curves with JavaScript, which is off here.</noscript>
            <script type="application/json" id="data">\(Self.inScript(data))</script>
            <script nonce="\(nonce)">
            \(script)</script>
            </body>
            </html>

            """
    }

    private static func escaped(_ text: String) -> String {
        replaced(text, ["&": "&amp;", "<": "&lt;", ">": "&gt;", "\"": "&quot;"])
    }

    /// JSON that no parser of HTML takes for the end of its element.
    private static func inScript(_ json: String) -> String { replaced(json, ["<": "\\u003c"]) }

    /// By bytes: for Swift a letter and the accent after it are another character than the letter.
    private static func replaced(_ text: String, _ letters: [Character: String]) -> String {
        let letters = Dictionary(uniqueKeysWithValues: letters.map { ($0.key.asciiValue ?? 0, Array($0.value.utf8)) })
        var out: [UInt8] = []
        out.reserveCapacity(text.utf8.count)
        for byte in text.utf8 {
            if let other = letters[byte] { out += other } else { out.append(byte) }
        }
        return String(decoding: out, as: UTF8.self)
    }
}
