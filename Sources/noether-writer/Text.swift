// SPDX-License-Identifier: Apache-2.0
/// Text for a person: colours if there is a terminal that shows them, widths, numbers, tables.
import Chart
import Posix
import RunFiles

enum Text {
    enum Colour: String {
        case red = "31"
        case green = "32"
        case yellow = "33"
        case blue = "34"
        case magenta = "35"
        case cyan = "36"
        case white = "37"
        case dim = "2"
        case bold = "1"
        case reverse = "7"
    }

    /// Only on a terminal; https://no-color.org.
    static let hasColour =
        Terminal.isTerminal && (ThisProcess.environment("NO_COLOR") ?? "").isEmpty
        && ThisProcess.environment("TERM") != "dumb"

    static func paint(_ text: String, _ colour: Colour?) -> String {
        guard hasColour, let colour, !text.isEmpty else { return text }
        return "\u{1B}[\(colour.rawValue)m\(text)\u{1B}[0m"
    }

    /// Nothing that a name or a message holds may steer the terminal, turn the direction of what is around it, or hide:
    /// control characters become U+FFFD, and what turns or can't be seen is shown by its number.
    static func printable(_ text: String) -> String {
        guard text.unicodeScalars.contains(where: { isControl($0) || isHidden($0) }) else { return text }
        var out = String.UnicodeScalarView()
        for scalar in text.unicodeScalars {
            if isControl(scalar) {
                out.append("\u{FFFD}")
            } else if isHidden(scalar) {
                out.append(contentsOf: "\\u{\(String(scalar.value, radix: 16))}".unicodeScalars)
            } else {
                out.append(scalar)
            }
        }
        return String(out)
    }

    private static func isControl(_ scalar: Unicode.Scalar) -> Bool {
        scalar.properties.generalCategory == .control
    }

    private static func isHidden(_ scalar: Unicode.Scalar) -> Bool {
        guard !scalar.isASCII else { return false }
        switch scalar.properties.generalCategory {
        case .format, .lineSeparator, .paragraphSeparator: return true
        // Which of its forms a character has, as of emoji, is seen.
        default:
            return scalar.properties.isDefaultIgnorableCodePoint && !(0xFE00...0xFE0F).contains(scalar.value)
        }
    }

    /// A JSON string.
    static func json(_ text: String) -> String {
        var out = "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"", "\\": out += "\\\(scalar)"
            case _ where scalar.value < 0x20:
                let digits = String(scalar.value, radix: 16)
                out += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
            default: out.unicodeScalars.append(scalar)
            }
        }
        return out + "\""
    }

    /// A value of JSON, with NaN and infinities as strings.
    static func json(_ value: EntryValue) -> String {
        switch value {
        case .float(let bits): Double(bitPattern: bits).isFinite ? value.text : json(value.text)
        case .int, .bigInt: value.text
        case .bool(let truth): truth ? "true" : "false"
        case .none: "null"
        case .string(let text): json(text)
        }
    }

    /// A JSON object, by hand: Foundation takes names for one that only Unicode takes for the same.
    /// - Parameter members: names, and values as JSON; those that are nil are left out.
    static func json(object members: [(name: String, value: String?)]) -> String {
        let written = members.compactMap { member in member.value.map { "\(json(member.name)):\($0)" } }
        return "{\(written.joined(separator: ","))}"
    }

    static func json(array items: [String]) -> String { "[\(items.joined(separator: ","))]" }

    // MARK: Widths

    /// Columns that it takes on a terminal.
    static func width(_ text: String) -> Int { text.reduce(0) { $0 + width($1) } }

    private static func width(_ character: Character) -> Int {
        guard let scalar = character.unicodeScalars.first else { return 0 }
        switch scalar.value {
        case 0x1100...0x115F, 0x2E80...0xA4CF, 0xAC00...0xD7A3, 0xF900...0xFAFF, 0xFE30...0xFE6F,
            0xFF00...0xFF60,
            0xFFE0...0xFFE6, 0x1F300...0x1F64F, 0x1F900...0x1F9FF, 0x20000...0x3FFFD:
            return 2
        default: return scalar.properties.generalCategory == .nonspacingMark ? 0 : 1
        }
    }

    /// At most so wide, with `…` if something was cut.
    static func clipped(_ text: String, _ columns: Int) -> String {
        guard columns > 0 else { return "" }
        guard width(text) > columns else { return text }
        var out = ""
        var used = 0
        for character in text {
            guard used + width(character) < columns else { break }
            out.append(character)
            used += width(character)
        }
        return out + "…"
    }

    /// The end is what tells paths apart.
    static func clippedAtStart(_ text: String, _ columns: Int) -> String {
        guard columns > 0 else { return "" }
        guard width(text) > columns else { return text }
        var out: [Character] = []
        var used = 0
        for character in text.reversed() {
            guard used + width(character) < columns else { break }
            out.append(character)
            used += width(character)
        }
        return "…" + String(out.reversed())
    }

    /// Beginning and end are what tells names apart.
    static func clippedInTheMiddle(_ text: String, _ columns: Int) -> String {
        guard width(text) > columns, columns > 4 else { return clipped(text, columns) }
        let end = (columns - 1) * 3 / 5
        let tail = clippedAtStart(text, end + 1).dropFirst()
        return clipped(text, columns - width(String(tail))) + tail
    }

    static func padded(_ text: String, _ columns: Int, right: Bool = false) -> String {
        let space = String(repeating: " ", count: max(0, columns - width(text)))
        return right ? space + text : text + space
    }

    // MARK: Numbers

    /// `1.4 GiB`.
    static func bytes(_ count: UInt64) -> String {
        for (name, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] where count >= 1 << shift {
            return Axis.fixed(Double(count) / Double(1 << shift), decimals: 1) + " " + name
        }
        return "\(count) B"
    }

    /// `1.4 of 3.0 GiB`.
    static func bytes(_ part: UInt64, of whole: UInt64) -> String {
        let text = bytes(whole)
        guard let shift = [40, 30, 20, 10].first(where: { whole >= 1 << $0 }) else {
            return "\(part) of \(text)"
        }
        return Axis.fixed(Double(part) / Double(1 << shift), decimals: 1) + " of " + text
    }

    /// Six digits that count, as a person reads them; whole if it is not a number.
    static func short(_ value: EntryValue) -> String {
        guard case .float(let bits) = value else { return value.text }
        let number = Double(bitPattern: bits)
        guard number.isFinite, number != 0 else { return value.text }
        let size = abs(number)
        guard size >= 1e-4, size < 1e9 else { return Axis.short(number) }
        var decimals = 5
        for power in 1...9 where size >= Axis.power(power) { decimals = max(0, 5 - power) }
        if size < 1 { decimals = size < 0.001 ? 9 : size < 0.01 ? 8 : size < 0.1 ? 7 : 6 }
        let text = Axis.fixed(number, decimals: decimals)
        guard text.contains(".") else { return text }
        let digits = text.reversed().drop { $0 == "0" }.reversed()
        return digits.last == "." ? String(digits) + "0" : String(digits)
    }

    /// `4 ms`, `0.12 s`, `14 s`, `3 min`, `2 h 5 min`, `4 d 2 h`.
    /// - Parameter coarse: no parts of a second.
    static func duration(_ seconds: Double, coarse: Bool = false) -> String {
        if !seconds.isFinite { return "?" }
        if coarse, seconds < 120 { return "\(Int(max(0, seconds))) s" }
        let whole = Int(max(0, min(seconds, 1e9)))
        return switch seconds {
        case ..<0.1: "\(Int((max(0, seconds) * 1000).rounded())) ms"
        case ..<10: Axis.fixed(seconds, decimals: seconds < 1 ? 2 : 1) + " s"
        case ..<120: "\(whole) s"
        case ..<7200: "\(whole / 60) min"
        case ..<172_800: "\(whole / 3600) h \(whole % 3600 / 60) min"
        default: "\(whole / 86_400) d \(whole % 86_400 / 3600) h"
        }
    }

    static func rate(_ perSecond: Double) -> String {
        Axis.fixed(perSecond, decimals: perSecond < 10 ? 1 : 0)
    }

    static func count(_ number: Int, _ noun: String) -> String {
        "\(number) \(noun)\(number == 1 ? "" : "s")"
    }

    static func bar(_ share: Double, _ columns: Int) -> String {
        let full = Int((max(0, min(1, share)) * Double(columns)).rounded(.down))
        return String(repeating: "█", count: full) + String(repeating: "░", count: columns - full)
    }
}
