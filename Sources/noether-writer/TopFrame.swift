// SPDX-License-Identifier: Apache-2.0
/// One frame of `top`, as lines of text: pure but for the disks that it asks for their free space.
import Posix
import Wire

struct TopFrame {
    /// Rates are over so many reports, so that they do not jump.
    private static let averaged = 5

    private struct Sample {
        var uptime: Double
        var entries: [ByteName: Int]
        var bytes: UInt64
    }

    private let interval: Double
    private var report: StatusReport?
    private var samples: [Sample] = []
    /// Why there are no reports now.
    var problem: String?

    init(interval: Double) { self.interval = interval }

    mutating func update(with report: StatusReport) {
        problem = nil
        let entries = Dictionary(
            report.runs.map { (ByteName($0.runDirectory), $0.entries) }, uniquingKeysWith: { $1 })
        // Another daemon counts anew.
        if let last = samples.last, last.uptime > report.uptimeS { samples = [] }
        samples.append(Sample(uptime: report.uptimeS, entries: entries, bytes: Self.bytesDone(report)))
        if samples.count > Self.averaged { samples.removeFirst() }
        self.report = report
    }

    /// Handed to the file system since the daemon started.
    private static func bytesDone(_ report: StatusReport) -> UInt64 {
        report.allCheckpoints.reduce(0) { $0 + ($1.bytesDurable ?? 0) + ($1.bytesWritten ?? 0) }
    }

    private var seconds: Double? {
        guard let first = samples.first, let last = samples.last, last.uptime > first.uptime else {
            return nil
        }
        return last.uptime - first.uptime
    }

    private func updatesPerSecond(_ run: RunStatus) -> Double? {
        guard let seconds, let now = samples.last?.entries[ByteName(run.runDirectory)],
            let before = samples.first?.entries[ByteName(run.runDirectory)], now >= before
        else { return nil }
        return Double(now - before) / seconds
    }

    private var bytesPerSecond: Double {
        guard let seconds, let now = samples.last?.bytes, let before = samples.first?.bytes, now > before
        else { return 0 }
        return Double(now - before) / seconds
    }

    // MARK: Lines

    /// - Parameter rows: of the screen; nil: as many lines as there are.
    func lines(columns: Int, rows: Int?) -> [String] {
        guard let report else {
            return [Text.clipped("noether-writer top: \(problem ?? "waiting for the daemon")", columns)]
        }
        let head = heading(report, columns)
        let warnings = warnings(report)
        let foot = rows == nil ? [] : [Text.paint(Text.clipped("q quits", columns), .dim)]
        let live = report.runs.filter { $0.state == .running }
        let ended = Array(report.runs.filter { $0.state != .running }.reversed())
        // The title of the table, and a line between.
        let room = rows.map { max(1, $0 - head.count - foot.count - min(warnings.count, 4) - 2) } ?? .max
        let all = live + ended
        var lines = head + [""]
        if all.count > room {
            let shown = Array(all.prefix(max(1, room - 1)))
            lines += table(shown, columns)
            lines.append(Text.paint("... and \(all.count - shown.count) more (noether-writer runs)", .dim))
        } else {
            lines += table(all, columns)
        }
        lines += warnings.prefix(rows == nil ? .max : 4).map { Text.paint(Text.clipped($0, columns), .red) }
        guard let rows else { return lines }
        lines += [String](repeating: "", count: max(0, rows - lines.count - foot.count))
        return Array(lines.prefix(max(1, rows - foot.count))) + foot
    }

    private func heading(_ report: StatusReport, _ columns: Int) -> [String] {
        let checkpoints = report.allCheckpoints
        let inFlight = checkpoints.reduce(0) { $0 + $1.inFlight }
        let total = checkpoints.reduce(0) { $0 + $1.bytesInFlight }
        let written = checkpoints.reduce(0) { $0 + ($1.bytesWritten ?? 0) }
        let live = report.runs.filter { $0.state == .running }.count
        let title = "noether-writerd \(report.version)"
        let parts = [
            "  \(report.state), up \(Text.duration(report.uptimeS, coarse: true))",
            report.memoryBytes.map { "  memory \(Text.bytes($0))" } ?? "",
            "  \(Text.count(report.connections, "connection"))",
        ]
        let first = Text.paint(title, .bold) + Text.clipped(parts.joined(), max(0, columns - title.count))
        let durable = checkpoints.reduce(0) { $0 + $1.durable }
        let flying =
            inFlight == 0 ? "none in flight" : "\(inFlight) in flight (\(Text.bytes(written, of: total)))"
        let second =
            "\(live) of \(Text.count(report.runs.count, "run")) live   \(durable) durable, \(flying)   "
            + "\(Text.bytes(UInt64(bytesPerSecond)))/s"
        return [first, Text.clipped(second, columns)]
            + disks(report, columns).map {
                Text.paint(Text.clipped($0.line, columns), $0.isLow ? .yellow : nil)
            }
            + (problem.map { [Text.paint(Text.clipped(Text.printable($0), columns), .yellow)] } ?? [])
    }

    /// Of the file systems that living runs write to, at most two.
    private func disks(_ report: StatusReport, _ columns: Int) -> [(line: String, isLow: Bool)] {
        var seen: Set<UInt64> = []
        var found: [(String, Bool)] = []
        for run in report.runs where run.state == .running {
            guard let space = FileSystem.space(run.runDirectory) else { continue }
            let root = FileSystem.parts(of: run.runDirectory).dropLast().joined(separator: "/")
            let share = Double(space.free) / Double(max(1, space.total))
            guard seen.insert(space.id).inserted, found.count < 2 else { continue }
            let isLow = share < Self.lowShare
            let words =
                "\(isLow ? "LOW " : "")disk: \(Text.bytes(space.free)) free of \(Text.bytes(space.total)), "
            let place = Text.clippedInTheMiddle(Text.printable("/\(root)"), max(8, columns - words.count))
            found.append((words + place, isLow))
        }
        return found
    }

    private static let lowShare = 0.05

    private func warnings(_ report: StatusReport) -> [String] {
        (report.runs.compactMap { run in run.stalled.map { "STALLED \(run.runId): \($0)" } }
            + [report.files?.stalled.map { "STALLED \($0)" }].compactMap { $0 }).map(
                Text.printable)
            + report.runs.filter { $0.checkpoints.failed > 0 }.map {
                Text.printable("FAILED \($0.runId): \(Text.count($0.checkpoints.failed, "file"))")
            }
    }

    private func table(_ runs: [RunStatus], _ columns: Int) -> [String] {
        guard !runs.isEmpty else { return ["no runs yet"] }
        var table = Table([
            .init(title: "RUN", isName: true), .init(title: "STATE"), .init(title: "UPDATE", right: true),
            .init(title: "UPD/S", right: true), .init(title: "AGE", right: true, canBeMissed: 2),
            .init(title: "DURABLE", right: true, canBeMissed: 3), .init(title: "WRITING"),
        ])
        for run in runs {
            let isLive = run.state == .running
            table.add([
                .init(run.runId), .init(run.stateText, run.stateColour),
                .init(run.lastUpdate.map { "\($0)" } ?? "-"),
                .init(isLive ? updatesPerSecond(run).map { Text.rate($0) } ?? "-" : ""),
                .init(run.age), .init("\(run.checkpoints.durable)"),
                .init(writing(run, columns), run.stalled == nil ? .cyan : .red),
            ])
        }
        return table.lines(width: columns)
    }

    /// What is on its way: a bar, and as much in words as there is room for.
    private func writing(_ run: RunStatus, _ columns: Int) -> String {
        let checkpoints = run.checkpoints
        guard checkpoints.inFlight > 0 else { return "" }
        let written = checkpoints.bytesWritten ?? 0
        let share = checkpoints.bytesInFlight == 0 ? 0 : Double(written) / Double(checkpoints.bytesInFlight)
        let percent = Text.padded("\(Int(share * 100)) %", 5, right: true)
        guard columns >= 100 else { return "\(Text.bar(share, 10)) \(percent)" }
        let more = checkpoints.inFlight > 1 ? ", \(checkpoints.inFlight) in flight" : ""
        return "\(Text.bar(share, 20)) \(percent) of \(Text.bytes(checkpoints.bytesInFlight))\(more)"
            + (run.writing.map { "  \($0.file)" } ?? "")
    }
}
