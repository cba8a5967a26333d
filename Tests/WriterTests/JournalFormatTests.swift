// SPDX-License-Identifier: Apache-2.0
import Testing
import Wire

@testable import Writer

@Suite struct JournalFormatTests {
    private static let origin = JournalFormat.Origin(
        run: RunIdentity(
            OpenRun(
                outputRoot: "/data", runID: "r", stageName: nil, debug: false,
                session: String(repeating: "a", count: 32),
                log: true, node: "host")), pid: 1, pidStart: 2)

    private static func record(_ json: String) -> [UInt8] {
        var bytes = JournalFormat.header
        JournalFormat.append(.origin, Array(json.utf8), to: &bytes)
        return bytes
    }

    @Test func `A journal from before there was a version is read`() throws {
        let json =
            #"{"run":{"output_root":"/data","run_id":"r","debug":false,"session":"s","log":true,"rank":0,"world_size":1,"#
            + #""node":"host","progress":true,"resume_at":7,"umask":18,"tensorboard":true},"pid":1,"pid_start":2}"#
        let found = try #require(JournalFormat.replay(Self.record(json)))
        #expect(found.origin.run.version == nil && !found.origin.run.isNewer)
        #expect(found.origin.run.runId == "r" && found.origin.run.umask == 18)
        #expect(found.origin.run.tensorboard == true && found.origin.pidStart == 2)
    }

    @Test(arguments: [#""version":2,"#, #""run_id_of_tomorrow":"r","#])
    func `A journal of a newer version is not taken for an empty one`(_ beginning: String) {
        let name = beginning.contains("version") ? #""run_id":"r","# : ""
        let bytes = Self.record(
            #"{"run":{\#(beginning)\#(name)"output_root":"/data","session":"s"},"pid":1,"pid_start":2}"#)
        var replay = JournalReplay()
        _ = bytes.withUnsafeBytes { replay.read($0) }
        #expect(replay.isNewer && replay.found == nil)
    }

    /// Ten rows of two keys, of which the second comes later.
    private static func journal() throws -> (bytes: [UInt8], log: LogColumns) {
        var log = LogColumns()
        var bytes = try JournalFormat.encode(origin, log, lastSequence: 0)
        for update in Int64(1)...10 {
            let keys = update < 5 ? ["loss"] : ["loss", "acc"]
            let columns = try keys.map { try log.column(for: $0) }
            if update == 1 || update == 5 {
                JournalFormat.append(keys: [keys.last!], first: columns.last!, to: &bytes)
            }
            let values = keys.map { _ in ScalarBits(Double(update)) }
            try log.append(update: update, columnIDs: columns, values: values)
            JournalFormat.append(
                LogPayload(
                    sequence: UInt64(update), update: update, wallTime: 0, keyIDs: columns.map { UInt32($0) },
                    values: values), to: &bytes)
        }
        return (bytes, log)
    }

    /// Whether `found` is a beginning of `whole`, row for row.
    private func isBeginning(_ found: LogColumns, of whole: LogColumns) -> Bool {
        found.count <= whole.count
            && (0..<found.count).allSatisfy { row in
                found.update(row: row) == whole.update(row: row)
                    && found.row(row).values == whole.row(row).values
            }
    }

    @Test func replayGivesWhatWasWritten() throws {
        let (bytes, log) = try Self.journal()
        let found = try #require(JournalFormat.replay(bytes))
        #expect(found.log.count == 10 && isBeginning(found.log, of: log))
        #expect(found.log.keys == ["loss", "acc"])
        #expect(found.lastSequence == 10 && found.origin == Self.origin)
        #expect(found.byteCount == UInt64(bytes.count))
    }

    @Test func theSameUpdateAgainAddsToItsRow() throws {
        var (bytes, log) = try Self.journal()
        let values = [ScalarBits("x"), ScalarBits(tag: .none, bits: 0)]
        for (sequence, value) in zip(UInt64(11)..., values) {
            JournalFormat.append(
                LogPayload(sequence: sequence, update: 10, wallTime: 7, keyIDs: [1], values: [value]),
                to: &bytes)
        }
        let found = try #require(JournalFormat.replay(bytes))
        #expect(found.log.count == 10 && found.lastSequence == 12 && found.byteCount == UInt64(bytes.count))
        #expect(found.log.row(9).values == [ScalarBits(10.0), values[1]])
        try log.addToLastRow(columnIDs: [1], values: [values[1]])
        #expect(isBeginning(found.log, of: log))
    }

    @Test func anyCutGivesABeginning() throws {
        let (bytes, log) = try Self.journal()
        var rows: Set<Int> = []
        for length in 0...bytes.count {
            guard let found = JournalFormat.replay(Array(bytes[..<length])) else { continue }
            #expect(isBeginning(found.log, of: log))
            #expect(found.byteCount <= UInt64(length))
            rows.insert(found.log.count)
        }
        #expect(rows == Set(0...10))
    }

    @Test func aFlippedBitOrAHoleEndsItThere() throws {
        let (bytes, log) = try Self.journal()
        for position in bytes.indices {
            var damaged = bytes
            damaged[position] ^= 0x10
            if let found = JournalFormat.replay(damaged) { #expect(isBeginning(found.log, of: log)) }
            #expect(JournalFormat.replay(damaged)?.log.count ?? 0 < 10)
        }
        let hole = bytes + [UInt8](repeating: 0, count: 4096)
        #expect(JournalFormat.replay(hole)?.byteCount == UInt64(bytes.count))
    }

    /// Records that are whole, and say what can't be: of a journal that somebody else wrote.
    @Test(arguments: [[2], [0, 0], [.max]] as [[UInt32]])
    func aRowWhoseKeysAreNotThereOrTwiceEndsIt(ids: [UInt32]) throws {
        let (whole, log) = try Self.journal()
        var bytes = whole
        let values = ids.map { _ in ScalarBits(0.5) }
        JournalFormat.append(
            LogPayload(sequence: 11, update: 11, wallTime: 0, keyIDs: ids, values: values), to: &bytes)
        let found = try #require(JournalFormat.replay(bytes))
        #expect(found.log.count == 10 && isBeginning(found.log, of: log))
    }

    @Test func keysOutOfOrderEndIt() throws {
        var bytes = try Self.journal().bytes
        JournalFormat.append(keys: ["later"], first: 7, to: &bytes)
        let found = try #require(JournalFormat.replay(bytes))
        #expect(found.log.keys == ["loss", "acc"])
    }

    @Test func aLogInMemoryBecomesTheSameJournal() throws {
        let (_, log) = try Self.journal()
        let found = try #require(
            JournalFormat.replay(JournalFormat.encode(Self.origin, log, lastSequence: 7)))
        #expect(found.log.count == 10 && isBeginning(found.log, of: log))
        #expect(found.lastSequence == 7)
    }

    @Test("A journal of a log in memory that has lost its end does not say that it has all updates")
    func testDamagedJournalOfALogInMemory() throws {
        let (_, log) = try Self.journal()
        let bytes = try JournalFormat.encode(Self.origin, log, lastSequence: 7)
        let found = try #require(JournalFormat.replay(Array(bytes.dropLast())))
        #expect(found.log.count == 9 && found.lastSequence < 7)
    }

    @Test func cuttingALogKeepsItsBeginning() throws {
        var (_, log) = try Self.journal()
        let whole = log
        log.cut(after: 6)
        #expect(log.count == 6 && log.lastUpdate == 6 && isBeginning(log, of: whole))
        try log.append(update: 7, columnIDs: [0], values: [ScalarBits(0.5)])
        #expect(log.count == 7)
        log.cut(after: 100)
        #expect(log.count == 7)
    }
}
