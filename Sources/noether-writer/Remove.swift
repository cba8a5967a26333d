// SPDX-License-Identifier: Apache-2.0
/// `noether-writer rm`: removes runs, or checkpoints of runs.
import ArgumentParser
import NoetherWriterClient
import Posix
import RunFiles
import Wire

struct Remove: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "rm",
        abstract: "Removes runs with all that is in their directories, or checkpoints. It asks before.",
        discussion: """
            A live run, and what belongs to one, is refused. Symbolic links are not followed: a link in a run's directory goes, and \
            what it leads to stays. Of a checkpoint only the named file goes; --companions removes the other files of its tag too.

            """
                + examples(
                    "noether-writer rm sweep/crashed", "noether-writer rm a b --yes",
                    "noether-writer rm runs/a/checkpoints/net_cp=U100_model.th",
                    "noether-writer rm runs/a/checkpoints/net_cp=U100_model.th --companions"))
    @Argument(
        help: ArgumentHelp("A run's id or directory, or a file in its checkpoints.", valueName: "run|checkpoint"),
        completion: .knownRuns)
    var targets: [String]
    @OptionGroup var socket: SocketOption
    @OptionGroup var confirmation: Confirmation
    @Flag(help: "With a checkpoint, also the other files of the same tag: models, optimizers, trainers.")
    var companions = false
    @OptionGroup var output: JSONOption

    private struct Removed: Encodable {
        var path: String
        var files: Int
        var bytes: UInt64
    }

    /// A run or a checkpoint to remove, with locks on every run that must not be live.
    private struct Target {
        var path: String
        var locks: [LockedRun]
        /// If it is a checkpoint: its directory, and the names of its files.
        var checkpoints: (directory: Directory, names: [String])?
        var files = 0
        var bytes: UInt64 = 0
        /// Notes to print before the question.
        var notes: [String] = []
    }

    private static let depth = Limits.directoryDepth

    func run() throws {
        // All of them before the first: nothing goes if one is refused.
        var found: [Target] = []
        var seen: Set<ByteName> = []
        for target in targets where seen.insert(ByteName(FileSystem.absolute(target))).inserted {
            let path = FileSystem.absolute(target)
            if let directory = Self.runOf(checkpoint: path) {
                found.append(try checkpoint(path, in: directory, held: found.flatMap(\.locks)))
            } else {
                found.append(try run(NamedRun(target, socket: socket), held: found.flatMap(\.locks)))
            }
        }
        for target in found {
            ThisProcess.writeToStandardError(
                Text.printable(
                    "\(target.path): \(Text.count(target.files, "file")), \(Text.bytes(target.bytes))"
                        + target.notes.map { "; \($0)" }.joined()))
        }
        try confirmation.ask("Remove \(found.count == 1 ? "it" : "these \(found.count)")?")
        var removed: [Removed] = []
        for target in found {
            try Self.remove(target)
            removed.append(Removed(path: target.path, files: target.files, bytes: target.bytes))
            if !output.json { print("removed \(Text.printable(target.path))") }
        }
        _ = try output.print(removed)
    }

    /// The directory of the run that the path is a checkpoint of; nil if it looks like none.
    private static func runOf(checkpoint path: String) -> String? {
        let parts = FileSystem.parts(of: path)
        guard parts.count > 2, parts[parts.count - 2] == "checkpoints" else { return nil }
        let run = "/" + parts.dropLast(2).joined(separator: "/")
        return RunFiles.isRun(run) ? run : nil
    }

    // MARK: A run

    /// - Parameter held: runs that are locked for targets before it.
    private func run(_ named: NamedRun, held: [LockedRun]) throws -> Target {
        func locked(_ path: String) throws -> LockedRun {
            try held.first { $0.directory.path.isSame(as: path) } ?? LockedRun(path)
        }
        guard !named.isRunning else {
            throw Refused(description: "run \(named.runID) is live: \(named.directory). Nothing was removed")
        }
        let run = try locked(named.directory)
        var target = Target(path: named.directory, locks: [run])
        // Any project may have a directory of checkpoints.
        guard run.directory.isDirectory("tracker") else {
            throw Refused(
                description:
                    "\(named.directory) has no directory tracker, which every run has: nothing was removed. Name "
                    + "its checkpoints, or use rm -r")
        }
        let others = try run.directory.names().filter { name in
            !["tracker", "checkpoints"].contains(name) && !name.begins(with: "events.out.tfevents.")
        }.sorted()
        if !others.isEmpty {
            let words = others.prefix(5).joined(separator: ", ") + (others.count > 5 ? ", ..." : "")
            target.notes.append("with what is no part of the run: \(words)")
        }
        // Stages of a run may have its directory around them.
        var problem: PosixError?
        for below in try RunFiles.find(below: named.directory, unreadable: { problem = $0 })
        where !below.isSame(as: named.directory) {
            target.locks.append(try locked(below))
            target.notes.append("with the run in \(below)")
        }
        if let problem { throw problem }
        (target.files, target.bytes) = try run.parent.usage(run.name, depth: Self.depth)
        if try named.files.hasJournal { target.notes.append("its log is in a journal, and in no entries.th yet") }
        return target
    }

    // MARK: A checkpoint

    private func checkpoint(_ path: String, in run: String, held: [LockedRun]) throws -> Target {
        let locked = try held.first { $0.directory.path.isSame(as: run) } ?? LockedRun(run)
        let directory = try locked.checkpoints()
        guard let name = FileSystem.parts(of: path).last, try directory.identity(below: name) != nil else {
            throw NotFound(description: "there is no file \(path)")
        }
        // A sharded checkpoint is a directory.
        let isFile = try name.ends(with: ".th") && directory.isOwnFile(name)
        guard isFile || directory.isDirectory(name) else {
            throw Refused(
                description: "\(path) is no checkpoint of yours, or a symbolic link: nothing was removed")
        }
        var names = [name]
        let others = Self.companions(of: name, among: try directory.names())
        var target = Target(path: path, locks: [locked])
        if companions {
            names += others
            target.notes.append(contentsOf: others.map { "with \($0)" })
        } else if !others.isEmpty {
            target.notes.append(
                "\(Text.count(others.count, "other file")) of its tag \(others.count == 1 ? "stays" : "stay") (--companions)"
            )
        }
        for each in names {
            let size = try directory.usage(each, depth: Self.depth)
            (target.files, target.bytes) = (target.files + size.files, target.bytes + size.bytes)
        }
        target.checkpoints = (directory, names)
        return target
    }

    /// Files of the same tag.
    private static func companions(of name: String, among names: [String]) -> [String] {
        let own = CheckpointFile(name, byteCount: 0, modifiedAt: 0)
        guard name.ends(with: ".th"), !own.tag.isEmpty else { return [] }
        return names.filter { other in
            other.ends(with: ".th") && !other.isSame(as: name)
                && CheckpointFile(other, byteCount: 0, modifiedAt: 0).tag.isSame(as: own.tag)
        }.sorted()
    }

    private static func remove(_ target: Target) throws {
        if let (directory, names) = target.checkpoints {
            for name in names where try directory.isDirectory(name) || directory.isOwnFile(name) {
                try directory.remove(name, recursively: directory.isDirectory(name), depth: depth)
            }
            return try directory.sync()
        }
        let run = target.locks[0]
        // `tracker`, which makes it a run, is removed last: after an interruption the same command can remove the rest.
        for name in try run.directory.names() where name != "tracker" {
            try run.directory.remove(name, recursively: true, depth: depth)
        }
        try run.parent.remove(run.name, recursively: true, depth: depth)
        try run.parent.sync()
    }
}
