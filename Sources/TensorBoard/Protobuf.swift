// SPDX-License-Identifier: Apache-2.0
/// Protobuf's wire format, as far as event files need it. https://protobuf.dev/programming-guides/encoding/

struct ProtobufWriter {
    var bytes: [UInt8] = []

    static func varintByteCount(_ value: UInt64) -> Int { max(1, (70 - value.leadingZeroBitCount) / 7) }

    mutating func varint(_ value: UInt64) {
        var rest = value
        while rest >= 0x80 {
            bytes.append(UInt8(truncatingIfNeeded: rest) | 0x80)
            rest >>= 7
        }
        bytes.append(UInt8(rest))
    }

    private mutating func key(_ field: UInt64, _ wireType: UInt64) { varint(field << 3 | wireType) }

    mutating func fixed(_ value: some FixedWidthInteger) {
        withUnsafeBytes(of: value.littleEndian) { bytes += $0 }
    }

    mutating func int(_ field: UInt64, _ value: Int64) {
        key(field, 0)
        varint(UInt64(bitPattern: value))
    }

    mutating func double(_ field: UInt64, _ value: Double) {
        key(field, 1)
        fixed(value.bitPattern)
    }

    mutating func float(_ field: UInt64, _ value: Float) {
        key(field, 5)
        fixed(value.bitPattern)
    }

    mutating func string(_ field: UInt64, _ value: String) {
        length(field, value.utf8.count)
        bytes += value.utf8
    }

    /// What so many bytes follow on.
    mutating func length(_ field: UInt64, _ count: Int) {
        key(field, 2)
        varint(UInt64(count))
    }

    mutating func message(_ field: UInt64, _ build: (inout ProtobufWriter) -> Void) {
        var inner = ProtobufWriter()
        build(&inner)
        length(field, inner.bytes.count)
        bytes += inner.bytes
    }
}

/// Goes through a message's fields. Anything that is not well-formed ends it.
struct ProtobufReader {
    enum Value {
        case int(UInt64)
        case bytes(UnsafeRawBufferPointer)
        case fixed
    }

    private var rest: UnsafeRawBufferPointer.SubSequence

    init(_ bytes: UnsafeRawBufferPointer) { rest = bytes[...] }

    mutating func next() -> (field: UInt64, value: Value)? {
        guard let key = varint() else { return nil }
        switch key & 7 {
        case 0: return varint().map { (key >> 3, .int($0)) }
        case 1: return read(8).map { _ in (key >> 3, .fixed) }
        case 5: return read(4).map { _ in (key >> 3, .fixed) }
        case 2:
            guard let count = varint(), count <= UInt64(rest.count) else { return nil }
            return read(Int(count)).map { (key >> 3, .bytes($0)) }
        default: return nil
        }
    }

    private mutating func read(_ count: Int) -> UnsafeRawBufferPointer? {
        guard rest.count >= count else { return nil }
        defer { rest = rest.dropFirst(count) }
        return UnsafeRawBufferPointer(rebasing: rest.prefix(count))
    }

    private mutating func varint() -> UInt64? {
        var value: UInt64 = 0
        for shift in stride(from: UInt64(0), through: 63, by: 7) {
            guard let byte = rest.popFirst() else { return nil }
            value |= UInt64(byte & 0x7F) << shift
            if byte < 0x80 { return value }
        }
        return nil
    }
}
