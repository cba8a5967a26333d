// SPDX-License-Identifier: Apache-2.0
/// One of a run's event files as it lies in its directory: what is shown already, where the next bytes go, and how rows become events.
/// A value; its file is open only while it is written, so that none pins a file system. Blocks: on a disk queue.
import Posix
import RunFiles
import TensorBoard
import Wire

struct EventFileOnDisk: Sendable {
    static let prefix = "events.out.tfevents."
    /// Tells ours from those that a trainer writes itself.
    private static let suffix = ".noether-writer"
    private static let readByteCount = 1 << 20
    private static let configByteCount: UInt64 = 256 << 10

    let name: String
    /// The last update that files before this one show; nil: none.
    let shownUpdate: Int64?
    private var length: UInt64

    /// A new file.
    /// - Parameters:
    ///   - keeping: up to this update, what the others show stays; nil: they go.
    ///   - updates: the first and the last one of the log; nil: it is empty.
    ///   - hasSummary: of a log with rows, a summary comes in any case.
    /// - Returns: nil where there is nothing to show and nothing to take back.
    static func begin(
        in directory: Directory, keeping: Int64?, updates: ClosedRange<Int64>?, hasSummary: Bool
    ) throws(PosixError) -> EventFileOnDisk? {
        let others = try directory.names().filter { $0.begins(with: prefix) && $0.ends(with: suffix) }
            .sorted()
        let (last, cuts) = try scan(others, keeping: keeping ?? .max, in: directory)
        let shown = keeping.flatMap { keeping in last.map { min($0, keeping) } }
        let hasNew = updates.map { $0.upperBound > shown ?? .min || hasSummary } ?? false
        guard hasNew || (shown != nil && shown != last) else { return nil }
        let now = Clock.wallSeconds
        var bytes: [UInt8] = []
        EventFile.appendHeader(wallTime: now, to: &bytes)
        if let shown {
            EventFile.appendStart(at: shown == .max ? .max : shown + 1, wallTime: now, to: &bytes)
        } else {
            let first = min(0, updates?.lowerBound ?? 0)
            EventFile.appendStart(at: first, wallTime: now, to: &bytes)
            try appendConfig(in: directory, step: first, wallTime: now, to: &bytes)
        }
        let name = nextName(behind: others)
        guard case .file(let file) = try AppendFile.open(name, in: directory, create: true, locks: false)
        else { return nil }
        try file.write(bytes, at: 0)
        if shown == nil {
            try empty(others, in: directory)
        } else {
            // Readers that know the beginning of the new file take it back themselves; TensorBoard's fast loader, its default, does not.
            for (name, length) in cuts { try cut(name, to: length, in: directory) }
        }
        return EventFileOnDisk(name: name, shownUpdate: shown, length: UInt64(bytes.count))
    }

    /// What is to be shown no more. Emptied, not removed: TensorBoard stays for ever with a file that it reads and that is gone
    /// (tensorboard/backend/event_processing/directory_watcher.py). From one that is empty it moves on to the next.
    private static func empty(_ names: [String], in directory: Directory) throws(PosixError) {
        for (index, name) in names.enumerated() {
            let next = names.dropFirst(index + 1).first.flatMap(seconds)
            let wasLeft = next.map { $0 + movedOnSeconds < UInt64(Clock.wallSeconds) } ?? false
            if try cut(name, to: 0, in: directory), wasLeft { try directory.remove(name) }
        }
    }

    /// - Returns: whether it was so short already.
    @discardableResult
    private static func cut(_ name: String, to length: UInt64, in directory: Directory) throws(PosixError)
        -> Bool
    {
        guard case .file(let file) = try AppendFile.open(name, in: directory, create: false, locks: false)
        else { return false }
        if try file.byteCount <= length { return true }
        try file.truncate(to: length)
        return false
    }

    /// With a newer file there for so long, nobody reads the older one.
    private static let movedOnSeconds: UInt64 = 3600

    /// When it was made, by its name.
    private static func seconds(_ name: String) -> UInt64? {
        UInt64(name.dropping(first: prefix.utf8.count).prefix { $0.isNumber })
    }

    /// Files are read in the order of their names, and one that was left is not looked at again.
    private static func nextName(behind others: [String]) -> String {
        let seconds = max(UInt64(Clock.wallSeconds), (others.last.flatMap(seconds) ?? 0) + 1)
        let host = ThisProcess.hostName.replacing("/", with: "_")
        return "\(prefix)\(seconds).\(host).\(ThisProcess.id)\(suffix)"
    }

    /// - Returns: the last update that they show, and where each file is to be cut that shows something behind `keeping`.
    private static func scan(
        _ names: [String], keeping: Int64, in directory: Directory
    ) throws(PosixError) -> (last: Int64?, cuts: [(name: String, length: UInt64)]) {
        var cuts: [(name: String, length: UInt64)] = []
        var scan = EventScan(keeping: keeping)
        for name in names {
            scan.nextFile()
            let file = try ReadFile(name, in: directory)
            var buffer: [UInt8] = []
            var offset: UInt64 = 0
            while offset < file.byteCount, !scan.isBroken {
                let count = Int(min(UInt64(readByteCount), file.byteCount - offset))
                var piece = [UInt8](repeating: 0, count: count)
                var failure: PosixError?
                piece.withUnsafeMutableBytes { piece in
                    do throws(PosixError) { try file.read(at: offset, into: piece) } catch { failure = error }
                }
                if let failure { throw failure }
                offset += UInt64(count)
                buffer += piece
                buffer.removeFirst(buffer.withUnsafeBytes { scan.read($0) })
            }
            if let cut = scan.cut { cuts.append((name, cut)) }
        }
        return (scan.lastStep, cuts)
    }

    /// The run's, or the one that Noether's own tracker wrote: its text, and what the page HPARAMS shows.
    private static func appendConfig(
        in directory: Directory, step: Int64, wallTime: Double, to bytes: inout [UInt8]
    ) throws(PosixError) {
        let file: ReadFile
        do throws(PosixError) {
            file = try ReadFile("config.yaml", in: directory.child("tracker", create: false))
        } catch {
            if error.isMissing { return }
            throw error
        }
        var text = [UInt8](repeating: 0, count: Int(min(configByteCount, file.byteCount)))
        var failure: PosixError?
        text.withUnsafeMutableBytes { text in
            do throws(PosixError) { try file.read(at: 0, into: text) } catch { failure = error }
        }
        if let failure { throw failure }
        let config = String(decoding: text, as: UTF8.self)
        let value = EventFile.Value.text(Self.fenced(config))
        EventFile.append([("hyperparameters", value)], step: step, wallTime: wallTime, to: &bytes)
        // A config that is too long or is not YAML is shown as text only.
        guard file.byteCount <= configByteCount, let found = try? Hyperparameters(ofConfig: config) else { return }
        let shown = found.names.compactMap { name in found[name].map { (name, Self.shown($0)) } }
        guard !shown.isEmpty else { return }
        EventFile.append(hyperparameters: shown, step: step, wallTime: wallTime, to: &bytes)
    }

    private static func shown(_ value: EntryValue) -> EventFile.Hyperparameter {
        switch value {
        case .bool(let truth): .truth(truth)
        // TensorBoard has no column for what is nothing.
        case .none, .string: .text(value.text)
        case .float, .int, .bigInt: .number(value.number ?? .nan)
        }
    }

    static func appendSummary(of log: LogColumns, to bytes: inout [UInt8]) {
        EventFile.append(
            [("summary", .text(fenced(SummaryFile.text(log))))], step: log.lastUpdate ?? 0,
            wallTime: Clock.wallSeconds, to: &bytes)
    }

    /// YAML as Markdown shows it verbatim.
    private static func fenced(_ text: String) -> String {
        var fence = "```"
        while text.contains(fence) { fence += "`" }
        return "\(fence)yaml\n\(text)\(text.hasSuffix("\n") ? "" : "\n")\(fence)"
    }

    /// - Parameter keys: by id.
    func append(_ row: LogPayload, _ keys: [String], to bytes: inout [UInt8]) {
        // A client that resumes sends again what is shown already.
        if let shownUpdate, row.update <= shownUpdate { return }
        append(additional: row, keys, to: &bytes)
    }

    /// - Parameter values: that were added to a row, at whose step they are shown.
    func append(additional values: LogPayload, _ keys: [String], to bytes: inout [UInt8]) {
        let row = values
        let shown = zip(row.keyIDs, row.values).compactMap { id, value in
            Self.shown(value).map { (tag: keys[Int(id)], value: $0) }
        }
        guard !shown.isEmpty else { return }
        EventFile.append(
            shown, step: row.update, wallTime: row.wallTime > 0 ? row.wallTime : Clock.wallSeconds, to: &bytes
        )
    }

    private static func shown(_ value: ScalarBits) -> EventFile.Value? {
        switch value.tag {
        case .float: .scalar(Float(Double(bitPattern: value.bits)))
        case .int: .scalar(Float(Int64(bitPattern: value.bits)))
        case .bool: .scalar(Float(value.bits))
        case .bigInt: .scalar(Float(LargeInteger(twosComplement: value.tail).double))
        case .string: .text(String(decoding: value.tail, as: UTF8.self))
        case .none: nil
        }
    }

    /// - Returns: what it is then; nil where the file is gone, or shorter than it was.
    func write(_ bytes: [UInt8], in directory: Directory) throws(PosixError) -> EventFileOnDisk? {
        try Faults.reach("tensorboard.write")
        guard case .file(let file) = try AppendFile.open(name, in: directory, create: false, locks: false)
        else { return nil }
        // Cut by somebody, it would have a hole, behind which nothing is read.
        guard try file.byteCount >= length else { return nil }
        try file.write(bytes, at: length)
        var written = self
        written.length += UInt64(bytes.count)
        return written
    }
}
