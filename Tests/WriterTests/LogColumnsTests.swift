// SPDX-License-Identifier: Apache-2.0
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
        for range in [0..<10_000, 0..<0, 57..<58, 4000..<9002] {
            let rows = Array(log.payloads(rows: range, sequence: 3))
            #expect(rows == range.map { log.payload(row: $0, sequence: 3) })
        }
        let error = #expect(throws: WireError.self) { try log.append(update: 3, columnIDs: [], values: []) }
        #expect(error?.code == .updateOrder)
    }

    /// Whatever comes to the last row, in any order and of any type: as if it had come at once.
    @Test func whatIsAddedToTheLastRowIsAsIfItHadComeAtOnce() throws {
        let names = ["a", "b", "c", "d"]
        var (added, atOnce) = (LogColumns(), LogColumns())
        let ids = try added.columns(for: names)
        #expect(try atOnce.columns(for: names) == ids)
        var random = SystemRandomNumberGenerator()
        func value() -> ScalarBits {
            switch Int.random(in: 0..<5, using: &random) {
            case 0: ScalarBits(Double.random(in: 0..<1, using: &random))
            case 1: ScalarBits(Int64.random(in: -9...9, using: &random))
            case 2: ScalarBits(String(repeating: "x", count: Int.random(in: 0..<9, using: &random)))
            case 3: ScalarBits(tag: .none, bits: 0)
            default: ScalarBits(true)
            }
        }
        for update in Int64(1)...5000 {
            var row: [Int: ScalarBits] = [:]
            for piece in 0..<Int.random(in: 1...4, using: &random) {
                let some = ids.filter { _ in Bool.random(using: &random) }.shuffled(using: &random)
                let values = some.map { _ in value() }
                for (id, value) in zip(some, values) { row[id] = value }
                if piece == 0 {
                    try added.append(update: update, columnIDs: some, values: values, wallTime: 1.5)
                } else {
                    try added.addToLastRow(columnIDs: some, values: values)
                }
            }
            let all = row.keys.sorted()
            try atOnce.append(update: update, columnIDs: all, values: all.map { row[$0]! }, wallTime: 1.5)
        }
        #expect(
            Array(added.payloads(rows: 0..<5000, sequence: 0))
                == Array(atOnce.payloads(rows: 0..<5000, sequence: 0)))
        for name in names {
            #expect(
                added.values(key: name, from: 0, limit: 9999).map(\.value)
                    == atOnce.values(key: name, from: 0, limit: 9999).map(\.value))
        }
        #expect(
            added.rows(from: 0, holding: 5000, atMost: 5000)
                == atOnce.rows(from: 0, holding: 5000, atMost: 5000))
        #expect(added.byteCount == atOnce.byteCount)
        added.cut(after: 2500)
        atOnce.cut(after: 2500)
        #expect(added.byteCount == atOnce.byteCount)
    }

    @Test func aRowThatGrowsStillFitsIntoAPage() throws {
        var log = LogColumns()
        let ids = try log.columns(for: ["a", "b"])
        let half = ScalarBits(String(repeating: "x", count: Limits.payloadBytes / 2))
        try log.append(update: 1, columnIDs: [ids[0]], values: [half])
        let error = #expect(throws: WireError.self) {
            try log.addToLastRow(columnIDs: [ids[1]], values: [half])
        }
        #expect(error?.code == .tooMany && log.row(0).keyIDs == [0])
        // The same key again takes the place of what was there.
        try log.addToLastRow(columnIDs: [ids[0]], values: [half])
        try log.addToLastRow(columnIDs: [ids[0]], values: [ScalarBits(1.0)])
        try log.addToLastRow(columnIDs: [ids[1]], values: [half])
        var page = EntriesPage(total: 1)
        #expect(page.append(log.payload(row: 0, sequence: 0)) { log.keys[Int($0)] })
        let many = try log.columns(for: (0..<Limits.valuesPerLog).map { "k\($0)" })
        let tooMany = #expect(throws: WireError.self) {
            try log.addToLastRow(columnIDs: Array(many), values: many.map { _ in ScalarBits(1.0) })
        }
        #expect(tooMany?.code == .tooMany && log.row(0).keyIDs == [0, 1])
    }

    @Test func keysAreTakenAllOrNot() throws {
        var log = LogColumns()
        let names = (0..<Limits.keysPerRun).map { "k\($0)" }
        let ids = try log.columns(for: Array(names.dropLast()))
        let error = #expect(throws: WireError.self) { try log.columns(for: ["a", "b"]) }
        #expect(error?.code == .badKey)
        #expect(log.keys.count == Limits.keysPerRun - 1)
        // The last free one, and those that are there already.
        #expect(try log.columns(for: ["a", "k0", "a"]) == [ids.count, 0, ids.count])
    }

    @Test func whatALogTakesIsAboutWhatIsSaid() throws {
        var log = LogColumns()
        let columns = try log.columns(for: ["a", "b"])
        for update in Int64(1)...10_000 {
            try log.append(update: update, columnIDs: columns, values: [ScalarBits(0.5), ScalarBits("text")])
        }
        // 12 a row, 8 a number, and 8 + 48 + 4 a string.
        #expect((10_000 * 80..<10_000 * 90).contains(log.byteCount))
        let whole = log.byteCount
        log.cut(after: 5000)
        #expect((whole / 2 - 1000..<whole / 2 + 1000).contains(log.byteCount))
    }

    /// Wall times stay with their rows, over cuts, in blocks of rows, and where the clock is set back or a year passes.
    @Test func wallTimesAreKept() throws {
        func time(_ row: Int) -> Double {
            1.7e9 + 1.5 * Double(row) + (row < 3000 ? 0 : -1e6) + (row < 3500 ? 0 : 3e7)
        }
        var log = LogColumns()
        let column = try log.column(for: "loss")
        for row in 0..<5000 {
            try log.append(
                update: Int64(row), columnIDs: [column], values: [ScalarBits(tag: .int, bits: 0)],
                wallTime: time(row))
        }
        log.cut(after: 4500)
        let rows = Array(log.payloads(rows: 100..<log.count, sequence: 0))
        #expect(rows.map(\.wallTime) == (100...4500).map(time))
        for no in [Double.nan, .infinity, -.infinity] {
            let update = log.update(row: log.count - 1) + 1
            try log.append(
                update: update, columnIDs: [column], values: [ScalarBits(tag: .int, bits: 0)], wallTime: no)
            #expect(log.wallTime(row: log.count - 1) == 0)
        }
    }
}
