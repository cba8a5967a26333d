// SPDX-License-Identifier: Apache-2.0
/// Does what each line of its input asks, and answers with a line: what came of it, or the kind and the words of the
/// error. Tests/EndToEnd/both_clients.py does the same with the Python library.
import FoundationEssentials
import Glibc
import NoetherWriterClient

actor Driver {
    /// One line. Which members count depends on what is to be done.
    struct Request: Decodable {
        var call: String
        var root: String?
        var id: String?
        var stage: String?
        var debug: Bool?
        var resumeAt: Int64?
        var resume: Bool?
        var keepLast: Int?
        var keepEvery: Int?
        var rank: Int?
        var run: Int?
        var ticket: Int?
        var update: Int64?
        var epoch: Int?
        var sample: Int?
        var values: [Pair]?
        var names: [Name]?
        var state: State?
        var key: String?
        var mode: String?
        var path: String?
        var timeout: Double?
        var recursive: Bool?
        var after: [String]?
    }

    struct Pair: Decodable {
        var key: String
        var value: Scalar

        init(from decoder: any Decoder) throws {
            var members = try decoder.unkeyedContainer()
            key = try members.decode(String.self)
            if try members.decodeNil() {
                value = .none
            } else if let bool = try? members.decode(Bool.self) {
                value = .bool(bool)
            } else if let number = try? members.decode(Int64.self) {
                value = .int(number)
            } else {
                let text = try members.decode(String.self)
                if text.hasPrefix("float:"), let number = Double(text.dropFirst(6)) {
                    value = .float(number)
                } else if text.hasPrefix("bytes:"), let count = Int(text.dropFirst(6)) {
                    // An integer of so many bytes, all of them 1.
                    value = .bigInt(littleEndian: [UInt8](repeating: 1, count: count))
                } else {
                    value = .string(text)
                }
            }
        }
    }

    struct Name: Decodable {
        var name: String
        var tag: String
        var kind: String?
        var info: String?

        var target: Run.Target {
            Run.Target(name, tag: tag, kind: kind.flatMap { Run.Kind(rawValue: $0) } ?? .model, info: info)
        }
    }

    /// A state dict of one tensor: `number`, in so many elements.
    struct State: Decodable {
        var number: Double
        var count: Int?
        var update: Int64?

        var value: StateValue {
            let weight = Tensor([Float](repeating: Float(number), count: count ?? 4), shape: [count ?? 4])
            let iteration: StateValue = update.map { ["epoch": 0, "update": .int($0), "sample": 0] } ?? nil
            return ["state_dict": .stateDict(["weight": weight]), "training_iteration": iteration]
        }
    }

    private var runs: [Run] = []
    private var tickets: [Ticket] = []
    private var subscription: Subscription?

    static func serve() async {
        let driver = Driver()
        while let line = readLine() {
            let request: Request
            do { request = try JSONDecoder().decode(Request.self, from: Data(line.utf8)) } catch {
                print("no request: \(error)")
                break
            }
            print(await driver.answer(request))
            fflush(nil)
        }
    }

    private struct Answer: Encodable {
        var value: String?
        var code: String?
        var words: String?
    }

    private func answer(_ request: Request) async -> String {
        var answer = Answer()
        do { answer.value = try await perform(request) } catch let error as NoetherWriterError {
            answer.code = "\(error.code)"
            answer.words = "\(error)"
        } catch { answer.code = "\(type(of: error))" }
        return (try? JSONEncoder().encode(answer)).map { String(decoding: $0, as: UTF8.self) } ?? "no answer"
    }

    private func perform(_ request: Request) async throws -> String? {
        let timeout = request.timeout.map { Duration.seconds($0) }
        let run = runs.isEmpty ? nil : runs[request.run ?? runs.count - 1]
        switch request.call {
        case "open":
            runs.append(
                try await Run(
                    outputRoot: request.root!, runID: request.id ?? "r", stageName: request.stage,
                    debug: request.debug ?? false, resumeAt: request.resumeAt,
                    resume: request.resume == true ? .auto : nil, keepLast: request.keepLast,
                    keepEvery: request.keepEvery, rank: request.rank))
            return "\(runs.last!.directory) \(number(runs.last!.resumedAt))"
        case "log":
            try run!.log(
                request.values!.map { ($0.key, $0.value) }, update: request.update,
                epoch: request.epoch.map { .int(Int64($0)) }, sample: request.sample.map { .int(Int64($0)) })
            return number(run!.lastUpdate)
        case "save":
            let ticket = try run!.save(request.state!.value, as: request.names!.map(\.target))
            tickets.append(ticket)
        case "wait": try await tickets[request.ticket ?? tickets.count - 1].waitUntilDurable(timeout: timeout)
        case "ticket":
            let ticket = tickets[request.ticket ?? tickets.count - 1]
            let failure = ticket.failure.map { "\($0.code)" } ?? "none"
            return "\(ticket.isDone) \(ticket.isDurable) \(failure) \(ticket.paths)"
        case "wait_run": try await run!.waitUntilDurable(timeout: timeout)
        case "values":
            return try await run!.values(request.key!).map { "\($0.update)=\(text($0.value))" }.joined(separator: " ")
        case "finish": try await run!.finish(timeout: timeout)
        case "flush": try await run!.flush(timeout: timeout)
        case "close": run!.close()
        case "log_update": return number(try Run.logUpdate(ofCheckpoint: request.path!))
        case "checkpoints": return try Checkpoint.all(in: request.path!).map(words).joined(separator: ", ")
        case "latest": return try Checkpoint.latest(in: request.path!).map(words)
        case "best":
            let mode = Checkpoint.Best(rawValue: request.mode ?? "min")!
            let values = try RunLog.read(request.path!).values(request.key!).compactMap { update, value in
                if case .float(let number) = value { (update, number) } else { nil }
            }
            return try Checkpoint.best(in: request.path!, by: values, mode).map(words)
        case "load":
            let state = try Checkpoint.load(request.path!)
            let weight = try state["state_dict"]?["weight"]?.tensorValue?.elements(as: Float.self)
            return "\(weight?.count ?? 0) \(weight?.first ?? 0)"
        case "save_file": tickets.append(try await Files.save(request.state!.value, to: request.path!))
        case "remove_file":
            tickets.append(
                try await Files.remove(
                    request.path!, recursive: request.recursive ?? false, after: request.after ?? []))
        case "wait_files": try await Files.wait(timeout: timeout)
        case "load_file":
            let state = try await Files.load(request.path!)
            let weight = try state["state_dict"]?["weight"]?.tensorValue?.elements(as: Float.self)
            return "\(weight?.count ?? 0) \(weight?.first ?? 0)"
        case "subscribe": subscription = try await Subscription(run: request.id!)
        case "events":
            var words: [String] = []
            for try await event in subscription! {
                switch event {
                case .row(let row):
                    let values = row.values.map { "\($0.key)=\(text($0.value))" }
                    words.append("\(row.update) \(values.joined(separator: " "))")
                case .ended(let outcome): words.append("\(outcome)")
                default: break
                }
            }
            return words.joined(separator: ", ")
        default: preconditionFailure("no such call: \(request.call)")
        }
        return nil
    }

    private func number(_ number: Int64?) -> String { number.map(String.init) ?? "none" }

    private func words(_ found: SavedCheckpoint) -> String {
        "\(found.path) \(found.name) \(found.kind) \(found.info ?? "none") \(found.tag) \(number(found.update)) "
            + "\(number(found.epoch)) \(number(found.sample)) \(found.byteCount)"
    }

    private func text(_ value: Scalar) -> String {
        switch value {
        case .float(let number): "\(number)"
        case .int(let number): "\(number)"
        case .bool(let truth): "\(truth)"
        case .none: "none"
        case .string(let text): text
        case .bigInt(let bytes): "\(bytes.count) bytes"
        }
    }
}
