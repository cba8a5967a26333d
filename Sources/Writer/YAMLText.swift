// SPDX-License-Identifier: Apache-2.0
/// Scalars as PyYAML's `safe_dump` writes them (yaml/representer.py, yaml/emitter.py): so that who reads a run's files finds there
/// what Noether's own tracker would have left. Pure.
///
/// Only looks differ, never what is read: a text is not folded over lines, and one that does not begin with a letter is quoted where
/// PyYAML may leave it plain.
import Wire

enum YAMLText {
    static func scalar(_ value: ScalarBits) -> String {
        switch value.tag {
        case .float: float(Double(bitPattern: value.bits))
        case .int: "\(Int64(bitPattern: value.bits))"
        case .bool: value.bits == 1 ? "true" : "false"
        case .none: "null"
        case .string: text(String(decoding: value.tail, as: UTF8.self))
        case .bigInt: LargeInteger(twosComplement: value.tail).description
        }
    }

    /// YAML 1.1 takes `1e-05` for a text: a float has a dot.
    static func float(_ value: Double) -> String {
        if value.isNaN { return ".nan" }
        if value.isInfinite { return value < 0 ? "-.inf" : ".inf" }
        // Python goes over to exponents at 1e16, Swift at 2^54.
        if abs(value) < 1e16, value == value.rounded(.towardZero) {
            return (value.sign == .minus ? "-" : "") + "\(Int64(abs(value))).0"
        }
        let text = "\(value)"
        guard !text.contains("."), let exponent = text.firstIndex(of: "e") else { return text }
        return text[..<exponent] + ".0" + text[exponent...]
    }

    private static let words: Set<String> = [
        "yes", "no", "true", "false", "on", "off", "null", "y", "n",
    ]

    static func text(_ text: String) -> String {
        self.text(text) { isLetter($0) || $0 == UInt8(ascii: "_") }
    }

    /// A key that can be taken for nothing but a text: it ends with a name behind a slash.
    static func key(_ text: String) -> String {
        let isMarker = text.hasPrefix("---") || text.hasPrefix("...")
        return self.text(text) { !isMarker && !indicators.contains($0) }
    }

    private static let indicators = Array("#,[]{}&*!|>'\"%@` ".utf8)

    private static func text(_ text: String, mayStart: (UInt8) -> Bool) -> String {
        let scalars = text.unicodeScalars
        guard scalars.allSatisfy({ (0x20...0x7E).contains($0.value) }) else { return doubleQuoted(scalars) }
        let isPlain = text.utf8.first.map(mayStart) == true && hasNoMark(Array(text.utf8))
        return isPlain && !words.contains(text.lowercased())
            ? text : "'" + text.replacing("'", with: "''") + "'"
    }

    /// Nothing that ends a plain text, or begins something else (yaml/emitter.py, analyze_scalar).
    private static func hasNoMark(_ text: [UInt8]) -> Bool {
        func isSpace(_ index: Int) -> Bool { !text.indices.contains(index) || text[index] == 0x20 }
        return !isSpace(text.count - 1)
            && text.indices.allSatisfy { index in
                switch text[index] {
                case UInt8(ascii: ":"): !isSpace(index + 1)
                case UInt8(ascii: "#"): !isSpace(index - 1)
                case UInt8(ascii: "-"), UInt8(ascii: "?"): index > 0 || !isSpace(index + 1)
                default: true
                }
            }
    }

    private static func isLetter(_ byte: UInt8) -> Bool {
        (0x41...0x5A).contains(byte) || (0x61...0x7A).contains(byte)
    }

    private static let escapes: [UInt32: String] = [
        0: "0", 7: "a", 8: "b", 9: "t", 10: "n", 11: "v", 12: "f", 13: "r", 0x1B: "e", 0x22: "\"", 0x5C: "\\",
        0x85: "N", 0xA0: "_", 0x2028: "L", 0x2029: "P",
    ]

    private static func doubleQuoted(_ scalars: String.UnicodeScalarView) -> String {
        var out = "\""
        for scalar in scalars {
            let value = scalar.value
            if let escape = escapes[value] {
                out += "\\" + escape
            } else if (0x20...0x7E).contains(value) {
                out.unicodeScalars.append(scalar)
            } else {
                let digits = String(value, radix: 16, uppercase: true)
                let (letter, count) = value < 0x100 ? ("x", 2) : value < 0x10000 ? ("u", 4) : ("U", 8)
                out += "\\" + letter + String(repeating: "0", count: count - digits.count) + digits
            }
        }
        return out + "\""
    }
}

/// An integer beyond 64 bits (of at most 255 bytes), as far as it is compared and shown.
struct LargeInteger: CustomStringConvertible {
    private(set) var isNegative: Bool
    /// Little-endian, without zeros at its end.
    private(set) var magnitude: [UInt8]

    /// - Parameter bytes: little-endian.
    init(twosComplement bytes: some Collection<UInt8>) {
        magnitude = Array(bytes)
        isNegative = (magnitude.last ?? 0) >= 0x80
        if isNegative {
            var carry = 1
            for index in magnitude.indices {
                let sum = Int(~magnitude[index]) + carry
                magnitude[index] = UInt8(truncatingIfNeeded: sum)
                carry = sum >> 8
            }
        }
        while magnitude.last == 0 { magnitude.removeLast() }
    }

    init(_ value: Int64) {
        self.init(twosComplement: withUnsafeBytes(of: value.littleEndian) { Array($0) })
    }

    var double: Double {
        let size = magnitude.reversed().reduce(0.0) { $0 * 256 + Double($1) }
        return isNegative ? -size : size
    }

    func isLess(than other: LargeInteger) -> Bool {
        guard isNegative == other.isNegative else { return isNegative }
        let (small, large) = isNegative ? (other, self) : (self, other)
        if small.magnitude.count != large.magnitude.count {
            return small.magnitude.count < large.magnitude.count
        }
        return small.magnitude.reversed().lexicographicallyPrecedes(large.magnitude.reversed())
    }

    /// In decimal digits.
    var description: String {
        var rest = magnitude
        var groups: [UInt32] = []
        while !rest.isEmpty {
            var remainder: UInt64 = 0
            for index in rest.indices.reversed() {
                let value = remainder << 8 | UInt64(rest[index])
                rest[index] = UInt8(truncatingIfNeeded: value / 1_000_000_000)
                remainder = value % 1_000_000_000
            }
            groups.append(UInt32(remainder))
            while rest.last == 0 { rest.removeLast() }
        }
        guard let first = groups.last else { return "0" }
        return (isNegative ? "-" : "") + "\(first)"
            + groups.dropLast().reversed().map { group in
                let digits = "\(group)"
                return String(repeating: "0", count: 9 - digits.count) + digits
            }.joined()
    }
}
