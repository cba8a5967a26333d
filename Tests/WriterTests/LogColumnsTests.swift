import Testing
import Wire

@testable import Writer

@Suite struct LogColumnsTests {
    @Test func denseStridedAndOddRowsAreFoundAgain() throws {
        var log = LogColumns()
        let columns = try ["dense", "strided", "odd"].map { try log.column(for: $0) }
        let odd: Set = [3, 4, 10, 5000, 9001]
        for row in 0..<10_000 {
            var ids = [columns[0]]
            if row % 50 == 7 { ids.append(columns[1]) }
            if odd.contains(row) { ids.append(columns[2]) }
            try log.append(
                update: Int64(row * 2), columnIDs: ids, values: ids.map { _ in ScalarBits(Double(row)) })
        }
        #expect(
            log.values(key: "strided", from: 0, limit: .max / 2).map(\.update)
                == stride(from: 14, to: 20_000, by: 100).map(Int64.init))
        #expect(
            log.values(key: "odd", from: 0, limit: 99).map(\.update) == odd.sorted().map { Int64($0 * 2) })
        #expect(log.row(57).keyIDs == [0, 1])
        #expect(log.row(5000).keyIDs == [0, 2])
        #expect(log.row(9999).values == [ScalarBits(9999.0)])
        let error = #expect(throws: WireError.self) { try log.append(update: 3, columnIDs: [], values: []) }
        #expect(error?.code == .updateOrder)
    }
}
