// SPDX-License-Identifier: Apache-2.0
/// A journal's bytes as a log again, piece by piece: what is in memory is the log itself and one piece. Pure.
import TorchFile
import Wire

struct JournalReplay {
    /// nil as long as there is no whole origin: nothing was acknowledged from such a journal.
    private(set) var found: JournalFormat.Replayed?
    /// What follows does not count: a record that does not match its sum, or says what can't be.
    private(set) var isOver = false
    /// It says in a form that this build does not know whose log it is: a newer daemon has written it.
    private(set) var isNewer = false
    /// Bytes that are good.
    private(set) var byteCount: UInt64 = 0
    /// The columns and values of one row. The arrays are used again, because there are millions of rows.
    private var columnIDs: [Int] = []
    private var values: [ScalarBits] = []
    /// By column, the number of the last row that named it.
    private var lastNamed: [Int] = []
    private var rowNumber = 0

    /// A piece that holds this many bytes of what is left holds at least one record.
    static let pieceByteCount = 4 << 20

    /// - Returns: how many bytes it has used; the rest comes again, with more behind it.
    mutating func read(_ bytes: UnsafeRawBufferPointer) -> Int {
        var start = 0
        if byteCount == 0 {
            guard bytes.count >= JournalFormat.header.count else { return 0 }
            guard bytes.starts(with: JournalFormat.header) else {
                isOver = true
                return 0
            }
            start = JournalFormat.header.count
            byteCount = UInt64(start)
        }
        while !isOver, let count = record(UnsafeRawBufferPointer(rebasing: bytes[start...])) {
            start += count
            byteCount += UInt64(count)
            found?.byteCount = byteCount
        }
        return start
    }

    /// - Returns: its length; nil where it is not whole.
    private mutating func record(_ bytes: UnsafeRawBufferPointer) -> Int? {
        let head = JournalFormat.recordHeaderByteCount
        guard bytes.count >= head else { return nil }
        let length = Int(UInt32(littleEndian: bytes.loadUnaligned(as: UInt32.self)))
        let sum = UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: 4, as: UInt32.self))
        // guard: journal-length (always: length <= JournalFormat.bodyByteCount)
        guard length <= JournalFormat.bodyByteCount, let kind = JournalFormat.Kind(rawValue: bytes[8]) else {
            isOver = true
            return nil
        }
        guard bytes.count >= head + length else { return nil }
        // The sum covers the type and the body, which follow one another.
        var crc = CRC32()
        crc.update(UnsafeRawBufferPointer(rebasing: bytes[8..<head + length]))
        // guard: journal-crc (always: crc.value == sum)
        guard crc.value == sum, apply(kind, UnsafeRawBufferPointer(rebasing: bytes[head..<head + length]))
        else {
            isOver = true
            return nil
        }
        return head + length
    }

    private mutating func apply(_ kind: JournalFormat.Kind, _ body: UnsafeRawBufferPointer) -> Bool {
        switch kind {
        case .origin:
            guard let origin = try? JSONPayload.decode(JournalFormat.Origin.self, from: Array(body)),
                !origin.run.isNewer
            else {
                isNewer = true
                return false
            }
            found = JournalFormat.Replayed(origin: origin, log: LogColumns(), lastSequence: 0, byteCount: 0)
            lastNamed = []
            return true
        case .keys:
            guard let definitions = try? KeyDefinitions(decoding: Array(body)),
                Int(definitions.firstID) == found?.log.keys.count,  // guard: journal-keys-in-order (always)
                (try? found?.log.columns(for: definitions.keys)) != nil
            else { return false }
            lastNamed += Array(repeating: 0, count: (found?.log.keys.count ?? 0) - lastNamed.count)
            return true
        case .row: return row(body)
        }
    }

    /// As `LogPayload` decodes it, without arrays of its own.
    private mutating func row(_ body: UnsafeRawBufferPointer) -> Bool {
        func number<T: FixedWidthInteger>(_: T.Type, at offset: Int) -> T {
            T(littleEndian: body.loadUnaligned(fromByteOffset: offset, as: T.self))
        }
        let head = LogPayload.headByteCount
        guard body.count >= head else { return false }
        let (sequence, update) = (number(UInt64.self, at: 0), number(Int64.self, at: 8))
        let wallTime = Double(bitPattern: number(UInt64.self, at: 16))
        let (count, tailByteCount) = (Int(number(UInt32.self, at: 24)), Int(number(UInt32.self, at: 28)))
        guard count <= Limits.valuesPerLog,
            body.count == head + count * LogPayload.valueByteCount + tailByteCount
        else { return false }
        let (ids, tags) = (head + 8 * count, head + 12 * count)
        rowNumber += 1
        columnIDs.removeAll(keepingCapacity: true)
        values.removeAll(keepingCapacity: true)
        var tail = body[(tags + count)...]
        for index in 0..<count {
            let id = Int(number(UInt32.self, at: ids + 4 * index))
            // guard: journal-row-keys (always: id < lastNamed.count)
            // guard: journal-row-keys-once (always: lastNamed[id] != rowNumber)
            guard id < lastNamed.count, lastNamed[id] != rowNumber,
                let tag = ValueTag(rawValue: body[tags + index]),
                let value = try? ScalarBits(tag, number(UInt64.self, at: head + 8 * index), from: &tail)
            else { return false }
            lastNamed[id] = rowNumber
            columnIDs.append(id)
            values.append(value)
        }
        guard tail.isEmpty, found != nil else { return false }
        do {
            if update == found?.log.lastUpdate {
                try found?.log.addToLastRow(columnIDs: columnIDs, values: values)
            } else {
                try found?.log.append(
                    update: update, columnIDs: columnIDs, values: values, wallTime: wallTime)
            }
        } catch { return false }
        if let last = found?.lastSequence, sequence > last { found?.lastSequence = sequence }
        return true
    }

    // MARK: What follows damage

    /// A record that is not in the first bytes of a piece, but begins in it, may end so much later.
    static let longestRecordByteCount = JournalFormat.recordHeaderByteCount + JournalFormat.bodyByteCount

    /// Whether a whole record begins in the first `count` bytes. What a daemon was writing when it died ends in the
    /// middle of a record, and nothing follows that.
    /// - Parameter sumByteCount: how many bytes may be summed; if that is not enough to say no, the answer is yes.
    static func holdsRecord(_ bytes: UnsafeRawBufferPointer, in count: Int, sumByteCount: inout Int) -> Bool {
        let head = JournalFormat.recordHeaderByteCount
        var start = 0
        while start < count, start + head <= bytes.count {
            defer { start += 1 }
            guard JournalFormat.Kind(rawValue: bytes[start + 8]) != nil else { continue }
            let length = Int(UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: start, as: UInt32.self)))
            guard length <= JournalFormat.bodyByteCount, start + head + length <= bytes.count else { continue }
            guard sumByteCount >= length else { return true }
            sumByteCount -= length
            var crc = CRC32()
            crc.update(UnsafeRawBufferPointer(rebasing: bytes[start + 8..<start + head + length]))
            let sum = bytes.loadUnaligned(fromByteOffset: start + 4, as: UInt32.self)
            if crc.value == UInt32(littleEndian: sum) { return true }
        }
        return false
    }
}
