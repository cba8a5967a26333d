// SPDX-License-Identifier: Apache-2.0
/// A trainer in Swift, as a user would write one. Tests/EndToEnd/test_swift_client.py runs it and loads its files in
/// torch.
import FoundationEssentials
import Glibc
import NoetherWriterClient

@main
enum SwiftTrainer {
    static func main() async throws {
        switch CommandLine.arguments[1] {
        case "follow": return try await follow(CommandLine.arguments[2])
        case "drive": return await Driver.serve()
        case "fault": return try await Faults.run(CommandLine.arguments[2], CommandLine.arguments[3])
        case "mistakes": return makeMistakes(CommandLine.arguments[2])
        case "resume": return resume(CommandLine.arguments[2], at: CommandLine.arguments[3])
        case "look": return try await look()
        default: break
        }
        if CommandLine.arguments.count > 2 { return try trainLong(updates: Int64(CommandLine.arguments[2])!) }
        let run = try await Run(
            outputRoot: CommandLine.arguments[1], runID: "swift", stageName: "train", configYAML: "lr: 0.1\n")
        var weight: [Float] = [0, 1, 2, 3, 4, 5]
        for update in Int64(1)...100 {
            weight[0] = Float(update)
            try run.log(
                [
                    "loss": .float(1 / Double(update)), "nan": .float(.nan), "step": .int(update), "ok": true,
                    "no": nil, "word": "ä",
                ],
                update: update, epoch: .int(update / 10), sample: .int(update * 4))
        }
        let shared = TensorStorage([Float](repeating: 0, count: 12).indices.map { Float($0) })
        let everyType = DType.allCases.map { dtype -> (key: StateValue, value: StateValue) in
            // 0 and 1 are values of every type.
            let bytes = (0..<dtype.byteCount * 4).map { UInt8($0 % 2) }
            return (.string(dtype.rawValue), .tensor(Tensor(bytes, dtype: dtype, shape: [2, 2])))
        }
        let checkpoint: StateValue = [
            "state_dict": .stateDict([
                "weight": Tensor(weight, shape: [2, 3]),
                "view": Tensor(shared, dtype: .float32, shape: [4, 3], strides: [1, 4]),
                "tail": Tensor(shared, dtype: .float32, shape: [2], offset: 10),
                "scalar": Tensor([2.5] as [Double], shape: []),
                "empty": Tensor([Int64](), shape: [0, 3]),
                "parameter": Tensor(
                    TensorStorage([Float(1), 2]), dtype: .float32, shape: [2], requiresGrad: true,
                    isParameter: true),
            ]),
            "types": .dict(everyType),
            "training_iteration": ["epoch": 10, "update": 100, "sample": 400],
            "values": [
                nil, true, -1, 70_000, 5_000_000_000, 0.5, "ü", .bytes([0, 200, 65]),
                .tuple([1, .tuple([])]),
            ],
        ]
        let both = try run.save(
            checkpoint, as: [Run.Target("net", tag: "E10_U100_S400"), Run.Target("net", tag: "latest")])
        try await both.waitUntilDurable()
        let big = try run.save(
            "big", tag: "x", .tensor(Tensor([Float](repeating: 7, count: 10_000_000), shape: [10_000_000])))
        try await big.waitUntilDurable(timeout: .seconds(60))
        // 10 million floats, and what lies around them.
        precondition(big.bytesTotal > 40_000_000 && big.bytesDone == big.bytesTotal)
        // The same buffer again.
        try await run.save("net", tag: "state", ["lr": 0.1], kind: .optim).waitUntilDurable()
        let losses = try await run.values("loss")
        precondition(losses.count == 100 && losses[99].update == 100 && losses[99].value == .float(0.01))
        expect(.refusedName) { _ = try run.save("../up", tag: "t", ["a": 1]) }
        expect(.updateOrder) { try run.log(["loss": 1], update: 99) }
        let entries = try await run.finish()
        for path in both.paths + big.paths + [entries?.path() ?? "none"] { print(path) }
    }
    /// For the test that kills daemons under it.
    private static func trainLong(updates: Int64) throws {
        let run = try Run.openBlocking(outputRoot: CommandLine.arguments[1], runID: "long")
        let weights = TensorStorage([Float](repeating: 0, count: 500_000))
        var tickets: [Ticket] = []
        for update in 1...updates {
            try run.log(["loss": .float(1 / Double(update))], update: update)
            if update.isMultiple(of: 100) {
                let state = StateValue.stateDict(["w": Tensor(weights, dtype: .float32, shape: [500_000])])
                tickets.append(
                    try run.save(
                        ["state_dict": state, "update": .int(update)],
                        as: [Run.Target("net", tag: "U\(update)"), Run.Target("net", tag: "latest")]))
                print(update)
                fflush(nil)
                usleep(20_000)
            }
        }
        for ticket in tickets { try ticket.waitBlocking(timeout: .seconds(60)) }
        try run.finishBlocking(timeout: .seconds(60))
    }

    /// Goes on with the run `r` at an update, or at that of a checkpoint, and prints how.
    private static func resume(_ root: String, at place: String) {
        say {
            guard let update = try Int64(place) ?? Run.logUpdate(ofCheckpoint: place) else { return }
            let run = try Run.openBlocking(outputRoot: root, runID: "r", resumeAt: update)
            print("rank \(run.rank), last update \(run.lastUpdate.map(String.init) ?? "none")")
            let ticket = try run.save("net", tag: "resumed", ["a": 1])
            try run.log(["loss": -1], update: update + 1)
            say { try run.log(["loss": 0], update: update) }
            print("\(try run.valuesBlocking("loss").count) values")
            try ticket.waitBlocking(timeout: .seconds(60))
            try run.finishBlocking(timeout: .seconds(60))
        }
    }

    /// Prints what the daemon says of itself, when it is asked and by itself.
    private static func look() async throws {
        var reports = [try await DaemonConnection.open().status()]
        for try await event in try await Subscription(reportsEach: .milliseconds(100)) {
            if case .report(let report) = event { reports.append(report) }
            if reports.count == 3 { break }
        }
        for report in reports {
            print(
                "\(report.version) \(report.pid) \(report.isDraining) \(report.runs.count) \(report.runsLeftOut)"
            )
            for run in report.runs {
                print(
                    "\(run.runID) \(run.state) \(run.rowCount) \(run.lastUpdate ?? -1) \(run.checkpoints.durable) \(run.directory)"
                )
            }
        }
    }

    /// Prints what each mistake is told, and what goes well between them.
    private static func makeMistakes(_ root: String) {
        say {
            let run = try Run.openBlocking(outputRoot: root, runID: "mistakes")
            // More new keys than one frame defines.
            try run.log((0..<300).map { ("key\($0)", .int($0)) }, update: 1)
            say { try run.log(["": 1], update: 2) }
            say { try run.log([(String(repeating: "k", count: 2000), 1)], update: 2) }
            say { try run.log([("a", 1), ("a", 2)], update: 2) }
            say { try run.log(["a": 1], update: 0) }
            say { try run.log(["a": .string(String(repeating: "s", count: 2 << 20))], update: 2) }
            try run.log(["after": 1], update: 2)
            try run.finishBlocking()
            run.close()
            say { try run.log(["a": 1], update: 3) }
            say { _ = try run.save("net", tag: "t", ["a": 1]) }
        }
    }

    private static func say(_ body: () throws -> Void) {
        do { try body() } catch { print(error) }
    }

    /// Prints what it hears of a run.
    private static func follow(_ runID: String) async throws {
        for try await event in try await Subscription(run: runID) {
            switch event {
            case .row(let row):
                let values = row.values.map { key, value in
                    if case .float(let number) = value { "\(key)=\(number)" } else { key }
                }
                print("row \(row.index) \(row.update) \(values.joined(separator: " "))")
            case .checkpoint(let info): print("checkpoint \(info.file) \(info.state)")
            case .ended(let outcome): print("ended \(outcome)")
            default: print(event)
            }
            fflush(nil)
        }
    }

    private static func expect(_ code: NoetherWriterError.Code, _ body: () throws -> Void) {
        do {
            try body()
            preconditionFailure("\(code) was expected")
        } catch {
            let found = (error as? NoetherWriterError)?.code
            precondition(found == code, "\(code) was expected, not \(error)")
        }
    }
}
