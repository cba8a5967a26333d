// SPDX-License-Identifier: Apache-2.0
/// What a trainer meets when something goes wrong, one after the other. Tests/EndToEnd/test_swift_faults.py starts each
/// with a directory, and talks to it through its standard input and output.
import FoundationEssentials
import Glibc
import Logging
import NoetherWriterClient
import Synchronization

enum Faults {
    static func run(_ name: String, _ root: String) async throws {
        switch name {
        case "finish": try await finishTwice(root)
        case "again": try await logAgain(root)
        case "overtaken": try await overtaken(root)
        case "outlive": try await outlive(root)
        case "cancel": try await cancel(root)
        case "idle": try await idle(root)
        case "bounded": try await bounded(root)
        case "poison": try await poison(root)
        case "names": try await names(root)
        case "told": try await told(root)
        case "lost": try await lost(root)
        case "readers": try await readers(root)
        case "load": try await load(root)
        case "scalars": try await scalars(root)
        case "storm": try await storm(root)
        case "progress": try await progress(root)
        case "timeouts": try await timeouts(root)
        case "many": try await many(root)
        case "deep": try await deep(root)
        case "let go": try await letGo(root)
        case "logger": try await logger(root)
        case "curious logger": try await curiousLogger(root)
        case "nobody reads": try await nobodyReads(root)
        case "two accents": try await twoAccents(root)
        case "crowd": try await crowd(root)
        case "no daemon": await noDaemon(root)
        default: preconditionFailure("no such case")
        }
    }

    fileprivate static func say(_ words: String) {
        print(words)
        fflush(nil)
    }

    /// Says why something failed, as a program that knows nothing of this library's types would.
    fileprivate static func attempt(_ what: String, _ body: () async throws -> Void) async {
        do {
            try await body()
            say("\(what): done")
        } catch let error as NoetherWriterError {
            say("\(what): \(error.code): \((error as any Error).words)")
        } catch { say("\(what): \(type(of: error))") }
    }

    fileprivate static func waitForInput() async {
        await withCheckedContinuation { continuation in
            let thread = Thread { continuation.resume() }
            thread.start()
        }
    }

    /// One that reads a line.
    private struct Thread {
        let told: @Sendable () -> Void
        init(_ told: @escaping @Sendable () -> Void) { self.told = told }
        func start() {
            let box = Box(told)
            var thread = pthread_t()
            pthread_create(
                &thread, nil,
                { pointer in
                    _ = readLine()
                    Unmanaged<Box>.fromOpaque(pointer!).takeRetainedValue().told()
                    return nil
                }, Unmanaged.passRetained(box).toOpaque())
        }
        final class Box {
            let told: @Sendable () -> Void
            init(_ told: @escaping @Sendable () -> Void) { self.told = told }
        }
    }

    // MARK: 1

    private static func finishTwice(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        try run.log(["loss": 1], update: 1)
        say("stop")
        await waitForInput()
        let ticket = try run.save("net", tag: "t", ["a": 1])
        await attempt("first") { try await run.finish(timeout: .milliseconds(100)) }
        await attempt("second") { try await run.finish(timeout: .milliseconds(100)) }
        async let one = run.finish()
        async let two = run.finish()
        say("go on")
        let (first, second) = try await (one, two)
        let third = try await run.finish()
        say("\(first == second && second == third) \(third?.path() ?? "none") \(ticket.isDurable)")
    }

    // MARK: 2

    private static func logAgain(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        try run.log(["loss": 1], update: 1)
        try await run.finish()
        try run.log(["loss": 2], update: 2)
        try await run.finish()
        say("2")
        await waitForInput()
        try run.log(["loss": 3], update: 3)
    }

    /// A second run of the same name in one process takes the log over.
    private static func overtaken(_ root: String) async throws {
        let first = try await Run(outputRoot: root, runID: "r")
        try first.log(["loss": 1], update: 1)
        try await first.finish()
        let second = try await Run(outputRoot: root, runID: "r")
        try second.log(["loss": 7], update: 7)
        try await second.finish()
        for update in Int64(2)...3 {
            try first.log(["loss": 0], update: update)
            await attempt("first") { try await first.finish() }
            say("next")
            await waitForInput()
        }
        try second.log(["loss": 8], update: 8)
        try await second.finish()
    }

    // MARK: 3

    private static func outlive(_ root: String) async throws {
        func saved(_ id: String, closes: Bool) async throws -> Ticket {
            let run = try await Run(outputRoot: root, runID: id)
            let ticket = try run.save("net", tag: "t", ["a": 1])
            if closes { run.close() }
            return ticket
        }
        let left = try await saved("left", closes: false)
        let closed = try await saved("closed", closes: true)
        await attempt("left") { try await left.waitUntilDurable() }
        await attempt("closed") { try await closed.waitUntilDurable() }
        say("\(left.isDurable) \(closed.isDurable)")
    }

    // MARK: 4

    private static func cancel(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        let subscription = try await Subscription(run: "r")
        let connection = try await DaemonConnection.open()
        say("stop")
        await waitForInput()
        let ticket = try run.save("net", tag: "t", ["a": 1])
        let waits: [(String, @Sendable () async throws -> Void)] = [
            ("ticket", { try await ticket.waitUntilDurable() }),
            ("run", { try await run.waitUntilDurable() }),
            ("finish", { try await run.finish() }),
            ("values", { _ = try await run.values("loss") }),
            ("flush", { try await run.flush() }),
            ("status", { _ = try await connection.status() }),
            ("next", { _ = try await subscription.next() }),
            ("events", { for try await _ in subscription {} }),
        ]
        // Each of them four times: more than there are threads for tasks.
        let tasks = (0..<4).flatMap { _ in
            waits.map { name, wait in Task { await attempt(name, wait) } }
        }
        for _ in 0..<50 { try await Task.sleep(for: .milliseconds(20)) }
        say("heartbeats")
        for task in tasks { task.cancel() }
        for task in tasks { await task.value }
        await attempt("time") { try await ticket.waitUntilDurable(timeout: .milliseconds(50)) }
        say("go on")
        await attempt("later") { try await ticket.waitUntilDurable() }
    }

    fileprivate static var threadCount: Int {
        guard let file = fopen("/proc/self/status", "r") else { return 0 }
        defer { fclose(file) }
        var line: UnsafeMutablePointer<CChar>?
        var size = 0
        while getline(&line, &size, file) > 0 {
            let text = String(cString: line!)
            if text.hasPrefix("Threads:") { return Int(text.filter(\.isNumber))! }
        }
        return 0
    }

    /// Many that are silent hold no thread each.
    private static func idle(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        var tasks: [Task<Int, any Error>] = []
        for _ in 0..<40 {
            let subscription = try await Subscription(run: "r")
            tasks.append(
                Task {
                    var rows = 0
                    for try await event in subscription {
                        if case .row = event { rows += 1 }
                    }
                    return rows
                })
        }
        for _ in 0..<10 { try await Task.sleep(for: .milliseconds(20)) }
        say("\(threadCount < 20)")
        try run.log(["loss": 1], update: 1)
        try run.log(["loss": 2], update: 2)
        try await run.finish()
        run.close()
        var rows: [Int] = []
        for task in tasks { rows.append(try await task.value) }
        say("\(Set(rows))")
    }

    // MARK: 5

    private static func bounded(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        try run.log(["loss": 1], update: 1)
        say("stop")
        await waitForInput()
        let ticket = try run.save("net", tag: "t", ["a": 1])
        async let first: Void = attempt("ticket") { try await ticket.waitUntilDurable() }
        async let second: Void = attempt("run") { try await run.waitUntilDurable() }
        async let third: Void = attempt("finish") { try await run.finish() }
        _ = await (first, second, third)
        say("go on")
        await attempt("later") { try await run.finish() }
    }

    // MARK: 6

    private static func poison(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        for update in Int64(1)...2000 where update != 11 {
            try run.log(["loss": .int(update)], update: update)
            guard update == 10 else { continue }
            for count in [0, 256, 300] {
                await attempt("\(count)") {
                    try run.log(
                        ["big": .bigInt(littleEndian: [UInt8](repeating: 1, count: count))], update: 11)
                }
            }
            await attempt("smallest") { try run.log(["a": 1], update: Int64.min) }
            await attempt("key") { try run.log(["a\0b": 1], update: 11) }
            try run.log(["big": .bigInt(littleEndian: [UInt8](repeating: 1, count: 255))], update: 11)
        }
        let path = try await run.finish()
        say(path?.path() ?? "none")
    }

    // MARK: 7

    private static func names(_ root: String) async throws {
        await attempt("run id") { _ = try await Run(outputRoot: root, runID: "a/b") }
        await attempt("stage") { _ = try await Run(outputRoot: root, runID: "r", stageName: "..") }
        await attempt("root") { _ = try await Run(outputRoot: "a\0b", runID: "r") }
        let run = try await Run(outputRoot: root, runID: "r")
        let long = String(repeating: "l", count: 300)
        await attempt("name") { try run.save("../up", tag: "t", ["a": 1]) }
        await attempt("tag") { try run.save("net", tag: "", ["a": 1]) }
        await attempt("info") { try run.save("net", tag: "t", ["a": 1], info: "a\nb") }
        await attempt("file") { try run.save("net", tag: String(long.prefix(250)), ["a": 1]) }
        await attempt("long") { try run.save(long, tag: "t", ["a": 1]) }
        await attempt("none") { try run.save(["a": 1], as: []) }
        await attempt("twice") {
            try run.save(
                ["a": 1],
                as: [Run.Target("net", tag: "t"), Run.Target("net", tag: "u"), Run.Target("net", tag: "t")])
        }
        // The size is refused before anything looks at the bytes.
        let bytes = UnsafeRawBufferPointer(start: UnsafeRawPointer(bitPattern: 4096), count: 2 << 40)
        let huge = Tensor(TensorStorage(borrowing: bytes), dtype: .uint8, shape: [2 << 40])
        await attempt("size") { try run.save("net", tag: "huge", .tensor(huge)) }
        await attempt("log") { try run.log(["a": 1], update: 1) }
        let ticket = try run.save("net", tag: "t", ["a": 1])
        say(ticket.paths.joined(separator: " "))
        try await ticket.waitUntilDurable()
        say(ticket.paths.joined(separator: " "))
        try await run.finish()
    }

    private static func told(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        let refused = try run.save("refused", tag: "t", ["a": 1])
        await attempt("ticket") { try await refused.waitUntilDurable() }
        say("\(refused.failure?.code == .storage) \(refused.isDone)")
        await attempt("log") { try run.log(["a": 1], update: 1) }
        await attempt("save") { try run.save("net", tag: "t", ["a": 1]) }
        await attempt("finish") { try await run.finish() }
        let again = try run.save("refused", tag: "t", ["a": 1])
        while !again.isDone { try await Task.sleep(for: .milliseconds(5)) }
        await attempt("log") { try run.log(["a": 1], update: 2) }
        await attempt("finish") { try await run.finish() }
        await attempt("finish") { try await run.finish() }
    }

    // MARK: 8

    private static func lost(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        let leftAlone = try await Run(outputRoot: root, runID: "let go")
        say("stop")
        await waitForInput()
        try run.log(["a": 1], update: 1)
        try run.save("net", tag: "t", ["a": 1])
        try leftAlone.log(["a": 1], update: 1)
        try leftAlone.log(["a": 2], update: 2)
    }

    // MARK: 10

    private static func readers(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        try run.log(["loss": 1], update: 1)
        let subscription = try await Subscription(run: "r")
        let first = try await subscription.next()
        if case .row(let row)? = first { say("row \(row.update)") }
        let reader = Task { () -> [Int64] in
            var updates: [Int64] = []
            for try await event in subscription {
                if case .row(let row) = event { updates.append(row.update) }
            }
            return updates
        }
        let cancelled = Task { try await subscription.next() }
        try await Task.sleep(for: .milliseconds(20))
        cancelled.cancel()
        do { _ = try await cancelled.value } catch { say("\(type(of: error))") }
        for update in Int64(2)...5 { try run.log(["loss": 1], update: update) }
        try await run.finish()
        run.close()
        say("\(try await reader.value)")
    }
}

// MARK: Many at once

extension Faults {
    /// Tasks that save, ask, wait for too short a time and finish at once, while daemons die.
    fileprivate static func storm(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        let tickets = try await withThrowingTaskGroup(of: [Ticket].self) { group in
            for task in 0..<8 {
                group.addTask {
                    let weights = Tensor([Float](repeating: Float(task), count: 100_000), shape: [100_000])
                    var tickets: [Ticket] = []
                    for turn in 0..<30 {
                        let state: StateValue = ["w": .tensor(weights), "turn": .int(Int64(turn))]
                        tickets.append(try run.save("net\(task)", tag: "latest", state))
                        if task == 0 {
                            try run.log(["turn": turn], update: turn)
                            say("\(turn)")
                        }
                        try? await tickets.last?.waitUntilDurable(timeout: .milliseconds(30))
                        _ = try? await run.finish(timeout: .milliseconds(1))
                        let values = Task { try await run.values("turn") }
                        if turn.isMultiple(of: 2) { values.cancel() }
                        _ = try? await values.value
                    }
                    return tickets
                }
            }
            return try await group.reduce(into: []) { $0 += $1 }
        }
        let path = try await run.finish()
        say("\(tickets.allSatisfy(\.isDurable)) \(tickets.count) \(path?.path() ?? "none")")
    }

    fileprivate static func progress(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        let ticket = try run.save(
            "net", tag: "t", .tensor(Tensor([Float](repeating: 1, count: 5_000_000), shape: [5_000_000])))
        var last: Ticket.Progress?
        for await progress in ticket.progress { last = progress }
        say("\(ticket.isDone) \((last?.bytesDone ?? 0) == ticket.bytesTotal) \(ticket.bytesTotal > 20_000_000)")
        // One that is over has an end too.
        for await progress in ticket.progress { say("\(progress.bytesDone == ticket.bytesTotal)") }
    }
}

// MARK: Odd programs

extension Faults {
    /// Waits that lose a race with a clock, again and again, while the daemon is stopped: none is left behind.
    fileprivate static func timeouts(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        say("stop")
        await waitForInput()
        let ticket = try run.save("net", tag: "t", ["a": 1])
        for _ in 0..<100 {
            let isFirst = try await withThrowingTaskGroup(of: Bool.self) { group in
                group.addTask {
                    try await ticket.waitUntilDurable()
                    return true
                }
                group.addTask {
                    for await _ in ticket.progress {}
                    return true
                }
                group.addTask {
                    try await run.finish()
                    return true
                }
                group.addTask {
                    try await Task.sleep(for: .milliseconds(1))
                    return false
                }
                let first = try await group.next()
                group.cancelAll()
                return first
            }
            precondition(isFirst == false)
        }
        say("\(threadCount < 20)")
        await waitForInput()
        try await ticket.waitUntilDurable()
        try await run.finish()
        say("\(ticket.isDurable)")
    }

    /// More tickets than there are descriptors, whose run is gone.
    fileprivate static func many(_ root: String) async throws {
        func saved() async throws -> [Ticket] {
            let run = try await Run(outputRoot: root, runID: "r")
            return try (0..<10_000).map { try run.save("net", tag: "\($0 % 7)", ["number": .int(Int64($0))]) }
        }
        let tickets = try await saved()
        for ticket in tickets { try await ticket.waitUntilDurable() }
        say("\(tickets.allSatisfy(\.isDurable))")
    }

    /// What the library says by itself goes to the program's logger.
    fileprivate static func logger(_ root: String) async throws {
        let run = try await Run(
            outputRoot: root, runID: "r", rank: 1,
            logger: Logger(label: "trainer") { label in
                var handler = StreamLogHandler.standardOutput(label: label)
                handler.logLevel = .warning
                return handler
            })
        try run.log(["a": 1])
        try run.log(["a": 1])
    }

    /// A logger that looks at the run that speaks to it, and logs to it.
    private struct Curious: LogHandler {
        static let run = Mutex<Run?>(nil)
        var metadata: Logger.Metadata = [:]
        var logLevel = Logger.Level.warning
        subscript(metadataKey _: String) -> Logger.Metadata.Value? {
            get { nil }
            set {}
        }

        func log(event _: LogEvent) {
            guard let run = Self.run.withLock({ $0 }) else { return }
            try? run.log(["warnings": 1])
            Faults.say("it was said after update \(run.lastUpdate ?? 0)")
        }
    }

    fileprivate static func curiousLogger(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r", logger: Logger(label: "trainer") { _ in Curious() })
        Curious.run.withLock { $0 = run }
        try run.log(["a": 1], update: 10)
        try run.log(["a": 2], update: 10)
        try await run.finish()
        Curious.run.withLock { $0 = nil }
        say("done")
    }

    /// Standard error is a pipe whose reader is gone.
    fileprivate static func nobodyReads(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r", rank: 1)
        say("open")
        await waitForInput()
        try run.log(["a": 1])
        say("done")
    }

    /// Many runs that wait for a daemon that was stopped, beside tasks that have something else to do.
    fileprivate static func crowd(_ root: String) async throws {
        let opens = (0..<100).map { number in
            Task {
                try await Run(
                    outputRoot: root, runID: "r\(number)",
                    logger: Logger(label: "none") { _ in SwiftLogNoOpLogHandler() })
            }
        }
        for _ in 0..<20 { try await Task.sleep(for: .milliseconds(10)) }
        say("the others go on")
        var runs: [Run] = []
        for open in opens { runs.append(try await open.value) }
        for _ in 0..<20 { try await Task.sleep(for: .milliseconds(10)) }
        say("\(runs.count) are open")
    }

    /// What listens is no daemon: each try ends, and nothing of it is left.
    fileprivate static func noDaemon(_ root: String) async {
        func descriptors() -> Int { (0..<1000).count { fcntl(Int32($0), F_GETFD) >= 0 } }
        await attempt("first") { _ = try await Run(outputRoot: root, runID: "r") }
        let before = descriptors()
        for _ in 0..<50 { _ = try? await Run(outputRoot: root, runID: "r") }
        while descriptors() > before + 10 { try? await Task.sleep(for: .milliseconds(10)) }
        say("done")
    }

    /// One letter with its accent, and a letter and an accent: two files, to be found again.
    fileprivate static func twoAccents(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        for info in ["\u{E9}", "e\u{301}"] {
            try run.save("net", tag: "latest", .int(Int64(info.utf8.count)), info: info)
        }
        try await run.waitUntilDurable()
        for info in ["\u{E9}", "e\u{301}"] {
            let found = try Checkpoint.latest(in: run.directory, info: info)
            say("\(try found.map { try Checkpoint.load($0.path) } == .int(Int64(info.utf8.count)))")
        }
        say("\(Scalar.string("\u{E9}") != .string("e\u{301}"))")
    }

    /// As many levels as there may be, and one more, of each kind.
    fileprivate static func deep(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        for count in [1000, 1001, 10_000, 200_000] {
            for (name, nest) in [
                ("list", { StateValue.list([$0]) }), ("tuple", { .tuple([$0]) }), ("dict", { ["a": $0] }),
            ] as [(String, (StateValue) -> StateValue)] {
                var state: StateValue = 1
                for _ in 0..<count { state = nest(state) }
                await attempt("\(count) \(name)") {
                    let ticket = try run.save("net", tag: "\(name)", state)
                    try await ticket.waitUntilDurable()
                    let loaded = try Checkpoint.load(ticket.paths[0])
                    precondition(loaded == state)
                }
            }
        }
    }

    /// A run that is let go of at each point, while tasks use it.
    fileprivate static func letGo(_ root: String) async throws {
        actor Owner {
            var run: Run?
            func open(_ root: String, _ id: String) async throws { run = try await Run(outputRoot: root, runID: id) }
            // Reentrant: others come in while it waits.
            func train(_ update: Int) async throws -> Ticket? {
                try run?.log(["a": update], update: update)
                let ticket = try run?.save("net", tag: "\(update)", ["a": 1])
                try await ticket?.waitUntilDurable()
                if update == 5 { run = nil }
                return ticket
            }
        }
        for number in 0..<10 {
            let owner = Owner()
            try await owner.open(root, "r\(number)")
            let tickets = try await withThrowingTaskGroup(of: Ticket?.self) { group in
                for update in 1...8 { group.addTask { try? await owner.train(update) } }
                return try await group.reduce(into: []) { $0.append($1) }
            }
            precondition(tickets.compactMap(\.self).allSatisfy(\.isDurable))
        }
        say("done")
    }
}

// MARK: Scalars

extension Faults {
    /// Logs as people write it.
    fileprivate static func scalars(_ root: String) async throws {
        try await withRun(outputRoot: root, runID: "r") { run in
            let (loss, rate, epoch, count) = (Float(0.5), 0.25, 3, UInt64.max)
            let missing: Double? = nil
            var step = 0
            func next() -> Int {
                step += 1
                return step
            }
            try run.log(["loss": loss, "epoch": epoch], update: next())
            try run.log(["loss": loss, "rate": rate, "count": count, "missing": missing], update: next())
            try run.log(["loss": 1, "word": "a", "yes": true], update: Int32(next()))
            try run.log(["loss": .float(2)], update: UInt8(next()), epoch: 4)
            try run.log(["loss": Double(step)], update: next(), epoch: epoch, sample: step)
            let scalars: [String: Scalar] = ["z": 1, "y": 2.5]
            try run.log(scalars, update: next())
            try run.log(["loss": rate, "a": 1.5] as [String: Double], update: next())
            try run.log((0..<3).map { ("key\($0)", $0) }, update: next())
        }
    }
}

// MARK: Loading

extension Faults {
    /// Loads the file of each line, saves it again, and prints what has come of it.
    fileprivate static func load(_ root: String) async throws {
        let run = try await Run(outputRoot: root, runID: "r")
        var number = 0
        while let path = readLine() {
            number += 1
            do {
                let state = try Checkpoint.load(path, verify: true)
                let ticket = try run.save("again", tag: "\(number)", state)
                try await ticket.waitUntilDurable()
                print(state == (try Checkpoint.load(ticket.paths[0])), ticket.paths[0])
            } catch { print(error) }
            fflush(nil)
        }
        try run.log(["loss": 0.5, "word": "ä"], update: 7)
        try await run.finish()
        let log = try RunLog.read(run.directory)
        print(log.keys, log.lastUpdate ?? -1, log.values("loss").map { ($0.update, $0.value) })
    }
}

extension Error {
    /// What Foundation shows to a person.
    fileprivate var words: String { (self as? any LocalizedError)?.errorDescription ?? "\(self)" }
}
