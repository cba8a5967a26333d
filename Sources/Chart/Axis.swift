// SPDX-License-Identifier: Apache-2.0
/// Where ticks go, and how their numbers read.

public struct Axis: Sendable {
    public let range: ClosedRange<Double>
    public let isLog: Bool
    public let ticks: [(value: Double, label: String)]

    /// - Parameter count: about so many ticks.
    public init(_ range: ClosedRange<Double>, isLog: Bool = false, count: Int) {
        self.range = range
        self.isLog = isLog
        ticks = isLog ? Self.decades(range, count) : Self.round(range, count)
    }

    /// From 0, at the range's beginning, to 1, and never outside. Halved, since the largest and the smallest number are
    /// further apart than any number is large.
    public func share(_ value: Double) -> Double {
        let (low, high) = (place(range.lowerBound), place(range.upperBound))
        let share = (place(value) - low) / (high - low)
        return share.isFinite ? max(0, min(1, share)) : 0
    }

    private func place(_ value: Double) -> Double {
        // What is not normal has too few digits to be halved.
        isLog ? log10(value) : range.upperBound > 1 || range.lowerBound < -1 ? value / 2 : value
    }

    /// Multiples of 1, 2 or 5 times a power of ten.
    private static func round(_ range: ClosedRange<Double>, _ count: Int) -> [(Double, String)] {
        guard range.upperBound > range.lowerBound, count > 0 else { return [] }
        let rough = range.upperBound / Double(count) - range.lowerBound / Double(count)
        let magnitude = powerOfTen(log10(rough).rounded(.down))
        let step = ([1, 2, 5, 10].first { $0 * magnitude >= rough } ?? 10) * magnitude
        // Of what is next to nothing, no tick is a round number.
        guard step >= .leastNormalMagnitude, step.isFinite else {
            return [range.lowerBound, range.upperBound].map { ($0, short($0)) }
        }
        var ticks: [(Double, String)] = []
        var index = (range.lowerBound / step).rounded(.up)
        while index * step <= range.upperBound + step * 1e-9, ticks.count < 100 {
            let value = index * step
            guard value.isFinite else { break }
            ticks.append((value, label(abs(value) < step * 1e-9 ? 0 : value, step: step)))
            index += 1
        }
        return ticks
    }

    /// Powers of ten; less than two of them in the range: its ends, and 1, 2 and 5 times those.
    private static func decades(_ range: ClosedRange<Double>, _ count: Int) -> [(Double, String)] {
        let (low, high) = (
            Int((log10(range.lowerBound) - 1e-9).rounded(.up)),
            Int((log10(range.upperBound) + 1e-9).rounded(.down))
        )
        if high - low < 1 {
            let values = stride(from: low - 2, through: high + 1, by: 1).flatMap { power in
                [1.0, 2, 5].map { $0 * powerOfTen(Double(power)) }
            }
            return values.filter { range.contains($0) && $0 > 0 }.map { ($0, label($0, step: $0)) }
        }
        let step = max(1, Int((Double(high - low) / Double(max(1, count))).rounded(.up)))
        return stride(from: low, through: high, by: step).map { power in
            (
                powerOfTen(Double(power)),
                (-3...4).contains(power)
                    ? label(powerOfTen(Double(power)), step: powerOfTen(Double(power))) : "1e\(power)"
            )
        }
    }

    /// As short as tells ticks of this distance apart: 12k, 0.25, 3e-05.
    static func label(_ value: Double, step: Double) -> String {
        let size = max(abs(value), abs(step))
        if value == 0 { return "0" }
        if size >= 1e6 || size < 1e-3 { return scientific(value, step: step) }
        if step >= 1000, value.truncatingRemainder(dividingBy: 1000) == 0 { return "\(Int(value) / 1000)k" }
        return fixed(value, decimals: max(0, -power(of: step, slack: 1e-9)))
    }

    private static func scientific(_ value: Double, step: Double) -> String {
        let digits = power(of: abs(value), slack: 1e-12) - power(of: step, slack: 1e-9)
        return scientific(value, decimals: min(6, max(0, digits)))
    }

    private static func scientific(_ value: Double, decimals: Int) -> String {
        var power = power(of: abs(value), slack: 1e-12)
        var mantissa = mantissa(value, power)
        if abs(mantissa) >= 9.9999999 {
            power += 1
            mantissa = Self.mantissa(value, power)
        }
        return fixed(mantissa, decimals: decimals) + "e\(power)"
    }

    /// The power of ten of a number's first digit; the least that a number has where it is none above 0.
    private static func power(of value: Double, slack: Double) -> Int {
        value > 0 && value.isFinite ? Int((log10(value) + slack).rounded(.down)) : -324
    }

    /// In two steps where that power of ten is less than any number.
    private static func mantissa(_ value: Double, _ power: Int) -> Double {
        power < -200 ? value * 1e200 / powerOfTen(Double(power + 200)) : value / powerOfTen(Double(power))
    }

    /// `1.23457e-05`.
    public static func short(_ value: Double) -> String {
        value == 0 || !value.isFinite ? fixed(value, decimals: 0) : scientific(value, decimals: 5)
    }

    public static func power(_ exponent: Int) -> Double { powerOfTen(Double(exponent)) }

    /// No Foundation for this: `String(format:)` is not in its small part.
    public static func fixed(_ value: Double, decimals: Int) -> String {
        let scale = powerOfTen(Double(decimals))
        let scaled = (abs(value) * scale).rounded()
        guard scaled < 1e18 else { return "\(value)" }
        let digits = String(Int(scaled))
        let sign = value < 0 && scaled > 0 ? "-" : ""
        guard decimals > 0 else { return sign + digits }
        let padded = String(repeating: "0", count: max(0, decimals + 1 - digits.count)) + digits
        return sign + padded.dropLast(decimals) + "." + padded.suffix(decimals)
    }
}
