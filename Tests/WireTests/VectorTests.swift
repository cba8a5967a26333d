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
        var frames: [FrameMeaning]
        var error: String?
        var log: Log?
        var keys: [String]?
    }

    static let folder = URL(filePath: #filePath).deletingLastPathComponent().appending(path: "../Vectors")
    static let names = [
        "log", "stream", "unknown_type", "bad_magic", "unknown_version", "oversized", "reserved", "fd_on_log",
    ]

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
}
