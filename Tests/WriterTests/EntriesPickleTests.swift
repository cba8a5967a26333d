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
}
