// SPDX-License-Identifier: Apache-2.0
import Foundation
import Testing

@testable import Wire

/// The daemon's code reads and writes the vectors that the Python client is tested on too.
@Suite struct VectorTests {
    struct Meaning: Decodable {
        struct FrameMeaning: Decodable {
            var type: UInt8
            var request: UInt32
            var fds: UInt16
            var payload: String
        }
        struct Log: Decodable {
            struct Value: Decodable {
                var keyId: UInt32
                var tag: UInt8
                var bits: String
                var tail: String
            }
            var sequence: UInt64
            var update: Int64
            var wallTimeBits: String
            var values: [Value]
        }
        struct Save: Decodable {
            struct Message: Decodable {
                var storagesLength: UInt64
                var buffer: UInt64
                var logUpdate: Int64?
                var targets: [SavePayload.Target]?
                var files: [SavePayload.File]?
            }
            var sequence: UInt64
            var storageLengths: [UInt64]
            var message: Message
        }
        struct Values: Decodable {
            struct Value: Decodable {
                var update: Int64
                var tag: UInt8
                var bits: String
                var tail: String
            }
            var total: Int
            var values: [Value]
        }
        struct Entries: Decodable {
            var total: Int
        }
        struct Rows: Decodable {
            struct Row: Decodable {
                var update: Int64
                var wallTime: Double
            }
            var total: Int
            var rows: [Row]
        }
        struct Acknowledgement: Decodable {
            var sequence: UInt64
            var update: Int64
            var durable: Int64?
        }
        struct Message: Decodable {
            var name: String
        }
        struct Refused: Decodable {
            var code: String
            var fatal: Bool
            var sequence: UInt64?
        }
        var refused: Refused?
        var refusedBy: String?
        var save: Save?
        var valuesPage: Values?
        var entriesPage: Entries?
        var rows: Rows?
        var logAcks: [Acknowledgement]?
        var text: String?
        var messages: [Message]?
        var frames: [FrameMeaning]
        var error: String?
        var log: Log?
        var keys: [String]?
    }

    static let folder = URL(filePath: #filePath).deletingLastPathComponent().appending(path: "../Vectors")
    static let names =
        ((try? FileManager.default.contentsOfDirectory(atPath: folder.path)) ?? [])
        .filter { $0.hasSuffix(".bin") }.map { String($0.dropLast(4)) }.sorted()

    private func load(_ name: String) throws -> ([UInt8], Meaning) {
        let bytes = try Data(contentsOf: Self.folder.appending(path: "\(name).bin"))
        let json = try Data(contentsOf: Self.folder.appending(path: "\(name).json"))
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        return (Array(bytes), try decoder.decode(Meaning.self, from: json))
    }

    private func hex(_ bytes: some Sequence<UInt8>) -> String {
        bytes.map { String(format: "%02x", $0) }.joined()
    }

    @Test(arguments: names, [1, 1 << 20])
    func vectorDecodes(name: String, pieceLength: Int) throws {
        let (bytes, meaning) = try load(name)
        var decoder = FrameDecoder()
        var found: [Frame] = []
        var code: String?
        for start in stride(from: 0, to: bytes.count, by: pieceLength) where code == nil {
            decoder.feed(Array(bytes[start..<min(start + pieceLength, bytes.count)]))
            do throws(WireError) { while let frame = try decoder.next() { found.append(frame) } } catch {
                code = error.code.rawValue
            }
        }
        #expect(code == meaning.error)
        #expect(found.map(\.header.type) == meaning.frames.map(\.type))
        #expect(found.map(\.header.request) == meaning.frames.map(\.request))
        #expect(found.map { hex($0.payload) } == meaning.frames.map(\.payload))
        if code == nil { #expect(found.flatMap { $0.encoded() } == bytes) }
    }

    /// Those that are wrong whatever came before them; the daemon itself is shown all of them, elsewhere.
    @Test(arguments: names.filter { $0.hasPrefix("refused_") })
    func payloadsThatMustBeRefused(name: String) throws {
        let (bytes, meaning) = try load(name)
        let refused = try #require(meaning.refused)
        let frame = try onlyFrame(bytes)
        var found: WireError?
        do throws(WireError) {
            switch FrameType(rawValue: frame.header.type) {
            case .log: _ = try LogPayload(decoding: frame.payload)
            case .save: _ = try SavePayload(decoding: frame.payload)
            case .defineKeys: _ = try KeyDefinitions(decoding: frame.payload)
            case .finish: _ = try JSONPayload.decode(Finish.self, from: frame.payload)
            case .wait: _ = try JSONPayload.decode(WaitRequest.self, from: frame.payload)
            case .openRun: _ = try JSONPayload.decode(OpenRun.self, from: frame.payload)
            default: Issue.record("a vector of another type: \(frame.header.type)")
            }
        } catch { found = error }
        #expect(found?.code.rawValue == (meaning.refusedBy == "payload" ? refused.code : nil))
        guard [.log, .save].contains(FrameType(rawValue: frame.header.type)) else { return }
        #expect(try SavePayload.identity(of: frame.payload).sequence == refused.sequence)
    }

    @Test func logVectorMeansWhatItsFileSays() throws {
        let (bytes, meaning) = try load("log")
        let log = try #require(meaning.log)
        let payload = Array(bytes[FrameHeader.byteCount...])
        let decoded = try LogPayload(decoding: payload)
        #expect(decoded.sequence == log.sequence)
        #expect(decoded.update == log.update)
        #expect(decoded.wallTime.bitPattern == UInt64(log.wallTimeBits, radix: 16))
        #expect(decoded.keyIDs == log.values.map(\.keyId))
        #expect(decoded.values.map(\.tag.rawValue) == log.values.map(\.tag))
        #expect(decoded.values.map(\.bits) == log.values.map { UInt64($0.bits, radix: 16) })
        #expect(decoded.values.map { hex($0.tail) } == log.values.map(\.tail))
        var writer = ByteWriter()
        decoded.encode(into: &writer)
        #expect(writer.bytes == payload)
    }

    @Test func keysOfTheStreamVector() throws {
        let (bytes, meaning) = try load("stream")
        var decoder = FrameDecoder()
        decoder.feed(bytes)
        _ = try decoder.next()
        let frame = try #require(try decoder.next())
        #expect(try KeyDefinitions(decoding: frame.payload).keys == meaning.keys)
    }

    private func onlyFrame(_ bytes: [UInt8]) throws -> Frame {
        var decoder = FrameDecoder()
        decoder.feed(bytes)
        return try #require(try decoder.next())
    }

    @Test(arguments: ["save", "save_files"])
    func saveVectorMeansWhatItsFileSays(vector: String) throws {
        let (bytes, meaning) = try load(vector)
        let save = try #require(meaning.save)
        let frame = try onlyFrame(bytes)
        #expect(frame.header.fdCount == 1)
        let decoded = try SavePayload(decoding: frame.payload)
        let expected = SavePayload(
            sequence: save.sequence, storageLengths: save.storageLengths,
            storagesLength: save.message.storagesLength, buffer: save.message.buffer,
            logUpdate: save.message.logUpdate,
            targets: save.message.targets ?? [], files: save.message.files ?? [])
        #expect(decoded == expected)
        #expect(try SavePayload(decoding: expected.encoded()) == expected)
        for target in decoded.targets.prefix(1) {
            #expect(target.fileName == "ae.enc_ema=0.9_cp=E1_U200_S800_model.th")
        }
    }

    @Test func valuesPageVector() throws {
        let (bytes, meaning) = try load("values_page")
        let expected = try #require(meaning.valuesPage)
        let page = try ValuesPage(decoding: onlyFrame(bytes).payload)
        #expect(page.total == expected.total)
        #expect(page.updates == expected.values.map(\.update))
        #expect(page.values.map(\.tag.rawValue) == expected.values.map(\.tag))
        #expect(page.values.map(\.bits) == expected.values.map { UInt64($0.bits, radix: 16) })
        #expect(page.values.map { hex($0.tail) } == expected.values.map(\.tail))
        #expect(page.encoded() == Array(bytes[FrameHeader.byteCount...]))
    }

    @Test func entriesPageVector() throws {
        let (bytes, meaning) = try load("entries_page")
        let page = try EntriesPage(decoding: onlyFrame(bytes).payload)
        #expect(page.total == meaning.entriesPage?.total)
        #expect(page.keys == [0: "epoch", 3: "loss/ä"])
        #expect(page.rows.map(\.update) == [10, 11])
        #expect(page.rows[0].values == [ScalarBits(Int64(1)), ScalarBits(0.25)])
        #expect(page.rows[1].values == [ScalarBits("x")])
        #expect(page.encoded() == Array(bytes[FrameHeader.byteCount...]))
    }

    @Test func rowsVector() throws {
        let (bytes, meaning) = try load("rows")
        let expected = try #require(meaning.rows)
        let page = try EntriesPage(decoding: onlyFrame(bytes).payload)
        #expect(page.total == expected.total)
        #expect(page.rows.map(\.update) == expected.rows.map(\.update))
        #expect(page.rows.map(\.wallTime) == expected.rows.map(\.wallTime))
        #expect(page.keys == [1: "loss/ä", 4: "step"])
        #expect(page.rows[0].keyIDs == [4, 1])
        #expect(page.rows[0].values == [ScalarBits(Int64(-1)), ScalarBits(-0.5)])
        #expect(page.rows[1].values == [ScalarBits("ü")])
        #expect(page.encoded() == Array(bytes[FrameHeader.byteCount...]))
    }

    @Test func acknowledgementsVector() throws {
        let (bytes, meaning) = try load("log_ack")
        var decoder = FrameDecoder()
        decoder.feed(bytes)
        for expected in try #require(meaning.logAcks) {
            let frame = try #require(try decoder.next())
            let ack = try LogAck(decoding: frame.payload)
            #expect(
                ack
                    == LogAck(
                        sequence: expected.sequence, update: expected.update, durableUpdate: expected.durable)
            )
            #expect(ack.encoded() == frame.payload)
        }
    }

    @Test func textVector() throws {
        let (bytes, meaning) = try load("metrics_text")
        #expect(String(decoding: try onlyFrame(bytes).payload, as: UTF8.self) == meaning.text)
    }

    /// docs/PROTOCOL.md's list, this side's, and the vectors: none has a type that another lacks.
    @Test func everyFrameTypeOfTheProtocolHasAVector() throws {
        let page = Self.folder.appending(path: "../../docs/PROTOCOL.md")
        let text = try String(contentsOf: page, encoding: .utf8)
        let start = try #require(text.range(of: "\n## 4. Frame types\n")).upperBound
        let end = try #require(text.range(of: "\n### ", range: start..<text.endIndex)).lowerBound
        let listed = text[start..<end].split(separator: "\n").compactMap { line in
            line.hasPrefix("| ") ? UInt8(line.dropFirst(2).prefix { $0 != " " }) : nil
        }
        #expect(listed == FrameType.allCases.map(\.rawValue).sorted())
        let meanings = try Self.names.map { try load($0).1 }.filter { $0.error == nil }
        let found = Set(meanings.flatMap { $0.frames.map(\.type) })
        #expect(Set(listed).subtracting(found) == [])
    }

    /// Every JSON message: decoded, encoded again, and the same object as the vector's, member for member.
    @Test(arguments: ["messages", "leave", "run_opened", "files", "restore"])
    func messagesKeepEveryMember(vector: String) throws {
        let (bytes, meaning) = try load(vector)
        let raw = try Data(contentsOf: Self.folder.appending(path: "\(vector).json"))
        let file = try #require(try JSONSerialization.jsonObject(with: raw) as? [String: Any])
        let objects = try #require(file["messages"] as? [[String: Any]])
        var decoder = FrameDecoder()
        decoder.feed(bytes)
        for (index, message) in try #require(meaning.messages).enumerated() {
            let frame = try #require(try decoder.next())
            let encoded = try again(message.name, frame.payload)
            let found = try JSONSerialization.jsonObject(with: Data(encoded)) as? NSDictionary
            let expected = try #require(objects[index]["json"] as? NSDictionary)
            #expect(found == expected, "\(message.name): \(String(decoding: encoded, as: UTF8.self))")
        }
    }

    private func again(_ name: String, _ payload: [UInt8]) throws -> [UInt8] {
        func round<T: Codable>(_ type: T.Type) throws -> [UInt8] {
            try JSONPayload.encode(JSONPayload.decode(type, from: payload))
        }
        return switch name {
        case "status", "metrics": try round([String: Int].self)
        case "hello": try round(Hello.self)
        case "welcome": try round(Welcome.self)
        case "open_run": try round(OpenRun.self)
        case "run_opened": try round(RunOpened.self)
        case "checkpoint_event": try round(CheckpointEvent.self)
        case "finish": try round(Finish.self)
        case "finished": try round(Finished.self)
        case "values", "entries": try round(PageRequest.self)
        case "subscribe": try round(Subscribe.self)
        case "subscribed": try round(Subscribed.self)
        case "stream_event": try round(StreamEvent.self)
        case "wait": try round(WaitRequest.self)
        case "leave": try round(Leave.self)
        case "remove": try round(Remove.self)
        case "commit": try round(Commit.self)
        case "wait_path": try round(WaitPath.self)
        case "waited": try round(Waited.self)
        case "restore": try round(Restore.self)
        case "restored": try round(Restored.self)
        case "status_report": try round(StatusReport.self)
        case "error": try round(ErrorMessage.self)
        default: throw WireError(.unknownType, name)
        }
    }
}
