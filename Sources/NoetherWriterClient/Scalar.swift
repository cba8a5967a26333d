// SPDX-License-Identifier: Apache-2.0
package import RunFiles
package import Wire

/// A value that can be logged, bit-exact: NaN payloads and -0.0 stay as they are.
public enum Scalar: Sendable, Equatable {
    /// Python's float.
    case float(Double)
    /// Python's int.
    case int(Int64)
    /// Python's bool.
    case bool(Bool)
    /// Python's None.
    case none
    /// Python's str.
    case string(String)
    /// An integer beyond 64 bits: two's complement, at most 255 bytes. Python trainers may log them.
    case bigInt(littleEndian: [UInt8])

    var bits: ScalarBits {
        switch self {
        case .float(let value): ScalarBits(value)
        case .int(let value): ScalarBits(value)
        case .bool(let value): ScalarBits(value)
        case .none: ScalarBits(tag: .none, bits: 0)
        case .string(let value): ScalarBits(value)
        case .bigInt(let bytes): ScalarBits(tag: .bigInt, bits: UInt64(bytes.count), tail: bytes[...])
        }
    }

    package init(_ value: ScalarBits) {
        self =
            switch value.tag {
            case .float: .float(Double(bitPattern: value.bits))
            case .int: .int(Int64(bitPattern: value.bits))
            case .bool: .bool(value.bits != 0)
            case .none: .none
            case .string: .string(String(decoding: value.tail, as: UTF8.self))
            case .bigInt: .bigInt(littleEndian: Array(value.tail))
            }
    }

    /// As entries.th has it.
    init(_ value: EntryValue) {
        self =
            switch value {
            case .float(let bits): .float(Double(bitPattern: bits))
            case .int(let number): .int(number)
            case .bool(let truth): .bool(truth)
            case .none: .none
            case .string(let text): .string(text)
            case .bigInt(let digits): .bigInt(littleEndian: digits)
            }
    }
}

extension EntryValue {
    package init(_ value: Scalar) {
        self =
            switch value {
            case .float(let number): .float(number.bitPattern)
            case .int(let number): .int(number)
            case .bool(let truth): .bool(truth)
            case .none: .none
            case .string(let text): .string(text)
            case .bigInt(let digits): .bigInt(littleEndian: digits)
            }
    }
}

extension Scalar: ExpressibleByFloatLiteral, ExpressibleByIntegerLiteral, ExpressibleByBooleanLiteral,
    ExpressibleByStringLiteral, ExpressibleByNilLiteral
{
    public init(floatLiteral value: Double) { self = .float(value) }
    public init(integerLiteral value: Int64) { self = .int(value) }
    public init(booleanLiteral value: Bool) { self = .bool(value) }
    public init(stringLiteral value: String) { self = .string(value) }
    public init(nilLiteral: ()) { self = .none }
}
