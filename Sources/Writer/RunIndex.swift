// SPDX-License-Identifier: Apache-2.0
/// The directories of runs by their ids, so that a run can be named by its id when no daemon knows it any more. One small
/// file in the state directory has a line of JSON for each opened run, and the newest lines stay. It is a convenience:
/// lines are not synced one by one, and a line that is torn or cannot be read is ignored.
public import Posix
import Wire

public struct RunIndex: Sendable {
    public struct Entry: Codable, Sendable, Equatable {
        public var runId: String
        public var runDirectory: String

        public init(runID: String, directory: String) {
            runId = runID
            runDirectory = directory
        }
    }

    public static let fileName = "opened-runs.jsonl"
    /// A file that is longer is made shorter.
    static let byteLimit = 1 << 20
    /// So much of it stays then, in bytes and in runs.
    static let keptByteCount = byteLimit / 2
    static let keptCount = 4096
    private static let triesAtOnce = 20
    private static let pauseSeconds = 0.01

    private let path: String

    /// - Parameter path: of the state directory.
    public init(in path: String) { self.path = path }

    /// Adds these at the end. Several daemons may share the file. Blocks.
    public func add(_ entries: [Entry]) throws(PosixError) {
        let directory = try Directory.openOrCreateRoot(path, mode: 0o700, mask: 0o077)
        for _ in 0..<Self.triesAtOnce {
            switch try AppendFile.open(Self.fileName, in: directory, create: true) {
            case .file(let file): return try Self.add(entries, to: file, in: directory)
            case .held, .missing: Clock.sleep(Self.pauseSeconds)
            }
        }
    }

    private static func add(
        _ entries: [Entry], to file: AppendFile, in directory: Directory
    ) throws(PosixError) {
        let end = try file.byteCount
        // A line before may have no end, since its daemon died.
        let text = entries.compactMap(Self.line).map { "\n\($0)\n" }.joined()
        try file.write(Array(text.utf8), at: end)
        guard end + UInt64(text.utf8.count) > byteLimit else { return }
        var kept: [String] = []
        var byteCount = 0
        for entry in all(in: file).prefix(keptCount) {
            guard let line = line(entry), byteCount + line.utf8.count < keptByteCount else { break }
            byteCount += line.utf8.count + 1
            kept.append(line)
        }
        let shorter = kept.reversed().map { "\($0)\n" }.joined()
        _ = try AppendFile.replace(fileName, in: directory, Array(shorter.utf8))
    }

    /// The runs of the file, each once, the last opened first; none if it cannot be read.
    public func all() -> [Entry] {
        guard let directory = try? Directory.open(path),
            case .file(let file)? = try? AppendFile.open(Self.fileName, in: directory, create: false, locks: false)
        else { return [] }
        return Self.all(in: file)
    }

    private static func all(in file: AppendFile) -> [Entry] {
        var bytes = [UInt8](repeating: 0, count: 2 * byteLimit)
        let size = (try? file.byteCount) ?? 0
        // Somebody else's file may have any length.
        let start = size > UInt64(bytes.count) ? size - UInt64(bytes.count) : 0
        let count = (try? bytes.withUnsafeMutableBytes { try file.read(at: start, into: $0) }) ?? 0
        var seen: Set<ByteName> = []
        return bytes[..<count].split(separator: UInt8(ascii: "\n")).reversed().compactMap { line in
            guard let entry = try? JSONPayload.decode(Entry.self, from: Array(line)),
                entry.runDirectory.begins(with: "/"), seen.insert(ByteName(entry.runDirectory)).inserted
            else { return nil }
            return entry
        }
    }

    private static func line(_ entry: Entry) -> String? {
        (try? JSONPayload.encode(entry)).map { String(decoding: $0, as: UTF8.self) }
    }
}
