// SPDX-License-Identifier: Apache-2.0
/// One update's values as `log` carries them, and keys as `define_keys` does. Packed binary: the hot path.

public enum ValueTag: UInt8, Sendable, CaseIterable {
    case float = 0
    case int = 1
    case bool = 2
    case none = 3
    case string = 4
    case bigInt = 5
}

/// A scalar, bit-exact: 64 bits, what they mean, and for strings and big integers the bytes that follow them.
public struct ScalarBits: Sendable, Equatable {
    public var tag: ValueTag
    public var bits: UInt64
    public var tail: ArraySlice<UInt8>

    public init(tag: ValueTag, bits: UInt64, tail: ArraySlice<UInt8> = []) {
        self.tag = tag
        self.bits = bits
        self.tail = tail
    }

    public init(_ value: Double) { self.init(tag: .float, bits: value.bitPattern) }
    public init(_ value: Int64) { self.init(tag: .int, bits: UInt64(bitPattern: value)) }
    public init(_ value: Bool) { self.init(tag: .bool, bits: value ? 1 : 0) }
    public init(_ value: String) {
        let bytes = Array(value.utf8)
        self.init(tag: .string, bits: UInt64(bytes.count), tail: bytes[...])
    }
}

extension ScalarBits {
    /// Values with their bits, tags and tails apart, as every packed payload holds them. The tail must be used up.
    static func decode(
        bits: [UInt64], tags: ArraySlice<UInt8>, tail: ArraySlice<UInt8>
    ) throws(WireError) -> [ScalarBits] {
        var values: [ScalarBits] = []
        values.reserveCapacity(bits.count)
        var failure: WireError?
        let left = tail.withUnsafeBytes { tail in
            var tail = tail[...]
            do throws(WireError) {
                for (bits, rawTag) in zip(bits, tags) {
                    // guard: value-tag (= PART ?? .float for ValueTag(rawValue: rawTag))
                    guard let tag = ValueTag(rawValue: rawTag) else {
                        throw WireError(.badFrame, "unknown value tag \(rawTag)")
                    }
                    values.append(try ScalarBits(tag, bits, from: &tail))
                }
            } catch { failure = error }
            return tail.count
        }
        if let failure { throw failure }
        // guard: tail-used-up (always)
        guard left == 0 else { throw WireError(.badFrame, "\(left) bytes of the tail belong to no value") }
        return values
    }

    /// - Parameter tail: what is left of it; the value's part is taken off.
    public init(_ tag: ValueTag, _ bits: UInt64, from tail: inout Slice<UnsafeRawBufferPointer>)
        throws(WireError)
    {
        switch tag {
        case .float, .int: self.init(tag: tag, bits: bits)
        // guard: bool-bits (always: bits <= 1)
        // guard: none-bits (always: bits == 0)
        case .bool where bits <= 1, .none where bits == 0: self.init(tag: tag, bits: bits)
        case .bool, .none: throw WireError(.badFrame, "value \(bits) under tag \(tag)")
        case .string, .bigInt:
            guard bits <= UInt64(tail.count) else {  // guard: tail-holds-the-text (always)
                throw WireError(.badFrame, "a value ends behind the tail")
            }
            let bytes = Array(tail.prefix(Int(bits)))
            if tag == .string, String(validating: bytes, as: UTF8.self) == nil {  // guard: text-is-utf-8 (never)
                throw WireError(.badFrame, "a string value is not UTF-8")
            }
            if tag == .bigInt, bytes.isEmpty || bytes.count > 255 {  // guard: bytes-of-an-integer (never)
                throw WireError(.badFrame, "a big integer has 1 to 255 bytes, not \(bytes.count)")
            }
            tail.removeFirst(bytes.count)
            self.init(tag: tag, bits: bits, tail: bytes[...])
        }
    }
}

public struct LogPayload: Sendable, Equatable {
    public var sequence: UInt64
    public var update: Int64
    /// Seconds since 1970.
    public var wallTime: Double
    public var keyIDs: [UInt32]
    public var values: [ScalarBits]

    public init(sequence: UInt64, update: Int64, wallTime: Double, keyIDs: [UInt32], values: [ScalarBits]) {
        self.sequence = sequence
        self.update = update
        self.wallTime = wallTime
        self.keyIDs = keyIDs
        self.values = values
    }

    public init(decoding payload: [UInt8]) throws(WireError) {
        var reader = ByteReader(payload)
        try self.init(decoding: &reader)
        try reader.expectEnd("log")
    }

    /// Reads one payload and leaves the reader after it: rows of `entries_page` follow one another.
    public init(decoding reader: inout ByteReader) throws(WireError) {
        sequence = try reader.u64()
        update = try reader.i64()
        wallTime = Double(bitPattern: try reader.u64())
        let count = Int(try reader.u32())
        let tailLength = Int(try reader.u32())
        guard count <= Limits.valuesPerLog else {  // guard: values-of-an-update (always)
            throw WireError(.tooLarge, "\(count) values in one update; at most \(Limits.valuesPerLog)")
        }
        let bits = try reader.array(of: UInt64.self, count: count)
        keyIDs = try reader.array(of: UInt32.self, count: count)
        let tags = try reader.read(count)
        values = try ScalarBits.decode(bits: bits, tags: tags, tail: try reader.read(tailLength))
    }

    /// What a payload has before its values, and each value without its tail.
    public static let headByteCount = 32
    public static let valueByteCount = 13

    /// As encoded.
    public var byteCount: Int {
        Self.headByteCount + values.count * Self.valueByteCount + values.reduce(0) { $0 + $1.tail.count }
    }

    public func encode(into writer: inout ByteWriter) {
        writer.u64(sequence)
        writer.i64(update)
        writer.u64(wallTime.bitPattern)
        writer.u32(UInt32(values.count))
        writer.u32(UInt32(values.reduce(0) { $0 + $1.tail.count }))
        for value in values { writer.u64(value.bits) }
        for id in keyIDs { writer.u32(id) }
        for value in values { writer.u8(value.tag.rawValue) }
        for value in values { writer.bytes(value.tail) }
    }
}

public struct KeyDefinitions: Sendable, Equatable {
    public var firstID: UInt32
    public var keys: [String]

    public init(firstID: UInt32, keys: [String]) {
        self.firstID = firstID
        self.keys = keys
    }

    public init(decoding payload: [UInt8]) throws(WireError) {
        var reader = ByteReader(payload)
        firstID = try reader.u32()
        let count = Int(try reader.u32())
        guard count <= Limits.keysPerRun else {  // guard: keys-at-once (always)
            throw WireError(.tooLarge, "\(count) keys at once; at most \(Limits.keysPerRun) a run")
        }
        keys = []
        for _ in 0..<count { keys.append(try Self.key(&reader)) }
        try reader.expectEnd("define_keys")
    }

    static func key(_ reader: inout ByteReader) throws(WireError) -> String {
        let bytes = try reader.read(Int(try reader.u16()))
        guard bytes.count <= Limits.keyBytes else {  // guard: key-length (always)
            throw WireError(.badKey, "a key of \(bytes.count) bytes; at most \(Limits.keyBytes)")
        }
        // guard: key-utf-8 (= PART ?? "?" for String(validating: bytes, as: UTF8.self))
        guard let key = String(validating: bytes, as: UTF8.self), isKey(key) else {
            throw WireError(.badKey, "a key is empty, not UTF-8, or holds NUL")
        }
        return key
    }

    public static func isKey(_ text: String) -> Bool {
        // guard: key-nul (always: !text.utf8.contains(0))
        // guard: key-empty (= 0 for 1)
        (1...Limits.keyBytes).contains(text.utf8.count) && !text.utf8.contains(0)
    }

    public func encode(into writer: inout ByteWriter) {
        writer.u32(firstID)
        writer.u32(UInt32(keys.count))
        for key in keys { Self.encode(key, into: &writer) }
    }

    static func encode(_ key: String, into writer: inout ByteWriter) {
        writer.u16(UInt16(key.utf8.count))
        writer.bytes(key.utf8)
    }
}

public struct LogAck: Sendable, Equatable {
    public var sequence: UInt64
    public var update: Int64
    /// nil on the wire is the smallest i64.
    public var durableUpdate: Int64?

    public init(sequence: UInt64, update: Int64, durableUpdate: Int64?) {
        self.sequence = sequence
        self.update = update
        self.durableUpdate = durableUpdate
    }

    public init(decoding payload: [UInt8]) throws(WireError) {
        var reader = ByteReader(payload)
        sequence = try reader.u64()
        update = try reader.i64()
        let durable = try reader.i64()
        durableUpdate = durable == .min ? nil : durable
        try reader.expectEnd("log_ack")
    }

    public func encoded() -> [UInt8] {
        var writer = ByteWriter(capacity: 24)
        writer.u64(sequence)
        writer.i64(update)
        writer.i64(durableUpdate ?? .min)
        return writer.bytes
    }
}
