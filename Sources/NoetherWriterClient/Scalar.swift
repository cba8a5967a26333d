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

extension Scalar {
    /// Texts are the same if their bytes are, as in Python: Swift's own `==` goes by Unicode equivalence. NaN differs
    /// from itself.
    public static func == (first: Scalar, second: Scalar) -> Bool {
        switch (first, second) {
        case (.float(let a), .float(let b)): a == b
        case (.int(let a), .int(let b)): a == b
        case (.bool(let a), .bool(let b)): a == b
        case (.none, .none): true
        case (.string(let a), .string(let b)): a.isSame(as: b)
        case (.bigInt(let a), .bigInt(let b)): a == b
        default: false
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

/// What can be logged as it is: floats, integers, truth values, texts, and any of them that may be nil.
public protocol ScalarConvertible {
    /// As it is logged.
    var scalar: Scalar { get }
}

extension Scalar: ScalarConvertible { public var scalar: Scalar { self } }
extension Bool: ScalarConvertible { public var scalar: Scalar { .bool(self) } }
extension String: ScalarConvertible { public var scalar: Scalar { .string(self) } }
extension Double: ScalarConvertible { public var scalar: Scalar { .float(self) } }
extension Float: ScalarConvertible { public var scalar: Scalar { .float(Double(self)) } }
#if !((os(macOS) || targetEnvironment(macCatalyst)) && arch(x86_64))
    extension Float16: ScalarConvertible { public var scalar: Scalar { .float(Double(self)) } }
#endif
extension Int: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension Int8: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension Int16: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension Int32: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension Int64: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension UInt: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension UInt8: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension UInt16: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension UInt32: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension UInt64: ScalarConvertible { public var scalar: Scalar { .integer(self) } }
extension Optional: ScalarConvertible where Wrapped: ScalarConvertible {
    public var scalar: Scalar { map(\.scalar) ?? .none }
}

extension Scalar {
    /// Any integer; one beyond 64 bits as ``bigInt(littleEndian:)``.
    public static func integer(_ value: some BinaryInteger) -> Scalar {
        if let small = Int64(exactly: value) { return .int(small) }
        var bytes = value.words.flatMap { word in withUnsafeBytes(of: word.littleEndian) { Array($0) } }
        // A sign of its own: the words of an unsigned one have none.
        bytes.append(value < 0 ? 0xFF : 0)
        return .bigInt(littleEndian: bytes)
    }
}
