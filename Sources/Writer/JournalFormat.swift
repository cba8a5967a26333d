// SPDX-License-Identifier: Apache-2.0
/// The log's journal as bytes: what `tracker/entries.journal` holds while a run has no durable entries.th. Pure.
///
/// A header of 16 bytes ("NWJRNL01", u64 0), then records: u32 length of the body, u32 CRC-32 of type and body, u8 type,
/// body. A reader stops at the first record that is cut off, is all zeros (a hole that a crash left), or does not match its
/// CRC. If no whole record follows, nothing that follows was acknowledged; `JournalDamage` keeps what does.
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
        var run: RunIdentity
        var pid: Int32
        /// In clock ticks since boot: tells a process from a later one with its number (proc(5), stat, field 22).
        var pidStart: UInt64
        /// Sessions that brought the log before, and do not take it back by connecting again.
        var takenOver: [String]?
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

    /// A few keys a record, so that no record outgrows its limit: any number of messages may define some before a row.
    static func append(keys: [String], first: Int, to bytes: inout [UInt8]) {
        for start in stride(from: 0, to: keys.count, by: keysPerRecord) {
            var writer = ByteWriter()
            let some = Array(keys[start..<min(start + keysPerRecord, keys.count)])
            KeyDefinitions(firstID: UInt32(first + start), keys: some).encode(into: &writer)
            append(.keys, writer.bytes, to: &bytes)
        }
    }

    private static let keysPerRecord = 512

    /// A whole log, as a journal starts with it.
    static func encode(_ origin: Origin, _ log: LogColumns, lastSequence: UInt64) throws(WireError) -> [UInt8] {
        var bytes = header
        append(.origin, try JSONPayload.encode(origin), to: &bytes)
        append(keys: log.keys, first: 0, to: &bytes)
        // Only the last row has the number: a journal that is damaged before it must not say that it has all rows.
        let last = max(0, log.count - 1)
        for row in log.payloads(rows: 0..<last, sequence: 0) { append(row, to: &bytes) }
        for row in log.payloads(rows: last..<log.count, sequence: lastSequence) { append(row, to: &bytes) }
        return bytes
    }

    struct Replayed: Sendable {
        var origin: Origin
        var log: LogColumns
        var lastSequence: UInt64
        /// Bytes that are good; the file is cut there before it grows again.
        var byteCount: UInt64
    }

    /// - Returns: nil where there is no whole origin.
    static func replay(_ bytes: [UInt8]) -> Replayed? { bytes.withUnsafeBytes { replay($0) } }

    static func replay(_ bytes: UnsafeRawBufferPointer) -> Replayed? {
        var replay = JournalReplay()
        _ = replay.read(bytes)
        return replay.found
    }
}
