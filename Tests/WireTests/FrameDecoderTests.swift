// SPDX-License-Identifier: Apache-2.0
import Testing

@testable import Wire

@Suite struct FrameDecoderTests {
    static let frames = [
        Frame(.hello, request: 1, payload: Array(#"{"versions":[1],"client":"t"}"#.utf8)),
        Frame(.close, request: 0xFFFF_FFFF),
        Frame(.save, request: 9, payload: [UInt8](repeating: 7, count: 70_000), fdCount: 1),
        Frame(.log, request: 2, payload: [1, 2, 3]),
    ]

    private func decode(_ bytes: [UInt8], pieceLength: Int) throws -> [Frame] {
        var decoder = FrameDecoder()
        var found: [Frame] = []
        var position = 0
        while position < bytes.count {
            let end = min(position + pieceLength, bytes.count)
            decoder.feed(Array(bytes[position..<end]))
            while let frame = try decoder.next() { found.append(frame) }
            position = end
        }
        #expect(decoder.pendingByteCount == 0)
        #expect(decoder.frameStart == UInt64(bytes.count))
        return found
    }

    @Test(arguments: [1, 2, 15, 16, 17, 4096, 1 << 20])
    func anyCutOfTheStreamGivesTheSameFrames(pieceLength: Int) throws {
        let stream = Self.frames.flatMap { $0.encoded() }
        #expect(try decode(stream, pieceLength: pieceLength) == Self.frames)
    }

    @Test(arguments: [
        (0, UInt8(0), WireError.Code.badFrame), (2, 2, .unsupportedVersion), (11, 1, .tooLarge),
        (14, 1, .badFrame),
        (12, 2, .badFrame), (12, 1, .badFrame),
    ])
    func aHeaderThatBreaksARuleIsRefusedBeforeItsPayload(offset: Int, value: UInt8, code: WireError.Code) {
        var bytes = Frame(.status, request: 1).encoded()
        bytes[offset] = value
        var decoder = FrameDecoder()
        decoder.feed(bytes)
        let error = #expect(throws: WireError.self) { try decoder.next() }
        #expect(error?.code == code)
        decoder.feed(Frame(.status).encoded())
        #expect(throws: WireError.self) { try decoder.next() }
    }
}

@Suite struct PayloadTests {
    static let log = LogPayload(
        sequence: 3, update: -7, wallTime: 1.5, keyIDs: [0, 1, 2, 3, 4, 9],
        values: [
            ScalarBits(tag: .float, bits: 0x7FF8_0000_0000_1234), ScalarBits(-0.0), ScalarBits(Int64.min),
            ScalarBits(true), ScalarBits("λ"),
            ScalarBits(tag: .bigInt, bits: 9, tail: [0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ])

    @Test func logRoundTripsBitExact() throws {
        var writer = ByteWriter()
        Self.log.encode(into: &writer)
        #expect(try LogPayload(decoding: writer.bytes) == Self.log)
    }

    @Test func everyTruncationOfALogIsAnErrorAndNotATrap() {
        var writer = ByteWriter()
        Self.log.encode(into: &writer)
        for length in 0..<writer.bytes.count {
            #expect(throws: WireError.self) { try LogPayload(decoding: Array(writer.bytes[..<length])) }
        }
        #expect(throws: WireError.self) { try LogPayload(decoding: writer.bytes + [0]) }
    }

    @Test func saveRoundTripsAndNamesItsFilesAsNoetherDoes() throws {
        let targets = [
            SavePayload.Target(
                kind: .model, name: "ae.encoder", tag: "latest", info: "ema=0.9", pickleOffset: 64,
                pickleLength: 5),
            SavePayload.Target(
                kind: .optim, name: "ae.encoder", tag: "E1_U2_S3", info: "ema=0.9", pickleOffset: 0,
                pickleLength: 0),
        ]
        let save = SavePayload(
            sequence: 1, storageLengths: [0, 1, .max], storagesLength: 10, buffer: 4, logUpdate: nil,
            targets: targets)
        #expect(try SavePayload(decoding: save.encoded()) == save)
        #expect(
            targets.map(\.fileName) == [
                "ae.encoder_ema=0.9_cp=latest_model.th", "ae.encoder_cp=E1_U2_S3_optim.th",
            ])
    }

    @Test func aPageOfMoreThanThereCanBeIsRefused() {
        var writer = ByteWriter()
        writer.u64(1 << 63)
        writer.u64(0)
        #expect(throws: WireError.self) { try EntriesPage(decoding: writer.bytes) }
        #expect(throws: WireError.self) { try ValuesPage(decoding: writer.bytes) }
    }

    @Test func wordsOfAnErrorAreCut() {
        let error = WireError(.badFrame, String(repeating: "ä", count: 5000))
        #expect(error.message.utf8.count <= Limits.messageBytes + 8)
    }

    @Test(arguments: [[0], [0xC3], []] as [[UInt8]])
    func keysAreCheckedOnceWhenTheyAreDefined(bytes: [UInt8]) {
        var writer = ByteWriter()
        writer.u32(0)
        writer.u32(1)
        writer.u16(UInt16(bytes.count))
        writer.bytes(bytes)
        let error = #expect(throws: WireError.self) { try KeyDefinitions(decoding: writer.bytes) }
        #expect(error?.code == .badKey)
    }
}
