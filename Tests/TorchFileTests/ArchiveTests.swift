// SPDX-License-Identifier: Apache-2.0
import Foundation
import Testing

@testable import TorchFile

@Suite struct ArchiveTests {
    /// A whole small file, read in pieces of the given size.
    private func file(pieceByteCount: Int) throws -> [UInt8] {
        let pickle: [UInt8] = [0x80, 2, UInt8(ascii: "N"), UInt8(ascii: ".")]
        let storages: [[UInt8]] = [[UInt8](repeating: 7, count: 1000), [], [1, 2, 3]]
        let layout = try ArchiveLayout(
            archiveName: "net", pickleLength: UInt64(pickle.count),
            storageLengths: storages.map { UInt64($0.count) })
        var stream = ArchiveStream(layout: layout) { part, position, buffer in
            let bytes =
                switch part {
                case .pickle: pickle
                case .storage(let index): storages[index]
                }
            buffer.copyBytes(from: bytes[position..<position + buffer.count])
        }
        var found: [UInt8] = []
        var piece = [UInt8](repeating: 0, count: pieceByteCount)
        while true {
            let count = piece.withUnsafeMutableBytes { stream.read(into: $0) }
            if count == 0 { break }
            found += piece[..<count]
        }
        #expect(UInt64(found.count) == layout.imageLength)
        return found
    }

    private func verify(_ bytes: [UInt8]) throws -> [String] {
        try bytes.withUnsafeBytes { try ArchiveVerifier($0).verify() }
    }

    @Test(arguments: [1, 7, 64, 4096])
    func piecesOfAnySizeGiveTheSameFile(pieceByteCount: Int) throws {
        #expect(try file(pieceByteCount: pieceByteCount) == file(pieceByteCount: 1 << 20))
    }

    @Test func aWholeFileVerifiesAndEveryTruncationIsDamage() throws {
        let whole = try file(pieceByteCount: 4096)
        #expect(try verify(whole).count == 9)
        for length in stride(from: 0, to: whole.count, by: 13) {
            #expect(throws: ArchiveDamage.self) { try verify(Array(whole[..<length])) }
        }
    }

    @Test func noFlippedByteTraps() throws {
        let whole = try file(pieceByteCount: 4096)
        for index in whole.indices {
            var broken = whole
            broken[index] ^= 0xFF
            _ = try? verify(broken)
        }
    }

    @Test func sizesThatOverflowAreAnError() {
        #expect(throws: ArchiveLayoutError.overflow) {
            try ArchiveLayout(archiveName: "a", pickleLength: 1, storageLengths: [.max, .max])
        }
    }

    @Test func zip64BeginsAt4GiBLess1() throws {
        let limit: UInt64 = 0xFFFF_FFFF
        let layout = try ArchiveLayout(
            archiveName: "a", pickleLength: 1, storageLengths: [limit - 1, limit, 1])
        let storages = layout.records[4...6]
        #expect(storages.map(\.localZip64ByteCount) == [0, 28, 12])
        #expect(storages.map(\.descriptorByteCount) == [16, 24, 24])
        #expect(storages.allSatisfy { $0.payloadOffset % 64 == 0 })
    }

    @Test(
        arguments: [
            (0, [0x4B, 0]), (255, [0x4B, 255]), (256, [0x4D, 0, 1]), (-1, [0x4A, 255, 255, 255, 255]),
            (1 << 31, [0x8A, 5, 0, 0, 0, 0x80, 0]), (-(1 << 31) - 1, [0x8A, 5, 255, 255, 255, 0x7F, 255]),
        ] as [(Int64, [UInt8])])
    func integersAreWrittenAsPythonWritesThem(value: Int64, expected: [UInt8]) {
        var pickle = PickleWriter()
        pickle.int(value)
        #expect(pickle.bytes == expected)
    }
}

/// The layouts that the Python client is tested on too (Tests/Vectors/layouts.json).
@Suite struct LayoutVectorTests {
    struct Meaning: Decodable {
        /// In some.
        var path: String?
        var archive: String
        var pickleLength: UInt64
        var storageLengths: [UInt64]
        var pickleOffset: UInt64
        var storageOffsets: [UInt64]
        var imageLength: UInt64
    }

    @Test func layoutsAreThoseOfTheVectors() throws {
        let file = URL(filePath: #filePath).deletingLastPathComponent().appending(
            path: "../Vectors/layouts.json")
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        for meaning in try decoder.decode([Meaning].self, from: Data(contentsOf: file)) {
            if let path = meaning.path { #expect(ArchiveLayout.archiveName(path: path) == meaning.archive) }
            let layout = try ArchiveLayout(
                archiveName: meaning.archive, pickleLength: meaning.pickleLength,
                storageLengths: meaning.storageLengths)
            #expect(layout.pickleOffset == meaning.pickleOffset)
            #expect(meaning.storageLengths.indices.map { layout.storageOffset($0) } == meaning.storageOffsets)
            #expect(layout.imageLength == meaning.imageLength)
        }
    }

    @Test func sizesThatOverflowAreRefused() {
        for lengths in [[UInt64.max], [1 << 62], [UInt64](repeating: 1 << 61, count: 3)] {
            #expect(throws: ArchiveLayoutError.overflow) {
                try ArchiveLayout(archiveName: "a", pickleLength: 1, storageLengths: lengths)
            }
        }
    }
}
