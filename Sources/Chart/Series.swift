// SPDX-License-Identifier: Apache-2.0
/// One line of a chart: values over updates, in order. NaN is a gap, and shown as one.

public struct Series: Sendable {
    public var name: String
    public var points: [(x: Double, y: Double)]

    public init(_ name: String, _ points: [(x: Double, y: Double)]) {
        self.name = name
        self.points = points
    }

    /// A shorter series that looks the same in a picture. The series is divided into `buckets` parts, and at most five
    /// points of each part stay: the first, the lowest, the highest, the last, and one that can't be shown, if there is
    /// one, so that gaps stay.
    public func thinned(to buckets: Int) -> Series {
        guard let parts = parts(buckets) else { return self }
        return Series(
            name,
            parts.flatMap { part in
                let shown = part.filter { points[$0].y.isFinite }
                let wanted = [
                    part.lowerBound, part.upperBound - 1,
                    shown.min { points[$0].y < points[$1].y } ?? part.lowerBound,
                    shown.max { points[$0].y < points[$1].y } ?? part.lowerBound,
                    part.first { !points[$0].y.isFinite } ?? part.lowerBound,
                ]
                return Set(wanted).sorted().map { points[$0] }
            })
    }

    /// The average of each of the parts that `thinned` takes points of, at its middle, and of how many values it is:
    /// what is not finite is left out. nil where `thinned` leaves all points.
    public func averages(of buckets: Int) -> [(x: Double, y: Double, count: Int)]? {
        parts(buckets)?.compactMap { part in
            let shown = part.filter { points[$0].y.isFinite }
            guard !shown.isEmpty else { return nil }
            // Each divided first: a sum of large numbers is infinite.
            let average = shown.reduce(0) { $0 + points[$1].y / Double(shown.count) }
            return (points[shown[shown.count / 2]].x, average, shown.count)
        }
    }

    /// nil if it is so short that no part needs to lose a point.
    private func parts(_ buckets: Int) -> [Range<Int>]? {
        guard points.count > 4 * buckets, let first = points.first, let last = points.last, last.x > first.x
        else { return nil }
        func bucket(_ index: Int) -> Int {
            // What is at the end belongs to the last part.
            min(buckets - 1, Int((points[index].x - first.x) / (last.x - first.x) * Double(buckets)))
        }
        var parts: [Range<Int>] = []
        var start = points.startIndex
        while start < points.endIndex {
            let number = bucket(start)
            var end = start + 1
            while end < points.endIndex, bucket(end) == number { end += 1 }
            parts.append(start..<end)
            start = end
        }
        return parts
    }

    /// An exponential moving average, debiased as Adam's moments are: the first values are not pulled towards zero.
    /// What is not finite stays as it is, and the average continues after it.
    /// - Parameter weight: of what was before, from 0 (as it is) to below 1.
    public func smoothed(_ weight: Double) -> Series {
        guard weight > 0 else { return self }
        var average = 0.0
        var bias = 1.0
        return Series(
            name,
            points.map { point in
                guard point.y.isFinite else { return point }
                average = weight * average + (1 - weight) * point.y
                bias *= weight
                return (point.x, average / (1 - bias))
            })
    }
}

/// What all lines of a chart together need of its axes.
public struct ChartRange: Sendable, Equatable {
    public var x: ClosedRange<Double>
    public var y: ClosedRange<Double>
    /// Values that the chart can't show in their place: NaN, infinities, and at most 0 on a logarithmic axis.
    public var unshown: Int

    /// nil if there is nothing to show.
    public init?(_ series: [Series], isLog: Bool) {
        var x: ClosedRange<Double>?
        var y: ClosedRange<Double>?
        unshown = 0
        for point in series.lazy.flatMap(\.points) {
            x = x.map { min($0.lowerBound, point.x)...max($0.upperBound, point.x) } ?? point.x...point.x
            guard Self.isShown(point.y, isLog: isLog) else {
                unshown += 1
                continue
            }
            y = y.map { min($0.lowerBound, point.y)...max($0.upperBound, point.y) } ?? point.y...point.y
        }
        guard let x, let y else { return nil }
        // Far from 0 a number and the next one are more than 1 apart.
        self.x = Self.widened(x, by: max(0.5, abs(x.lowerBound) * 1e-12))
        // A constant gets room around it.
        self.y = isLog ? y : Self.widened(y, by: max(abs(y.lowerBound) * 0.1, 1e-12))
        if isLog, y.lowerBound == y.upperBound {
            let low = max(.leastNonzeroMagnitude, y.lowerBound / 2)
            self.y = low...min(.greatestFiniteMagnitude, y.upperBound * 2)
        }
    }

    /// The text of a chart about the values that it does not show; nil if there are none.
    func unshownWords(isLog: Bool) -> String? {
        guard unshown > 0 else { return nil }
        let why = isLog ? "NaN, infinite or not positive" : "NaN or infinite"
        return "× \(unshown) value\(unshown == 1 ? "" : "s") not shown (\(why))"
    }

    static func isShown(_ value: Double, isLog: Bool) -> Bool { value.isFinite && (!isLog || value > 0) }

    private static func widened(_ range: ClosedRange<Double>, by amount: Double) -> ClosedRange<Double> {
        range.lowerBound == range.upperBound
            ? max(
                -.greatestFiniteMagnitude, range.lowerBound - amount)...min(
                    .greatestFiniteMagnitude, range.upperBound + amount) : range
    }
}
