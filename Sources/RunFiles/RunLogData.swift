// SPDX-License-Identifier: Apache-2.0
/// A log by keys: for each, its updates and values. From a file, or collected from a daemon's rows.
import Wire

public struct RunLogData: Sendable {
    public struct Series: Sendable {
        public private(set) var updates: [Int64] = []
        public private(set) var values: [EntryValue] = []

        public init() {}

        /// The same update again takes the place of its value: a row comes again where it has got more.
        mutating func append(_ value: EntryValue, update: Int64) {
            if updates.last == update { return values[values.count - 1] = value }
            updates.append(update)
            values.append(value)
        }

        /// In order of updates, however the file had them.
        mutating func sort() {
            guard zip(updates, updates.dropFirst()).contains(where: { $0 >= $1 }) else { return }
            let order = updates.indices.sorted { updates[$0] < updates[$1] }
            updates = order.map { updates[$0] }
            values = order.map { values[$0] }
        }
    }

    /// All keys of the log, in its order; also those whose values were not wanted.
    public private(set) var keys: [String] = []
    private var all: [ByteName: Series] = [:]
    /// Of a key that has values.
    public func series(_ key: String) -> Series? { all[ByteName(key)] }

    public init() {}

    public mutating func append(_ value: EntryValue, update: Int64, to key: String) {
        all[ByteName(key), default: Series()].append(value, update: update)
    }

    /// - Parameter keys: of the log, in its order.
    public mutating func finish(keys: [String]) {
        self.keys = keys
        for key in all.keys { all[key]?.sort() }
    }

    /// Forgets what comes after `update`; nil: everything.
    public mutating func cut(after update: Int64?) {
        for (key, old) in all {
            var kept = Series()
            for (index, at) in old.updates.enumerated() {
                if let update, at <= update { kept.append(old.values[index], update: at) }
            }
            all[key] = kept
        }
    }

    /// Every update that has a value, ascending.
    public var updates: [Int64] {
        var updates = Set<Int64>()
        for series in all.values { updates.formUnion(series.updates) }
        return updates.sorted()
    }

    /// The log by updates, ascending: of each, its keys in their order.
    public func rows(
        from first: Int64 = .min, through last: Int64 = .max
    ) -> [(update: Int64, values: [(key: String, value: EntryValue)])] {
        var rows: [Int64: [(key: String, value: EntryValue)]] = [:]
        for key in keys {
            guard let series = series(key) else { continue }
            for (update, value) in zip(series.updates, series.values) where (first...last).contains(update) {
                rows[update, default: []].append((key, value))
            }
        }
        return rows.sorted { $0.key < $1.key }.map { ($0.key, $0.value) }
    }

    public var lastUpdate: Int64? { all.values.compactMap(\.updates.last).max() }
}

extension EntryValue {
    /// What a chart can show: numbers and truth values. nil for what is no number; NaN is one.
    public var number: Double? {
        switch self {
        case .float(let bits): Double(bitPattern: bits)
        case .int(let value): Double(value)
        case .bool(let value): value ? 1 : 0
        case .bigInt(let digits):
            digits.reversed().reduce(digits.last.map { $0 >= 0x80 ? -1.0 : 0.0 } ?? 0) {
                $0 * 256 + Double($1)
            }
        case .none, .string: nil
        }
    }

    /// As Python prints it.
    public var text: String {
        switch self {
        case .float(let bits): Self.text(Double(bitPattern: bits))
        case .int(let value): "\(value)"
        case .bool(let value): value ? "True" : "False"
        case .none: "None"
        case .string(let value): value
        case .bigInt(let digits): Self.decimal(digits)
        }
    }

    /// Of two's complement, little endian.
    private static func decimal(_ digits: [UInt8]) -> String {
        let isNegative = digits.last.map { $0 >= 0x80 } ?? false
        var magnitude = digits
        if isNegative {
            var carry = true
            for index in magnitude.indices {
                (magnitude[index], carry) = (~magnitude[index]).addingReportingOverflow(carry ? 1 : 0)
            }
        }
        // Nine decimal digits at a time, the lowest first.
        var parts: [UInt64] = []
        var rest = magnitude.reversed().drop { $0 == 0 }.map { UInt64($0) }[...]
        while !rest.isEmpty {
            var remainder: UInt64 = 0
            rest = rest.map { digit in
                let value = remainder << 8 | digit
                remainder = value % 1_000_000_000
                return value / 1_000_000_000
            }.drop { $0 == 0 }
            parts.append(remainder)
        }
        guard let first = parts.last else { return "0" }
        return (isNegative ? "-" : "") + "\(first)"
            + parts.dropLast().reversed().map { part in
                let text = String(part)
                return String(repeating: "0", count: 9 - text.count) + text
            }.joined()
    }

    private static func text(_ value: Double) -> String {
        if value.isNaN { return "nan" }
        if value.isInfinite { return value < 0 ? "-inf" : "inf" }
        return "\(value)"
    }
}
