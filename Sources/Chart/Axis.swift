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

    /// From 0, at the range's beginning, to 1.
    public func share(_ value: Double) -> Double {
        let (low, high) = (place(range.lowerBound), place(range.upperBound))
        return (place(value) - low) / (high - low)
    }

    private func place(_ value: Double) -> Double { isLog ? log10(value) : value }

    /// Multiples of 1, 2 or 5 times a power of ten.
    private static func round(_ range: ClosedRange<Double>, _ count: Int) -> [(Double, String)] {
        let span = range.upperBound - range.lowerBound
        guard span > 0, span.isFinite, count > 0 else { return [] }
        let rough = span / Double(count)
        let magnitude = powerOfTen(log10(rough).rounded(.down))
        let step = ([1, 2, 5, 10].first { $0 * magnitude >= rough } ?? 10) * magnitude
        var ticks: [(Double, String)] = []
        var index = (range.lowerBound / step).rounded(.up)
        while index * step <= range.upperBound + step * 1e-9, ticks.count < 100 {
            let value = index * step
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
            return values.filter { range.contains($0) }.map { ($0, label($0, step: $0)) }
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
        let decimals = max(0, Int(-(log10(step) + 1e-9).rounded(.down)))
        return fixed(value, decimals: decimals)
    }

    private static func scientific(_ value: Double, step: Double) -> String {
        var power = Int((log10(abs(value)) + 1e-12).rounded(.down))
        let stepPower = Int((log10(step) + 1e-9).rounded(.down))
        var mantissa = value / powerOfTen(Double(power))
        if abs(mantissa) >= 9.9999999 {
            power += 1
            mantissa = value / powerOfTen(Double(power))
        }
        return fixed(mantissa, decimals: min(6, max(0, power - stepPower))) + "e\(power)"
    }

    /// `1.23457e-05`.
    public static func short(_ value: Double) -> String {
        value == 0 ? "0" : scientific(value, step: abs(value) * 1e-5)
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
