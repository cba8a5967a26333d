// SPDX-License-Identifier: Apache-2.0
/// Pages of a run's log, as `values_page` and `entries_page` carry them: packed, and never larger than a payload.

/// A part of one key's values.
public struct ValuesPage: Sendable, Equatable {
    /// Values of this key in all.
    public var total: Int
    public private(set) var updates: [Int64] = []
    public private(set) var values: [ScalarBits] = []
    private var byteCount = 16

    public init(total: Int) { self.total = total }

    /// - Returns: false if it does not fit any more; the first one always does.
    public mutating func append(update: Int64, _ value: ScalarBits) -> Bool {
        let size = 17 + value.tail.count
        guard byteCount + size <= Limits.payloadBytes else { return false }
        byteCount += size
        updates.append(update)
        values.append(value)
        return true
    }

    public init(decoding payload: [UInt8]) throws(WireError) {
        var reader = ByteReader(payload)
        total = try pageTotal(&reader)
        let count = Int(try reader.u32())
        let tailLength = Int(try reader.u32())
        updates = try reader.array(of: Int64.self, count: count)
        let bits = try reader.array(of: UInt64.self, count: count)
        let tags = try reader.read(count)
        values = try ScalarBits.decode(bits: bits, tags: tags, tail: try reader.read(tailLength))
        try reader.expectEnd("values_page")
    }

    public func encoded() -> [UInt8] {
        var writer = ByteWriter(capacity: byteCount)
        writer.u64(UInt64(total))
        writer.u32(UInt32(values.count))
        writer.u32(UInt32(values.reduce(0) { $0 + $1.tail.count }))
        for update in updates { writer.i64(update) }
        for value in values { writer.u64(value.bits) }
        for value in values { writer.u8(value.tag.rawValue) }
        for value in values { writer.bytes(value.tail) }
        return writer.bytes
    }
}

/// Some rows of the log, one an update, and the names of the keys in them.
public struct EntriesPage: Sendable, Equatable {
    /// Rows in all.
    public var total: Int
    public private(set) var keys: [UInt32: String] = [:]
    public private(set) var rows: [LogPayload] = []
    /// What a page has before its keys and rows, and a key before its name.
    public static let headByteCount = 16
    public static let keyHeadByteCount = 6
    private var byteCount = EntriesPage.headByteCount
    private let byteLimit: Int

    /// - Parameter byteLimit: of all rows but the first, which always fits.
    public init(total: Int, byteLimit: Int = Limits.payloadBytes) {
        self.total = total
        self.byteLimit = byteLimit
    }

    /// - Parameter name: of a key id.
    /// - Returns: false if it does not fit any more.
    public mutating func append(_ row: LogPayload, name: (UInt32) -> String) -> Bool {
        let new = row.keyIDs.filter { keys[$0] == nil }.map { ($0, name($0)) }
        let size = row.byteCount + new.reduce(0) { $0 + Self.keyHeadByteCount + $1.1.utf8.count }
        guard byteCount + size <= (rows.isEmpty ? Limits.payloadBytes : byteLimit) else { return false }
        byteCount += size
        for (id, key) in new { keys[id] = key }
        rows.append(row)
        return true
    }

    public init(decoding payload: [UInt8]) throws(WireError) {
        var reader = ByteReader(payload)
        byteLimit = Limits.payloadBytes
        total = try pageTotal(&reader)
        let rowCount = Int(try reader.u32())
        let keyCount = Int(try reader.u32())
        for _ in 0..<keyCount {
            let id = try reader.u32()
            keys[id] = try KeyDefinitions.key(&reader)
        }
        for _ in 0..<rowCount { rows.append(try LogPayload(decoding: &reader)) }
        try reader.expectEnd("entries_page")
    }

    public func encoded() -> [UInt8] {
        var writer = ByteWriter(capacity: byteCount)
        writer.u64(UInt64(total))
        writer.u32(UInt32(rows.count))
        writer.u32(UInt32(keys.count))
        for (id, key) in keys.sorted(by: { $0.key < $1.key }) {
            writer.u32(id)
            KeyDefinitions.encode(key, into: &writer)
        }
        for row in rows { row.encode(into: &writer) }
        return writer.bytes
    }
}

private func pageTotal(_ reader: inout ByteReader) throws(WireError) -> Int {
    let total = try reader.u64()
    guard let total = Int(exactly: total) else {
        throw WireError(.badFrame, "a page of \(total) items in all")
    }
    return total
}
