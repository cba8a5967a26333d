// SPDX-License-Identifier: Apache-2.0
/// The log's journal as bytes: what `tracker/entries.journal` holds while a run has no durable entries.th. Pure.
///
/// A header of 16 bytes ("NWJRNL01", u64 0), then records: u32 length of the body, u32 CRC-32 of type and body, u8 type,
/// body. A reader stops at the first record that is cut off, is all zeros (a hole that a crash left), or does not match its
/// CRC: what lies behind was never acknowledged.
import TorchFile
import Wire

enum JournalFormat {
    static let header: [UInt8] = Array("NWJRNL01".utf8) + [0, 0, 0, 0, 0, 0, 0, 0]
    static let recordHeaderByteCount = 9
    /// A row is at most a payload; a run's identity is far smaller.
    static let bodyByteCount = Limits.payloadBytes + 64

    enum Kind: UInt8 {
        /// JSON of `Origin`: whose log this is. It starts the log anew.
        case origin = 1
        /// As `define_keys`; ids are the columns'.
        case keys = 2
        /// As `log`; key ids are the columns'. The same update again adds to its row.
        case row = 3
    }

    /// Whose log a journal holds. Written once, at its beginning.
    struct Origin: Codable, Sendable, Equatable {
        var run: OpenRun
        var pid: Int32
        /// In clock ticks since boot: tells a process from a later one with its number (proc(5), stat, field 22).
        var pidStart: UInt64
    }

    static func append(_ kind: Kind, _ body: [UInt8], to bytes: inout [UInt8]) {
        var crc = CRC32()
        withUnsafeBytes(of: kind.rawValue) { crc.update($0) }
        body.withUnsafeBytes { crc.update($0) }
        var writer = ByteWriter(capacity: recordHeaderByteCount)
        writer.u32(UInt32(body.count))
        writer.u32(crc.value)
        writer.u8(kind.rawValue)
        bytes += writer.bytes
        bytes += body
    }

    static func append(_ row: LogPayload, to bytes: inout [UInt8]) {
        var writer = ByteWriter(capacity: row.byteCount)
        row.encode(into: &writer)
        append(.row, writer.bytes, to: &bytes)
    }

    static func append(keys: [String], first: Int, to bytes: inout [UInt8]) {
        var writer = ByteWriter()
        KeyDefinitions(firstID: UInt32(first), keys: keys).encode(into: &writer)
        append(.keys, writer.bytes, to: &bytes)
    }

    /// A whole log, as a journal starts with it.
    static func encode(_ origin: Origin, _ log: LogColumns, lastSequence: UInt64) throws(WireError) -> [UInt8]
    {
        var bytes = header
        append(.origin, try JSONPayload.encode(origin), to: &bytes)
        // A few keys a record, so that no record outgrows its limit.
        for first in stride(from: 0, to: log.keys.count, by: 512) {
            append(keys: Array(log.keys[first..<min(first + 512, log.keys.count)]), first: first, to: &bytes)
        }
        for row in log.payloads(rows: 0..<log.count, sequence: lastSequence) { append(row, to: &bytes) }
        return bytes
    }

    struct Replayed: Sendable {
        var origin: Origin
        var log: LogColumns
        var lastSequence: UInt64
        /// Bytes that are good; the file is cut there before it grows again.
        var byteCount: UInt64
    }

    /// - Returns: nil where there is no whole origin: nothing was acknowledged from such a journal.
    static func replay(_ bytes: [UInt8]) -> Replayed? {
        guard bytes.count >= header.count, Array(bytes[..<header.count]) == header else { return nil }
        var found: Replayed?
        var start = header.count
        while let (kind, body, end) = record(bytes, at: start) {
            guard let next = try? apply(kind, body, to: found) else { break }
            found = next
            found?.byteCount = UInt64(end)
            start = end
        }
        return found
    }

    private static func record(_ bytes: [UInt8], at start: Int) -> (Kind, [UInt8], Int)? {
        var reader = ByteReader(bytes[start...])
        guard let length = try? reader.u32(), let sum = try? reader.u32(), let rawKind = try? reader.u8(),
            let kind = Kind(rawValue: rawKind), Int(length) <= bodyByteCount,
            let body = try? reader.take(Int(length))
        else { return nil }
        var crc = CRC32()
        withUnsafeBytes(of: rawKind) { crc.update($0) }
        body.withUnsafeBytes { crc.update($0) }
        guard crc.value == sum else { return nil }
        return (kind, Array(body), start + recordHeaderByteCount + Int(length))
    }

    private static func apply(_ kind: Kind, _ body: [UInt8], to found: Replayed?) throws(WireError)
        -> Replayed?
    {
        if kind == .origin {
            let origin = try JSONPayload.decode(Origin.self, from: body)
            return Replayed(origin: origin, log: LogColumns(), lastSequence: 0, byteCount: 0)
        }
        guard var found else { throw WireError(.badFrame, "a journal starts with its origin") }
        if kind == .keys {
            let definitions = try KeyDefinitions(decoding: body)
            guard Int(definitions.firstID) == found.log.keys.count else {
                throw WireError(.badKey, "keys of a journal are out of order")
            }
            for key in definitions.keys { _ = try found.log.column(for: key) }
            return found
        }
        let row = try LogPayload(decoding: body)
        guard row.keyIDs.allSatisfy({ Int($0) < found.log.keys.count }),
            Set(row.keyIDs).count == row.keyIDs.count
        else {
            throw WireError(.badKey, "a row of a journal names a key that is not there")
        }
        let columnIDs = row.keyIDs.map { Int($0) }
        if row.update == found.log.lastUpdate {
            try found.log.addToLastRow(columnIDs: columnIDs, values: row.values)
        } else {
            try found.log.append(
                update: row.update, columnIDs: columnIDs, values: row.values, wallTime: row.wallTime)
        }
        found.lastSequence = max(found.lastSequence, row.sequence)
        return found
    }
}
