// SPDX-License-Identifier: Apache-2.0
/// One line of a chart: values over updates, in order. NaN is a gap, and shown as one.

public struct Series: Sendable {
    public var name: String
    public var points: [(x: Double, y: Double)]

    public init(_ name: String, _ points: [(x: Double, y: Double)]) {
        self.name = name
        self.points = points
    }

    /// With at most four points in each of so many parts of its length: the first, the lowest, the highest and the
    /// last; and one for what can't be shown, if there is some, so that gaps stay. A picture of it is the same.
    public func thinned(to buckets: Int) -> Series {
        guard points.count > 4 * buckets, let first = points.first, let last = points.last, last.x > first.x
        else { return self }
        var kept: [(x: Double, y: Double)] = []
        var start = points.startIndex
        while start < points.endIndex {
            let bucket = Int((points[start].x - first.x) / (last.x - first.x) * Double(buckets))
            var end = start + 1
            while end < points.endIndex,
                Int((points[end].x - first.x) / (last.x - first.x) * Double(buckets)) == bucket
            { end += 1 }
            let part = points[start..<end]
            let shown = part.indices.filter { points[$0].y.isFinite }
            let wanted = [
                start, end - 1, shown.min { points[$0].y < points[$1].y } ?? start,
                shown.max { points[$0].y < points[$1].y } ?? start,
                part.indices.first { !points[$0].y.isFinite } ?? start,
            ]
            kept += Set(wanted).sorted().map { points[$0] }
            start = end
        }
        return Series(name, kept)
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

    /// What a chart says of them; nil if there are none.
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
