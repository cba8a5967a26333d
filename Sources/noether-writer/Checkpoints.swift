// SPDX-License-Identifier: Apache-2.0
/// `noether-writer checkpoints RUN`: each file, with what the daemon still knows of how it came to be.
import ArgumentParser
import NoetherWriterClient
import Posix
import RunFiles
import Wire

struct Checkpoints: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract:
            "Lists a run's checkpoints, oldest first: tag, kind, size, when durable, how long that took, the log's update.",
        discussion: """
            Files that the daemon does not know, or knows no longer, are listed by their names. Then DURABLE is when the file was \
            written, and UPDATE is what the file says, or else its tag.

            """
                + examples(
                    "noether-writer checkpoints 2026-01-01_abcde",
                    "noether-writer checkpoints /data/runs/abcde --json"))
    @OptionGroup var argument: RunArgument
    @OptionGroup var output: JSONOption

    func run() throws {
        let rows = try CheckpointRow.all(of: argument.find())
        if try output.print(rows) { return }
        guard !rows.isEmpty else { return print("no checkpoints yet") }
        CheckpointRow.table(rows[...]).print()
    }
}

struct CheckpointRow: Encodable {
    var file: String
    /// Absolute.
    var path: String
    var name: String
    var tag: String
    var kind: String
    var bytes: UInt64
    var bytesDone: UInt64
    var state: String
    /// Seconds since 1970; nil if it is not durable yet.
    var durableAt: Double?
    /// From accepted to durable; nil if only the file tells of it.
    var seconds: Double?
    var update: Int64?
    var error: String?

    static func all(of run: NamedRun) throws -> [CheckpointRow] {
        var rows: [CheckpointRow] = []
        for file in (try? run.files.checkpoints()) ?? [] {
            rows.append(
                CheckpointRow(
                    file: file.file, path: "\(run.directory)/checkpoints/\(file.file)", name: file.name, tag: file.tag,
                    kind: file.kind, bytes: file.byteCount,
                    bytesDone: file.byteCount, state: "durable", durableAt: file.modifiedAt, seconds: nil,
                    update: file.update, error: nil))
        }
        guard run.status != nil else { return rows }
        let subscription = try run.subscribe(from: nil)
        defer { subscription.close() }
        // The last one counts: names like `latest` are written again and again.
        for known in subscription.checkpoints {
            let index = rows.firstIndex { $0.file.isSame(as: known.file) }
            var row =
                index.map { rows[$0] }
                ?? CheckpointRow(
                    CheckpointFile(known.file, byteCount: known.bytes, modifiedAt: 0), in: run.directory)
            row.bytes = known.bytes
            row.bytesDone = known.bytesDone
            row.state = known.state.rawValue
            row.seconds = known.seconds
            row.durableAt = known.state == .durable ? known.endedAt : nil
            row.update = known.logUpdate ?? row.update
            row.error = known.error
            if let index { rows[index] = row } else { rows.append(row) }
        }
        return rows.sorted { ($0.durableAt ?? .infinity) < ($1.durableAt ?? .infinity) }
    }

    private init(_ file: CheckpointFile, in directory: String) {
        self.init(
            file: file.file, path: "\(directory)/checkpoints/\(file.file)", name: file.name, tag: file.tag,
            kind: file.kind, bytes: file.byteCount,
            bytesDone: 0,
            state: "", durableAt: nil, seconds: nil, update: file.update, error: nil)
    }

    private init(
        file: String, path: String, name: String, tag: String, kind: String, bytes: UInt64, bytesDone: UInt64,
        state: String,
        durableAt: Double?, seconds: Double?, update: Int64?, error: String?
    ) {
        self.file = file
        self.path = path
        self.name = name
        self.tag = tag
        self.kind = kind
        self.bytes = bytes
        self.bytesDone = bytesDone
        self.state = state
        self.durableAt = durableAt
        self.seconds = seconds
        self.update = update
        self.error = error
    }

    static func table(_ rows: ArraySlice<CheckpointRow>) -> Table {
        var table = Table([
            .init(title: "NAME", isName: true), .init(title: "TAG", isName: true), .init(title: "KIND"),
            .init(title: "SIZE", right: true), .init(title: "UPDATE", right: true),
            .init(title: "TOOK", right: true, canBeMissed: 1), .init(title: "DURABLE"),
        ])
        for row in rows {
            let colour: Text.Colour? =
                switch row.state {
                case "failed", "stalled": .red
                case "durable": nil
                default: .yellow
                }
            let share = row.bytes == 0 ? 0 : Double(row.bytesDone) / Double(row.bytes)
            let state =
                row.durableAt.map { Clock.local($0) }
                ?? (row.state == "writing" ? "writing, \(Int(share * 100)) %" : row.state)
                + (row.error.map { ": \($0)" } ?? "")
            table.add([
                .init(row.name), .init(row.tag), .init(row.kind), .init(Text.bytes(row.bytes)),
                .init(row.update.map { "\($0)" } ?? "-"), .init(row.seconds.map { Text.duration($0) } ?? "-"),
                .init(state, colour),
            ])
        }
        return table
    }
}
