// SPDX-License-Identifier: Apache-2.0
/// A run with what its files say of it: for tables of many runs. No daemon is asked.
import NoetherWriterClient
import Posix
import RunFiles
import Wire
import Writer

struct FiledRun {
    /// The name in the table: the path below the directory that was searched.
    private(set) var name: String
    let directory: String
    /// nil if that cannot be seen.
    private(set) var state: RunFiles.State?
    private(set) var log = LogDigest()
    private(set) var hyperparameters: Hyperparameters
    /// Why something of it is missing here.
    private(set) var problems: [String] = []

    /// - Throws: if it is not the directory of a run.
    init(_ directory: String, name: String) throws {
        (self.directory, self.name) = (directory, name)
        let files = try RunFiles(directory)
        hyperparameters = Hyperparameters()
        do { state = try files.state() } catch { problems.append("\(error)") }
        do { log = try Self.digest(files) } catch { problems.append("\(error)") }
        do { hyperparameters = try Self.hyperparameters(files) } catch { problems.append("\(error)") }
    }

    private static let configByteCount = 4 << 20

    /// None, of a run that has no config.yaml.
    private static func hyperparameters(_ files: RunFiles) throws -> Hyperparameters {
        let path = "\(files.directory)/tracker/config.yaml"
        guard let facts = FileFacts(path) else { return Hyperparameters() }
        guard facts.isRegular, facts.byteCount <= configByteCount else {
            throw RunFilesError(
                description: "\(path) is no file, or larger than \(Text.bytes(UInt64(configByteCount)))")
        }
        let text = try TextFile.read(path, atMost: configByteCount)
        do { return try Hyperparameters(ofConfig: text) } catch {
            throw RunFilesError(description: "\(path): \(error)")
        }
    }

    var stateText: String { state?.rawValue ?? "unreadable" }

    var stateColour: Text.Colour? {
        switch state {
        case .live: .green
        case .unfinished: .yellow
        case .ended: nil
        case nil: .red
        }
    }

    private static func digest(_ files: RunFiles) throws -> LogDigest {
        guard let columns = try journal(files) else { return try files.digest() }
        var digest = LogDigest()
        for key in columns.keys {
            digest.begin(key)
            for (update, value) in columns.values(key: key, from: 0, limit: .max) {
                digest.add(EntryValue(Scalar(value)), update: update)
            }
        }
        return digest
    }

    /// The log of a run that no daemon is asked for.
    /// - Parameter keys: only these; nil: all.
    static func log(_ files: RunFiles, keys: Set<ByteName>?) throws -> RunLogData {
        guard let columns = try journal(files) else { return try files.log(keys: keys) }
        var data = RunLogData()
        for key in columns.keys where keys?.contains(ByteName(key)) ?? true {
            for (update, value) in columns.values(key: key, from: 0, limit: .max) {
                data.append(EntryValue(Scalar(value)), update: update, to: key)
            }
        }
        data.finish(keys: columns.keys)
        return data
    }

    /// A journal holds the whole log of its run. nil: the log is in entries.th.
    private static func journal(_ files: RunFiles) throws -> LogColumns? {
        guard files.hasJournal else { return nil }
        let columns: LogColumns?
        do throws(PosixError) { columns = try JournalReader.log(at: files.journalPath) } catch {
            // A daemon has just made entries.th of it.
            guard error.isMissing else { throw error }
            return nil
        }
        // Before its first update a journal takes the place of nothing.
        guard let columns, columns.count > 0 else { return nil }
        return columns
    }

    /// Runs at and below directories. What cannot be read is said on standard error.
    /// - Returns: the runs, and whether everything could be read.
    /// - Throws: `NotFound` if one of the directories is not there.
    static func find(in directories: [String]) throws -> (runs: [FiledRun], isComplete: Bool) {
        var runs: [FiledRun] = []
        var isComplete = true
        func tell(_ problem: String) {
            isComplete = false
            ThisProcess.writeToStandardError(Text.printable("noether-writer: \(problem)"))
        }
        var seen: Set<ByteName> = []
        for given in directories {
            let top = FileSystem.absolute(given)
            guard FileFacts(top)?.isDirectory == true else {
                throw NotFound(description: "there is no directory \(given)")
            }
            for path in try RunFiles.find(below: top, unreadable: { tell("\($0)") })
            where seen.insert(ByteName(path)).inserted {
                do {
                    let run = try FiledRun(path, name: Self.name(of: path, below: top, given, directories.count))
                    for problem in run.problems { tell("run \(run.name): \(problem)") }
                    runs.append(run)
                } catch let error as RunFilesError {
                    // Somebody may remove one meanwhile.
                    if FileFacts(path) != nil { tell("\(error)") }
                }
            }
        }
        return (runs, isComplete)
    }

    /// Runs by their ids or directories, and those below directories that are no runs. What cannot be read is said on
    /// standard error.
    /// - Returns: the runs, each once, and whether everything could be read.
    /// - Throws: `NotFound` if there is no such run, or none below the directories.
    static func find(named targets: [String], socket: SocketOption) throws -> (runs: [FiledRun], isComplete: Bool) {
        var directories: [String] = []
        var found: [NamedRun] = []
        for target in targets {
            do { found += try NamedRun.find([target], socket: socket) } catch let error as NotFound {
                guard FileFacts(FileSystem.absolute(target))?.isDirectory == true else { throw error }
                directories.append(target)
            }
        }
        var (runs, isComplete): ([FiledRun], Bool)
        if found.isEmpty {
            (runs, isComplete) = try find(in: directories)
        } else {
            var below: [FiledRun]
            (below, isComplete) = try find(in: directories)
            var seen: Set<ByteName> = []
            found = (found + below.map { NamedRun(ofFiles: $0.directory, socket) })
                .filter { seen.insert(ByteName($0.directory)).inserted }
            let known = Dictionary(below.map { (ByteName($0.directory), $0) }, uniquingKeysWith: { first, _ in first })
            runs = []
            for (run, label) in zip(found, NamedRun.labels(of: found)) {
                if var filed = known[ByteName(run.directory)] {
                    filed.name = label
                    runs.append(filed)
                    continue
                }
                let filed = try FiledRun(run.directory, name: label)
                for problem in filed.problems {
                    isComplete = false
                    ThisProcess.writeToStandardError(Text.printable("noether-writer: run \(label): \(problem)"))
                }
                runs.append(filed)
            }
        }
        guard !runs.isEmpty else {
            throw NotFound(description: "no runs below \(targets.joined(separator: ", "))")
        }
        return (runs, isComplete)
    }

    private static func name(of path: String, below top: String, _ given: String, _ count: Int) -> String {
        if path.isSame(as: top) { return count > 1 ? given : FileSystem.parts(of: path).last ?? "/" }
        let rest = path.dropping(first: top.utf8.count == 1 ? 1 : top.utf8.count + 1)
        guard count > 1 else { return rest }
        return given.ends(with: "/") ? given + rest : "\(given)/\(rest)"
    }
}
