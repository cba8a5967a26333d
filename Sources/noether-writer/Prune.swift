// SPDX-License-Identifier: Apache-2.0
/// `noether-writer prune`: removes older checkpoints of ended runs, by the rules of the daemon.
import ArgumentParser
import NoetherWriterClient
import Posix
import RunFiles
import Wire
import Writer

struct Prune: ParsableCommand {
    enum Mode: String, ExpressibleByArgument, CaseIterable { case min, max }

    static let configuration = CommandConfiguration(
        abstract: "Removes older checkpoints of ended runs, by the rules of keep_last, keep_every and keep_best.",
        discussion: """
            Of each model and kind the newest checkpoints stay, by the numbers in their tags; tags without a number are kept. The \
            newest one is read back with all its checksums before anything older goes. Live runs are left as they are. It asks \
            before; --dry-run only says what would go.

            """
                + examples(
                    "noether-writer prune sweep --keep-last 1 --dry-run",
                    "noether-writer prune runs/a --keep-last 2 --keep-every 1000",
                    "noether-writer prune sweep --keep-best loss/val --best 3 --yes"))
    @Argument(
        help: ArgumentHelp("A run's id or directory, or a directory with runs below it.", valueName: "run|dir"),
        completion: .knownRuns)
    var targets: [String]
    @OptionGroup var socket: SocketOption
    @Option(help: ArgumentHelp("How many of the newest stay; with --keep-best at least 1.", valueName: "count"))
    var keepLast: Int?
    @Option(
        help: ArgumentHelp("Those whose update is a multiple of this stay too.", valueName: "updates"))
    var keepEvery = 0
    @Option(
        help: ArgumentHelp("Those at which this key of the log was best stay too.", valueName: "key"),
        completion: .knownKeys)
    var keepBest: String?
    @Option(help: "Whether the lowest or the highest value is the best.") var mode = Mode.min
    @Option(help: ArgumentHelp("How many of the best stay.", valueName: "count")) var best = 1
    @Flag(help: "Remove nothing, and print what would go.") var dryRun = false
    @OptionGroup var confirmation: Confirmation
    @OptionGroup var output: JSONOption

    func validate() throws {
        guard keepLast != nil || keepBest != nil else {
            throw ValidationError("say what stays: --keep-last, or --keep-best, or both")
        }
        guard keepLast ?? 1 >= 1, best >= 1, keepEvery >= 0 else {
            throw ValidationError("--keep-last and --best must be 1 or more, and --keep-every 0 or more")
        }
    }

    private struct Plan: Encodable {
        var run: String
        var runDirectory: String
        /// Names in its directory `checkpoints`: what goes, or has gone.
        var removed: [String]
        var bytes: UInt64
        var kept: Int
        var problem: String?
    }

    /// The checkpoints to remove from one run, which stays locked meanwhile.
    private struct Work {
        var locked: LockedRun
        var checkpoints: Directory
        var newest: [Retention.Newest]
        var plan: Plan
    }

    private var retention: Retention { Retention(keepLast: keepLast ?? 1, keepEvery: keepEvery) }

    func run() throws {
        var plans: [Plan] = []
        var hasFailed = false
        func tell(_ problem: String) { ThisProcess.writeToStandardError(Text.printable("noether-writer: \(problem)")) }
        for run in try runs() {
            do {
                if let work = try work(on: run) { plans.append(work.plan) }
            } catch let error as Refused {
                // When a directory is searched, live runs in it are left out and are no failure.
                hasFailed = hasFailed || run.isNamed
                tell(error.description)
            } catch let error as RunFilesError {
                hasFailed = true
                tell(error.description)
            } catch let error as NoetherWriterError {
                hasFailed = true
                tell(error.description)
            } catch let error as PosixError {
                hasFailed = true
                tell(error.description)
            }
        }
        let wanted = plans.filter { !$0.removed.isEmpty }
        if !wanted.isEmpty, !dryRun {
            let count = wanted.reduce(0) { $0 + $1.removed.count }
            let bytes = Text.bytes(wanted.reduce(0) { $0 + $1.bytes })
            if !confirmation.yes {
                for plan in wanted {
                    let names = plan.removed.joined(separator: ", ")
                    ThisProcess.writeToStandardError(Text.printable("\(plan.runDirectory): \(names)"))
                }
            }
            try confirmation.ask(
                "Remove \(Text.count(count, "checkpoint")) of \(Text.count(wanted.count, "run")), \(bytes)?")
            for index in plans.indices where !plans[index].removed.isEmpty {
                do { try remove(&plans[index]) } catch {
                    plans[index].removed = []
                    plans[index].problem = "\(error)"
                }
                if let problem = plans[index].problem {
                    hasFailed = true
                    tell("run \(plans[index].run): \(problem)")
                }
            }
        }
        try show(plans)
        if hasFailed { throw ExitCode.failure }
    }

    private func show(_ plans: [Plan]) throws {
        if try output.print(plans) { return }
        for plan in plans {
            for name in plan.removed {
                let path = Text.printable("\(plan.runDirectory)/checkpoints/\(name)")
                print("\(dryRun ? "would remove" : "removed") \(path)")
            }
        }
        let count = plans.reduce(0) { $0 + $1.removed.count }
        let kept = plans.reduce(0) { $0 + $1.kept }
        let bytes = Text.bytes(plans.reduce(0) { $0 + $1.bytes })
        let words = dryRun ? "would be removed" : count == 1 ? "was removed" : "were removed"
        print("\(Text.count(count, "checkpoint")), \(bytes), \(words); \(kept) stay\(kept == 1 ? "s" : "")")
    }

    // MARK: Which runs

    private struct Found {
        var directory: String
        var name: String
        /// By itself, not below a directory.
        var isNamed: Bool
    }

    private func runs() throws -> [Found] {
        var found: [Found] = []
        var seen: Set<ByteName> = []
        for target in targets {
            do {
                let run = try NamedRun(target, socket: socket)
                found.append(Found(directory: run.directory, name: run.runID, isNamed: true))
            } catch let error as NotFound {
                let top = FileSystem.absolute(target)
                guard FileFacts(top)?.isDirectory == true else { throw error }
                var problem: PosixError?
                let below = try RunFiles.find(below: top, unreadable: { problem = $0 })
                if let problem { throw problem }
                guard !below.isEmpty else { throw NotFound(description: "no runs below \(target)") }
                found += below.map {
                    Found(directory: $0, name: FileSystem.parts(of: $0).last ?? "/", isNamed: false)
                }
            }
        }
        return found.filter { seen.insert(ByteName($0.directory)).inserted }
    }

    // MARK: One run

    /// Locks a run and decides what to remove from it. The run stays locked as long as the result is kept.
    /// - Returns: nil if it has no checkpoints.
    private func work(on run: Found) throws -> Work? {
        guard FileFacts("\(run.directory)/checkpoints") != nil else { return nil }
        let locked = try LockedRun(run.directory)
        let checkpoints = try locked.checkpoints()
        // No links, and nobody else's.
        let files = try RunFiles(run.directory).checkpoints().filter { try checkpoints.isOwnFile($0.file) }
        let newest = Retention.Newest.all(among: files, keeping: try bestTags(of: run))
        let names = files.map(\.file)
        var plan = Plan(run: run.name, runDirectory: run.directory, removed: [], bytes: 0, kept: files.count)
        plan.removed = newest.flatMap { retention.removable(behind: $0, among: names) }
        let going = Set(plan.removed.map(ByteName.init))
        plan.bytes = files.filter { going.contains(ByteName($0.file)) }.reduce(0) { $0 + $1.byteCount }
        plan.kept = files.count - going.count
        return Work(locked: locked, checkpoints: checkpoints, newest: newest, plan: plan)
    }

    /// - Throws: `Refused` if the run has no such key: nobody knows which ones are the best.
    private func bestTags(of run: Found) throws -> [String] {
        guard let keepBest else { return [] }
        let log = try NamedRun(ofFiles: run.directory, socket).log(keys: [ByteName(keepBest)])
        guard let series = log.series(keepBest) else {
            throw Refused(
                description: "run \(run.name) has no key \(keepBest), and is left as it is; "
                    + Names.hint(for: keepBest, among: log.keys))
        }
        let values = zip(series.updates, series.values).compactMap { update, value in
            value.number.map { (update: update, value: $0) }
        }
        let tags = try Checkpoint.tags(in: run.directory, by: values, mode == .min ? .min : .max)
        return Array(tags.filter(Retention.understands).prefix(best))
    }

    /// Looks again, and removes nothing else than what was planned.
    private func remove(_ plan: inout Plan) throws {
        let run = Found(directory: plan.runDirectory, name: plan.run, isNamed: true)
        let planned = plan
        plan.removed = []
        guard let work = try work(on: run) else { return }
        // guard: removes-what-was-shown (always)
        guard Set(work.plan.removed.map(ByteName.init)) == Set(planned.removed.map(ByteName.init)) else {
            throw Refused(description: "it has changed meanwhile, and is left as it is")
        }
        for newest in work.newest {
            let (removed, problem) = retention.apply(behind: newest, in: work.checkpoints)
            plan.removed += removed
            plan.problem = plan.problem ?? problem
        }
        if plan.removed.count < planned.removed.count {
            plan.kept = planned.kept + planned.removed.count - plan.removed.count
            let stay = Set(planned.removed.map(ByteName.init)).subtracting(plan.removed.map(ByteName.init))
            plan.problem = plan.problem ?? "\(stay.sorted()[0].text) is no file of yours, and stays"
            plan.bytes = 0
            for file in try RunFiles(run.directory).checkpoints() where stay.contains(ByteName(file.file)) {
                plan.bytes += file.byteCount
            }
            plan.bytes = planned.bytes - min(planned.bytes, plan.bytes)
        }
    }
}
