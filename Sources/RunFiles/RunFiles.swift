// SPDX-License-Identifier: Apache-2.0
/// A run as its files show it, with no daemon: the log of entries.th, the checkpoints by their names, sizes and times.
/// Read only.
public import Posix
import TorchFile
public import Wire

public struct RunFiles: Sendable {
    /// `<output_root>[/debug]/<run_id>[/<stage_name>]`.
    public let directory: String

    /// - Throws: where it is no run's directory: it holds neither `tracker` nor `checkpoints`.
    public init(_ directory: String) throws(RunFilesError) {
        self.directory = FileSystem.absolute(directory)
        guard FileFacts(self.directory)?.isDirectory == true else {
            throw RunFilesError(description: "there is no directory \(self.directory)")
        }
        guard
            FileFacts("\(self.directory)/tracker") != nil || FileFacts("\(self.directory)/checkpoints") != nil
        else {
            throw RunFilesError(
                description:
                    "\(self.directory) is not the directory of a run: it holds neither tracker nor checkpoints")
        }
    }

    public static func isRun(_ directory: String) -> Bool { (try? RunFiles(directory)) != nil }

    public var entriesPath: String { "\(directory)/tracker/entries.th" }
    /// A daemon, living or dead, has the log of this run, and it is in no durable entries.th yet.
    public var hasJournal: Bool { FileFacts(journalPath) != nil }
    public var journalPath: String { "\(directory)/tracker/entries.journal" }
    public var hasEntries: Bool { FileFacts(entriesPath)?.isRegular == true }

    public enum State: String, Sendable {
        /// A daemon holds it for its trainer, or still writes what the trainer has left.
        case live
        /// Nobody holds it, and its log is in entries.th.
        case ended
        /// Nobody holds it, and its log is in a journal: the next daemon makes entries.th of it.
        case unfinished
    }

    /// By the locks that a daemon has, on this node or another one that shares its files: no daemon is asked.
    public func state() throws(PosixError) -> State {
        let home = try Directory.open(directory)
        // NFS has no locks for directories.
        if home.isLocked() || home.isLocked(below: "tracker/entries.journal") { return .live }
        return hasJournal ? .unfinished : .ended
    }

    // MARK: The log

    /// The log of entries.th; empty where there is none.
    /// - Parameter keys: only these; nil: all.
    public func log(keys: Set<ByteName>? = nil) throws(RunFilesError) -> RunLogData {
        var data = RunLogData()
        let found = try readEntries(wants: { keys?.contains(ByteName($0)) ?? true }) { key, update, value in
            data.append(value, update: update, to: key)
        }
        data.finish(keys: found)
        return data
    }

    /// Reads the last value, the lowest and the highest of each key from entries.th, in little memory however long it
    /// is. The digest is empty if the run has no entries.th.
    public func digest() throws(RunFilesError) -> LogDigest {
        var digest = LogDigest()
        _ = try readEntries(
            wants: {
                digest.begin($0)
                return true
            }
        ) { _, update, value in digest.add(value, update: update) }
        return digest
    }

    /// - Returns: all keys, in the file's order; none where there is no entries.th.
    private func readEntries(
        wants: (String) -> Bool, _ visit: (_ key: String, _ update: Int64, EntryValue) -> Void
    ) throws(RunFilesError) -> [String] {
        guard hasEntries else { return [] }
        do {
            let file = try MappedFile(entriesPath)
            defer { withExtendedLifetime(file) {} }
            let pickle = try ArchiveVerifier(file.bytes).pickle()
            var reader = EntriesReader(
                UnsafeRawBufferPointer(rebasing: file.bytes[Int(pickle.lowerBound)..<Int(pickle.upperBound)]))
            return try reader.read(wants: wants, visit)
        } catch { throw RunFilesError(description: "\(entriesPath): \(error)") }
    }

    // MARK: Checkpoints

    /// By the time of their writing, oldest first; `.th` files only.
    public func checkpoints() throws(RunFilesError) -> [CheckpointFile] {
        let path = "\(directory)/checkpoints"
        guard FileFacts(path) != nil else { return [] }
        let names: [String]
        do { names = try Directory.open(path).names() } catch { throw RunFilesError(description: "\(error)") }
        return names.compactMap { name in
            guard name.ends(with: ".th"), let facts = FileFacts("\(path)/\(name)"), facts.isRegular else {
                return nil
            }
            return CheckpointFile(
                name, byteCount: facts.byteCount, modifiedAt: facts.modifiedAt,
                logUpdate: FileSystem.attribute(SavePayload.logUpdateAttribute, of: "\(path)/\(name)")
                    .flatMap { Int64($0) },
                info: FileSystem.attribute(SavePayload.infoAttribute, of: "\(path)/\(name)"))
        }.sorted { ($0.modifiedAt, ByteName($0.file)) < ($1.modifiedAt, ByteName($1.file)) }
    }
}

public struct RunFilesError: Error, Sendable, CustomStringConvertible {
    public let description: String
    public init(description: String) { self.description = description }
}

/// `<name>[_<info>]_cp=<tag>_<kind>.th`.
public struct CheckpointFile: Sendable, Equatable {
    public var file: String
    /// With the info, if there is one: the name alone does not tell them apart.
    public var name: String
    public var tag: String
    public var kind: String
    public var byteCount: UInt64
    /// Seconds since 1970.
    public var modifiedAt: Double

    /// The last update of the log that it belongs with, where the file says so (docs/PROTOCOL.md, `save`).
    public var logUpdate: Int64?
    /// The model's info, where the file says so: it is a part of `name` too.
    public var info: String?

    public init(
        _ file: String, byteCount: UInt64, modifiedAt: Double, logUpdate: Int64? = nil, info: String? = nil
    ) {
        self.logUpdate = logUpdate
        self.info = info
        self.file = file
        self.byteCount = byteCount
        self.modifiedAt = modifiedAt
        var rest = file.ends(with: ".th") ? file.dropping(first: 0, last: 3) : file
        kind = ""
        for known in ["model", "optim", "trainer"] where rest.ends(with: "_\(known)") {
            kind = known
            rest = rest.dropping(first: 0, last: known.utf8.count + 1)
        }
        // The last one: a name may hold `_cp=` too.
        let bytes = Array(rest.utf8)
        if let place = bytes.ranges(of: Array("_cp=".utf8)).last {
            name = String(decoding: bytes[..<place.lowerBound], as: UTF8.self)
            tag = String(decoding: bytes[place.upperBound...], as: UTF8.self)
        } else {
            name = rest
            tag = ""
        }
    }

    /// Where in the log it is: as the file says, else the update that Noether's tags hold: `E1_U200_S800`, or `U200`.
    public var update: Int64? { logUpdate ?? number("U") }

    /// The update of the training: a whole tag such as `E1_U200_S800` says it; otherwise it is the same as `update`.
    public var trainingUpdate: Int64? {
        number("E") != nil && number("S") != nil ? number("U") ?? update : update
    }

    /// The number after this letter in a tag such as `E1_U200_S800`.
    public func number(_ letter: Character) -> Int64? {
        for part in tag.split(separator: "_") where part.first == letter {
            let digits = part.dropFirst()
            if digits.allSatisfy({ $0.isASCII && $0.isNumber }), let number = Int64(digits) { return number }
        }
        return nil
    }
}
