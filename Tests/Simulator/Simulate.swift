// SPDX-License-Identifier: Apache-2.0
/// Runs worlds, one seed after the other, until the time is over or something is wrong. The same seed gives the same
/// world again, event by event.
///
///     noether-writer-simulate [--seconds N] [--seed N] [--worlds N] [--no-crashes] [--no-faults] [--losses]
///                             [--trace]
import CLinux
import Dispatch
import Glibc
import Posix
import SimulatedMachine
import Writer

struct Options {
    var seconds = 60.0
    var seed: UInt64 = 1_000_000 + UInt64(Clock.wallSeconds * 1000) % 1_000_000_000
    /// Those that have found something come first.
    var known: [UInt64] = [3, 5, 82, 157, 538, 548, 686, 856, 1138, 2226, 3303, 5318, 10608, 21723]
    var worlds = Int.max
    var crashes = true
    var faults = true
    /// Connections end while both sides live.
    var losses = false
    var traces = false
    /// Of a failed world's last events.
    var lines = 60

    init(_ arguments: [String]) {
        var arguments = arguments[...]
        func fail(_ words: String) -> Never {
            ThisProcess.writeToStandardError("noether-writer-simulate: \(words)")
            ThisProcess.exit(64)
        }
        func number(_ name: String) -> UInt64 {
            guard let text = arguments.popFirst(), let number = UInt64(text) else { fail("\(name) needs a number") }
            return number
        }
        while let argument = arguments.popFirst() {
            switch argument {
            case "--seconds": seconds = Double(number(argument))
            case "--seed":
                seed = number(argument)
                known = []
            case "--worlds": worlds = Int(number(argument))
            case "--lines": lines = Int(number(argument))
            case "--no-crashes": crashes = false
            case "--no-faults": faults = false
            case "--losses": losses = true
            case "--trace": traces = true
            default: fail("no option \(argument)")
            }
        }
    }

    /// On a command line, the time first.
    var arguments: [String] {
        var list = ["--seconds", "\(UInt64(seconds))", "--seed", "\(seed)"]
        if worlds != .max { list += ["--worlds", "\(worlds)"] }
        if lines != 60 { list += ["--lines", "\(lines)"] }
        if !crashes { list.append("--no-crashes") }
        if !faults { list.append("--no-faults") }
        if losses { list.append("--losses") }
        if traces { list.append("--trace") }
        return list
    }
}

@main
enum Simulate {
    static func main() {
        repeatable()
        let options = Options(Array(CommandLine.arguments.dropFirst()))
        // One thread runs at a time: to wake the next one on another processor would take most of the time.
        _ = nw_stay_on_one_processor()
        sayWhereItStops()
        DaemonActor.queue.async { DaemonActor.assumeIsolated { run(options) } }
        dispatchMain()
    }

    /// Swift's sets and dictionaries have another order in each process, unless this variable says otherwise.
    private static func repeatable() {
        guard ThisProcess.environment("SWIFT_DETERMINISTIC_HASHING") == nil else { return }
        setenv("SWIFT_DETERMINISTIC_HASHING", "1", 1)
        startAgain(Array(CommandLine.arguments.dropFirst()))
    }

    private static func startAgain(_ options: [String]) -> Never {
        fflush(nil)
        var arguments: [UnsafeMutablePointer<CChar>?] = [strdup(CommandLine.arguments[0])] + options.map { strdup($0) }
        arguments.append(nil)
        execv("/proc/self/exe", arguments)
        ThisProcess.writeToStandardError("noether-writer-simulate: it can't start itself again")
        ThisProcess.exit(71)
    }

    @DaemonActor
    private static func run(_ options: Options) {
        let start = KernelClock.seconds
        var (worlds, steps, crashes, calls, checks) = (0, 0, 0, 0, 0)
        let most = min(options.worlds, worldsPerProcess)
        var workers: [Worker] = []
        var known = options.known[...]
        var next = options.seed
        var simulated = 0.0
        while worlds < most, KernelClock.seconds - start < options.seconds {
            let seed = known.popFirst() ?? next
            if seed == next { next += 1 }
            begins(seed)
            let world = World(seed: seed, options: options, workers: workers, traces: options.traces)
            let violation = world.live()
            workers = world.end()
            worlds += 1
            steps += world.schedule.steps
            crashes += world.crashPoints
            calls += world.disk.callCount
            checks += world.model.checkCount
            simulated += world.schedule.now - 1000
            if let violation {
                fail(seed, violation, world, options, workers)
            }
            if options.traces { for line in world.schedule.trace ?? [] { print(line) } }
        }
        let seconds = KernelClock.seconds - start
        let each = { (count: Int) in "\(count) (\(Int(Double(count) * 60 / seconds)) a minute)" }
        print(
            "seeds \(options.seed) to \(next - 1): nothing is wrong. \(each(worlds)) worlds, \(each(crashes)) crash points, "
                + "\(each(steps)) steps, \(each(calls)) system calls, \(checks) files read; "
                + "\(Int(simulated / 3600)) hours of theirs in \(Int(seconds)) s")
        if options.worlds > worlds, options.seconds - seconds >= 1 {
            var rest = options
            rest.seconds -= seconds
            rest.seed = next
            if rest.worlds != .max { rest.worlds -= worlds }
            startAgain(rest.arguments)
        }
        ThisProcess.exit(0)
    }

    /// A world whose daemon was killed keeps what that daemon held, as a dead process does not: memory and descriptors.
    private static let worldsPerProcess = 5000

    /// The same world again, this time with its events in words.
    @DaemonActor
    private static func fail(
        _ seed: UInt64, _ violation: Violation, _ world: World, _ options: Options, _ workers: [Worker]
    ) -> Never {
        let again = World(seed: seed, options: options, workers: workers, traces: true)
        let same = again.live()
        for line in (again.schedule.trace ?? []).suffix(options.lines) { print(line) }
        print("seed \(seed), step \(world.schedule.steps), crash point \(world.crashPoints): \(violation.words)")
        if same?.words != violation.words || again.schedule.steps != world.schedule.steps {
            print("it is another one the second time: \(same?.words ?? "nothing is wrong")")
        }
        var one = options
        (one.seed, one.worlds) = (seed, 1)
        print("again: noether-writer-simulate \(one.arguments.dropFirst(2).joined(separator: " "))")
        ThisProcess.exit(1)
    }

    // MARK: A trap, or a hang, says which seed it was

    nonisolated(unsafe) private static var last: UnsafeMutablePointer<CChar> = strdup("seed ????????????????????\n")
    nonisolated(unsafe) private static var lastLength = 0
    nonisolated(unsafe) private static var current: UInt64 = 0

    private static func begins(_ seed: UInt64) {
        let text = "noether-writer-simulate: it stopped in seed \(seed)\n"
        free(last)
        last = strdup(text)
        lastLength = text.utf8.count
        alarm(UInt32(hangSeconds))
    }

    private static let hangSeconds = 60

    private static func sayWhereItStops() {
        for number in [SIGILL, SIGTRAP, SIGSEGV, SIGABRT, SIGALRM] {
            signal(number) { number in
                _ = write(2, Simulate.last, Simulate.lastLength)
                signal(number, SIG_DFL)
                raise(number)
            }
        }
    }
}

/// Not the simulated one.
private enum KernelClock {
    static var seconds: Double {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
}
