// SPDX-License-Identifier: Apache-2.0
/// A run as a person names it, and where what is known of it comes from: the daemon for a living one, its files for an
/// ended one.
import ArgumentParser
import NoetherWriterClient
import Posix
import RunFiles
import Wire
import Writer

struct RunArgument: ParsableArguments {
    @Argument(
        help: ArgumentHelp("A run's id, or its directory.", valueName: "run"),
        completion: .knownRuns)
    var run: String
    @OptionGroup var socket: SocketOption

    func find() throws -> NamedRun { try NamedRun(run, socket: socket) }
}

extension CompletionKind {
    /// Run ids of the user's daemon, and directories.
    static var knownRuns: CompletionKind {
        .custom { _, _, prefix in
            let connection = try? DaemonConnection()
            let report = try? connection?.ask(.status, Empty(), StatusReport.self, timeout: .seconds(2))
            let directory = prefix.lastIndex(of: "/").map { String(prefix[...$0]) } ?? ""
            let names = (try? Directory.open(FileSystem.absolute(directory)).names()) ?? []
            let directories = names.map { directory + $0 }.filter { FileFacts($0)?.isDirectory == true }
            let ids = (report?.runs ?? []).map(\.runId) + OpenedRuns(of: nil).ids
            return (Set(ids).sorted() + directories.sorted().map { $0 + "/" })
                .filter { $0.hasPrefix(prefix) }
        }
    }

    /// Keys of the run that the command line names before.
    static var knownKeys: CompletionKind {
        .custom { words, index, prefix in
            // The program's name and the subcommand's come first.
            let given = words.prefix(max(0, index)).dropFirst(2)
            var option = SocketOption()
            func value(of name: String) -> String? {
                given.firstIndex(of: name).map { given.index(after: $0) }
                    .flatMap { given.indices.contains($0) ? given[$0] : nil }
            }
            option.socket = value(of: "--socket")
            option.user = value(of: "--user")
            try? option.validate()
            // Values of options stand among them: the first that is a run.
            let run = given.lazy.filter { !$0.hasPrefix("-") }.compactMap {
                try? NamedRun($0, socket: option)
            }
            .first
            return ((try? run?.recentKeys()) ?? []).filter { $0.hasPrefix(prefix) }
        }
    }
}

struct NamedRun {
    let runID: String
    let directory: String
    /// nil if the daemon does not know it, or none answers.
    let status: RunStatus?
    private let socket: String

    /// - Throws: `NotFound`.
    init(_ name: String, socket option: SocketOption) throws {
        self = try Self.find([name], socket: option)[0]
    }

    /// Several, of which the daemon is asked once; each of them once.
    /// - Parameter names: also patterns, as of a shell: of directories, or of run ids that the daemon knows.
    /// - Throws: `NotFound`.
    static func find(_ names: [String], socket option: SocketOption) throws -> [NamedRun] {
        var (known, refusal): ([RunStatus]?, String?)
        do { known = try option.status().runs } catch let error as NoetherWriterError where error.isNoDaemon {
            refusal = error.description
        }
        var seen: Set<ByteName> = []
        return try names.flatMap { name -> [NamedRun] in
            do { return [try NamedRun(name, known: known, option, refusal: refusal)] } catch let error as NotFound {
                // A run whose name has such characters comes before the runs that match them as a pattern.
                guard name.utf8.contains(where: { "*?[".utf8.contains($0) }) else { throw error }
            }
            let ids = (known ?? []).map(\.runId) + OpenedRuns(of: option.user).ids
            let found =
                Set(ids.filter { FileSystem.matches($0, pattern: name) }.map(ByteName.init)).sorted().map(\.text)
                + FileSystem.paths(matching: name).filter(RunFiles.isRun)
            guard !found.isEmpty else {
                throw NotFound(
                    description:
                        "no run matches \(name): neither the directory of a run, nor the id of one that is known")
            }
            return try found.map { try NamedRun($0, known: known, option) }
        }.filter { seen.insert(ByteName($0.directory)).inserted }
    }

    /// Short different names for the runs: their ids, or else the parts of their directories that differ.
    static func labels(of runs: [NamedRun]) -> [String] {
        guard Set(runs.map { ByteName($0.runID) }).count < runs.count else { return runs.map(\.runID) }
        let paths = runs.map { FileSystem.parts(of: $0.directory) }
        let shortest = paths.map(\.count).min() ?? 0
        var common = 0
        while common < shortest - 1, paths.allSatisfy({ $0[common].isSame(as: paths[0][common]) }) { common += 1 }
        return paths.map { $0[common...].joined(separator: "/") }
    }

    /// - Parameters:
    ///   - known: to the daemon; nil if none answers.
    ///   - refusal: why none answers, if that is known.
    init(_ name: String, known: [RunStatus]?, _ option: SocketOption, refusal: String? = nil) throws {
        socket = option.path
        let reason =
            known == nil
            ? (refusal ?? "no daemon listens on \(option.path)")
                + ", and it is not the directory of a run. An ended run is named by its directory"
            : "the daemon does not know this run, and it is not the directory of a run. `noether-writer runs` lists the runs "
                + "that the daemon knows; an ended run is named by its directory"
        let known = known ?? []
        let path = FileSystem.absolute(name)
        let byID = known.filter { $0.runId.isSame(as: name) }
        let found =
            known.last { $0.runDirectory.isSame(as: path) } ?? byID.last { $0.state == .running } ?? byID.last
        if let found {
            (runID, directory, status) = (found.runId, found.runDirectory, found)
            return
        }
        if RunFiles.isRun(path) {
            (runID, directory, status) = (FileSystem.parts(of: path).last ?? "/", path, nil)
            return
        }
        let (opened, gone) = OpenedRuns(of: option.user).find(name)
        guard let opened else {
            throw NotFound(
                description: "no run \(name): "
                    + (gone.map { "it was in \($0), which is not the directory of a run any more" } ?? reason))
        }
        // By its directory the daemon may know it as another one: opened anew, or with a link in its path.
        (runID, directory, status) = (name, opened, known.last { $0.runDirectory.isSame(as: opened) })
    }

    /// A run that no daemon holds, from its files.
    init(ofFiles directory: String, _ option: SocketOption) {
        (runID, self.directory, status) = (FileSystem.parts(of: directory).last ?? "/", directory, nil)
        socket = option.path
    }

    var isRunning: Bool { status?.state == .running }
    var files: RunFiles { get throws { try RunFiles(directory) } }

    /// Follows it at the daemon.
    func subscribe(from start: Int?) throws -> Subscription {
        try Subscription.openBlocking(run: runID, from: start, directory: directory, socket: socket)
    }

    /// In words, of a run that only its files tell of.
    func stateOfFiles() throws -> String {
        let files = try files
        return files.hasJournal
            ? "not finished (its log is in a journal)" : files.hasEntries ? "ended" : "no log"
    }

    /// The log: of a living run from the daemon, else from entries.th.
    /// - Parameter keys: only these; nil: all.
    func log(keys: Set<ByteName>? = nil) throws -> RunLogData {
        let files = try? files
        // A daemon that died may have left a journal; the next one makes entries.th of it.
        guard status != nil else { return try FiledRun.log(self.files, keys: keys) }
        if isRunning || files?.hasEntries != true || files?.hasJournal == true {
            let log = try logOfDaemon(keys)
            // It may have gone from the daemon's memory just now.
            if log.lastUpdate != nil || files?.hasEntries != true { return log }
        }
        return try self.files.log(keys: keys)
    }

    /// The log's keys; of a long log that the daemon has, those of its end, so that nobody waits for them.
    func recentKeys() throws -> [String] {
        let files = try files
        if !isRunning, files.hasEntries { return try files.log(keys: []).keys }
        guard let status else { return try log(keys: []).keys }
        return try logOfDaemon([], from: max(0, status.entries - 10_000)).keys
    }

    /// - Parameter start: the first row wanted.
    private func logOfDaemon(_ keys: Set<ByteName>?, from start: Int = 0) throws -> RunLogData {
        let subscription = try subscribe(from: start)
        defer { subscription.close() }
        var data = RunLogData()
        var names: [String] = []
        var seen: Set<ByteName> = []
        var rows = subscription.run?.entries ?? 0
        if rows <= start { rows = 0 }
        while rows > 0, let event = try subscription.nextBlocking() {
            switch event {
            case .row(let row):
                for (key, value) in row.values {
                    if seen.insert(ByteName(key)).inserted { names.append(key) }
                    if keys?.contains(ByteName(key)) ?? true {
                        data.append(EntryValue(value), update: row.update, to: key)
                    }
                }
                if row.index + 1 >= rows { rows = 0 }
            case .restarted(let kept):
                // Begun anew while it was read: what was read is of the old one.
                if kept == 0 { data = RunLogData() }
                rows = 0
            case .ended: rows = 0
            default: continue
            }
        }
        data.finish(keys: names)
        return data
    }
}
