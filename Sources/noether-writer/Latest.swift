// SPDX-License-Identifier: Apache-2.0
/// `noether-writer latest RUN` and `best RUN KEY`: the path of a checkpoint, for shell scripts.
import ArgumentParser
import NoetherWriterClient
import Posix
import RunFiles
import Wire

struct CheckpointFilter: ParsableArguments {
    @Option(help: "Only those of this model.") var name: String?
    @Option(help: "Only model, optim or trainer; any takes all.") var kind = "model"
    @Option(help: "Only those with this info.") var info: String?
    @Flag(help: "Read no file: a damaged one may be named.") var noVerify = false

    func validate() throws {
        guard kind == "any" || CheckpointKind(rawValue: kind) != nil else {
            throw ValidationError("--kind must be model, optim, trainer or any, not \(kind)")
        }
    }

    var onlyKind: String? { kind == "any" ? nil : kind }

    /// - Throws: `NotFound` if there is none.
    func show(_ found: SavedCheckpoint?, of run: NamedRun, _ output: JSONOption) throws {
        guard let found else {
            throw NotFound(description: "run \(run.runID) has no such checkpoint that is whole: \(run.directory)")
        }
        if try !output.print(found) { print(found.path) }
    }

    /// To the standard error, so that the output stays a path.
    func tell(_ damaged: SavedCheckpoint, _ problem: String) {
        ThisProcess.writeToStandardError(
            Text.printable("noether-writer: \(damaged.path) is damaged, and is left out: \(problem)"))
    }
}

struct Latest: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Prints the path of a run's newest checkpoint that is whole.",
        discussion: """
            Its checksums are compared; a damaged file is left out, and the next older one is taken. Exit status 4: there is none.

            """
                + examples(
                    "python train.py --load $(noether-writer latest runs/abcde)",
                    "noether-writer latest runs/abcde --kind optim --json"))
    @OptionGroup var argument: RunArgument
    @OptionGroup var filter: CheckpointFilter
    @OptionGroup var output: JSONOption
    @Option(help: "Only those of this update.") var update: Int64?

    func run() throws {
        let run = try argument.find()
        let found = try Checkpoint.latest(
            in: run.directory, name: filter.name, kind: filter.onlyKind, info: filter.info, update: update,
            verify: !filter.noVerify, damaged: filter.tell)
        try filter.show(found, of: run, output)
    }
}

struct Best: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Prints the path of the checkpoint at which a key was lowest, or highest.",
        discussion: """
            The value of a checkpoint is the last one that was logged up to its update, and after the checkpoint before it.

            """
                + examples("noether-writer best runs/abcde loss/val", "noether-writer best runs/abcde accuracy --max"))
    @OptionGroup var argument: RunArgument
    @Argument(help: "A key of the log.", completion: .knownKeys) var key: String
    @Flag(name: .customLong("max"), help: "The highest value is the best.") var isHighest = false
    @OptionGroup var filter: CheckpointFilter
    @OptionGroup var output: JSONOption

    func run() throws {
        let run = try argument.find()
        let log = try run.log(keys: [ByteName(key)])
        guard let series = log.series(key) else {
            throw NotFound(
                description: "run \(run.runID) has no key \(key); \(Names.hint(for: key, among: log.keys))")
        }
        let values = zip(series.updates, series.values).compactMap { update, value in
            value.number.map { (update: update, value: $0) }
        }
        let found = try Checkpoint.best(
            in: run.directory, by: values, isHighest ? .max : .min, name: filter.name, kind: filter.onlyKind,
            info: filter.info, verify: !filter.noVerify, damaged: filter.tell)
        try filter.show(found, of: run, output)
    }
}
