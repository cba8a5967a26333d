// SPDX-License-Identifier: Apache-2.0
/// `tracker/summary.yaml`: of each key its best and its last value, as Noether's BaseTracker sums a run up
/// (noether/core/trackers/base.py, summarize_logvalues; noether/core/providers/metric_property.py). Runs on a disk queue, on a
/// snapshot of the columns.
///
/// On purpose two things differ: NaN and infinities are never the best value (Python's min and max keep a NaN that comes first, and
/// lose it elsewhere), so a key that has nothing else has only a last one; and so has a key whose values have no order among them
/// (BaseTracker raises).
import Posix
import Wire

package enum SummaryFile {
    static let name = "summary.yaml"

    static func write(_ log: LogColumns, in directory: Directory) throws(PosixError) {
        try DurableFile.write(name, bytes: Array(text(log).utf8), in: directory, faults: "summary")
    }

    /// Sorted by key, as yaml.safe_dump sorts.
    static func text(_ log: LogColumns) -> String {
        var lines: [(key: String, value: String)] = []
        for (id, key) in log.keys.enumerated() where isSummed(key) {
            guard let last = log.last(column: id) else { continue }
            let isHigherBetter = isHigherBetter(key)
            var best = Best(isHigherBetter: isHigherBetter)
            log.forEach(column: id) { _, tag, bits, tail in best.add(tag, bits, tail) }
            if let value = best.value {
                lines.append((key + (isHigherBetter ? "/max" : "/min"), YAMLText.scalar(value)))
            }
            lines.append((key + "/last", YAMLText.scalar(last)))
        }
        guard !lines.isEmpty else { return "{}\n" }
        // By code points, as Python does.
        lines.sort { $0.key.unicodeScalars.lexicographicallyPrecedes($1.key.unicodeScalars) }
        return lines.map { line in
            let key = YAMLText.key(line.key)
            // What is longer, with its tag (!!str), is no simple key (yaml/emitter.py, check_simple_key).
            return line.key.unicodeScalars.count + 5 < 128
                ? "\(key): \(line.value)\n" : "? \(key)\n: \(line.value)\n"
        }.joined()
    }

    // MARK: Keys

    /// Of these no value is better than another.
    private static let neutral = [
        "profiler/", "optim/", "profiling/", "ctx/", "loss_weight/", "gradient/", "detach/", "lossdiff/",
        "train_time/",
    ]

    package static func isSummed(_ key: String) -> Bool {
        let lower = Array(key.lowercased().utf8)
        return !["epoch", "update", "sample"].contains(key)
            && !neutral.contains { lower.starts(with: $0.utf8) }
    }

    /// The first of Noether's patterns that matches; where none does, higher is better.
    package static func isHigherBetter(_ key: String) -> Bool {
        let lower = Array(key.lowercased().utf8)
        return contains(lower, "accuracy") || !(contains(lower, "loss") || contains(lower, "error"))
    }

    /// By bytes: as characters, a letter and an accent behind it are another one.
    private static func contains(_ bytes: [UInt8], _ word: String) -> Bool {
        let word = Array(word.utf8)
        guard bytes.count >= word.count else { return false }
        return (0...bytes.count - word.count).contains { bytes[$0..<$0 + word.count].elementsEqual(word) }
    }
}

/// The smallest or largest of values, as Python orders them: numbers among one another, texts by code points; the first of equals.
private struct Best {
    private enum Value {
        case float(Double)
        case int(Int64)
        case large(LargeInteger)
        case text([UInt8])
        case none
    }

    let isHigherBetter: Bool
    private var found: (value: Value, scalar: ScalarBits)?
    private var isOrdered = true

    init(isHigherBetter: Bool) { self.isHigherBetter = isHigherBetter }

    /// nil where there is none.
    var value: ScalarBits? { isOrdered ? found?.scalar : nil }

    mutating func add(_ tag: ValueTag, _ bits: UInt64, _ tail: [UInt8]) {
        guard isOrdered else { return }
        let new: Value
        switch tag {
        case .float:
            let number = Double(bitPattern: bits)
            guard number.isFinite else { return }  // guard: nan-is-never-best (always)
            new = .float(number)
        case .int: new = .int(Int64(bitPattern: bits))
        case .bool: new = .int(Int64(bits))
        case .bigInt: new = .large(LargeInteger(twosComplement: tail))
        case .string: new = .text(tail)
        case .none: new = .none
        }
        if let found {
            let isBetter = isHigherBetter ? Self.isLess(found.value, new) : Self.isLess(new, found.value)
            guard let isBetter else {
                isOrdered = false
                return
            }
            guard isBetter else { return }
        }
        found = (new, ScalarBits(tag: tag, bits: tail.isEmpty ? bits : UInt64(tail.count), tail: tail[...]))
    }

    /// nil where they have no order.
    private static func isLess(_ first: Value, _ second: Value) -> Bool? {
        switch (first, second) {
        case (.float(let first), .float(let second)): first < second
        case (.int(let first), .int(let second)): first < second
        case (.text(let first), .text(let second)): first.lexicographicallyPrecedes(second)
        case (.none, _), (_, .none), (.text, _), (_, .text): nil
        case (.int(let first), .float(let second)): order(first, second) < 0
        case (.float(let first), .int(let second)): order(second, first) > 0
        case (.large(let first), .large(let second)): first.isLess(than: second)
        case (.large(let first), .int(let second)): first.isLess(than: LargeInteger(second))
        case (.int(let first), .large(let second)): LargeInteger(first).isLess(than: second)
        case (.large(let first), .float(let second)): first.double < second
        case (.float(let first), .large(let second)): first < second.double
        }
    }

    /// Exact, where a double does not hold every integer: below, at or above 0.
    private static func order(_ first: Int64, _ second: Double) -> Int {
        if second >= 0x1p63 { return -1 }
        if second < -0x1p63 { return 1 }
        let whole = Int64(second.rounded(.towardZero))
        if first != whole { return first < whole ? -1 : 1 }
        let rest = second - Double(whole)
        return rest > 0 ? -1 : rest < 0 ? 1 : 0
    }
}
