// SPDX-License-Identifier: Apache-2.0
import Testing
import Wire

@testable import Writer

@Suite struct EntriesPickleTests {
    /// The longest entries there are, a batch full of them: the room for a batch is reckoned beforehand.
    @Test(arguments: [ScalarBits(Int64.min), ScalarBits(Int64.max), ScalarBits(-0.0), ScalarBits(true)])
    func theLongestEntriesFitTheirRoom(value: ScalarBits) throws {
        var log = LogColumns()
        let column = try log.column(for: "k")
        let first = Int64.max - 10_000
        for row in 0..<Int64(10_000) {
            try log.append(update: first + row, columnIDs: [column], values: [value])
        }
        var pickle = EntriesPickle(log)
        var bytes = [UInt8](repeating: 0, count: pickle.byteCount)
        bytes.withUnsafeMutableBytes { pickle.read(into: $0) }
        #expect(bytes.suffix(3) == [UInt8(ascii: "u"), UInt8(ascii: "u"), UInt8(ascii: ".")])
    }

    private func pickle(_ log: LogColumns) -> [UInt8] {
        var pickle = EntriesPickle(log)
        var bytes = [UInt8](repeating: 0, count: pickle.byteCount)
        bytes.withUnsafeMutableBytes { pickle.read(into: $0) }
        return bytes
    }

    private func read(_ log: LogColumns) -> LogColumns? {
        pickle(log).withUnsafeBytes { EntriesColumns.read($0) }
    }

    @Test func whatIsReadAgainIsTheSame() throws {
        var log = LogColumns()
        let keys = ["dense", "late", "every third", "text", "odd"]
        let ids = try log.columns(for: keys)
        var odd = [
            ScalarBits(tag: .float, bits: 0x7FF8_0000_0000_0001), ScalarBits(-0.0), ScalarBits(Int64.min),
            ScalarBits(false), ScalarBits(tag: .none, bits: 0),
            ScalarBits(tag: .bigInt, bits: 9, tail: [0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ]
        for row in 0..<6000 {
            var values = [(ids[0], ScalarBits(Double(row)))]
            if row >= 5000 { values.append((ids[1], ScalarBits(Int64(row)))) }
            if row % 3 == 1 { values.append((ids[2], ScalarBits(true))) }
            if row % 1000 == 7 { values.append((ids[3], ScalarBits("r\(row) ä"))) }
            if row % 500 == 9, let next = odd.popLast() { values.append((ids[4], next)) }
            try log.append(update: Int64(row) * 7 - 900, columnIDs: values.map(\.0), values: values.map(\.1))
        }
        let again = try #require(read(log))
        #expect(again.keys == keys && again.byteCount == log.byteCount)
        #expect(
            Array(again.payloads(rows: 0..<6000, sequence: 0))
                == Array(log.payloads(rows: 0..<6000, sequence: 0)))
        #expect(again.holds(log) && log.holds(again))
        // It goes on as any other.
        var longer = again
        try longer.addToLastRow(columnIDs: [ids[3]], values: [ScalarBits("more")])
        try longer.append(update: 100_000, columnIDs: [ids[0]], values: [ScalarBits(1.0)])
        #expect(longer.holds(again) && !again.holds(longer))
        var other = longer
        other.cut(after: 41_000)
        #expect(again.holds(other) && !other.holds(again))
        try other.append(update: 41_100, columnIDs: [ids[0]], values: [ScalarBits(0.25)])
        #expect(!again.holds(other) && !longer.holds(other))
    }

    @Test func whatNoTrainerCouldHaveSentIsNoLog() throws {
        var log = LogColumns()
        let long = try log.column(for: String(repeating: "k", count: Limits.keyBytes + 1))
        try log.append(update: 1, columnIDs: [long], values: [ScalarBits(1.0)])
        #expect(read(log) == nil)
        let empty = try #require(read(LogColumns()))
        #expect(empty.count == 0 && empty.lastUpdate == nil)
        let bytes = pickle(log)
        for length in 0..<bytes.count {
            #expect(bytes[..<length].withUnsafeBytes { EntriesColumns.read($0) } == nil)
        }
    }
}
