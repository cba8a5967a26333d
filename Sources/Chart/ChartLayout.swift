// SPDX-License-Identifier: Apache-2.0
/// Where everything of a picture goes, in its units: the same for SVG and PNG. Pure.

struct ChartLayout {
    let width = 900.0
    let height: Double
    let left = 80.0
    let right = 880.0
    let top = 40.0
    let bottom = 450.0
    let xTicks: [(place: Double, label: String)]
    let yTicks: [(place: Double, label: String)]
    /// The text below the legend that says how many values are not shown; nil if all are shown.
    let unshown: String?
    private let x: Axis
    private let y: Axis
    private let isLog: Bool

    /// More points than this in a line are thinned: a picture has no room for them.
    private static let buckets = 1600

    /// nil if there is nothing to show.
    init?(_ series: [Series], isLog: Bool) {
        guard let range = ChartRange(series, isLog: isLog) else { return nil }
        self.isLog = isLog
        unshown = range.unshownWords(isLog: isLog)
        let rows = (series.count + 2) / 3 + (unshown == nil ? 0 : 1)
        height = 510 + Double(rows) * 20
        let x = Axis(range.x, count: 8)
        let y = Axis(range.y, isLog: isLog, count: 6)
        (self.x, self.y) = (x, y)
        let (left, right, top, bottom) = (left, right, top, bottom)
        xTicks = x.ticks.map { (left + x.share($0.value) * (right - left), $0.label) }
        yTicks = y.ticks.map { (bottom - y.share($0.value) * (bottom - top), $0.label) }
    }

    /// Of the n-th line's name.
    func legend(_ index: Int) -> (x: Double, y: Double) {
        (left + Double(index % 3) * 270, 514 + Double(index / 3) * 20)
    }

    /// Half of the width and of the height of a mark, `×` on the axis.
    static let markSize = 3.5
    /// Marks are further apart than this.
    private static let markDistance = 8.0

    /// The places on the axis of the marks that stand for values which the lines do not show, such as NaN.
    func marks(_ series: [Series]) -> [Double] {
        let places = series.lazy.flatMap(\.points).filter { !ChartRange.isShown($0.y, isLog: isLog) }
            .map { left + x.share($0.x) * (right - left) }
        // One for those that are so near that they would be a blot.
        let steps = Set(places.map { (($0 - left) / Self.markDistance).rounded() })
        return steps.sorted().map { min(right, left + $0 * Self.markDistance) }
    }

    /// The place of the text that says how many values are not shown.
    func unshownPlace(_ count: Int) -> (x: Double, y: Double) { (left, legend((count + 2) / 3 * 3).y) }

    /// The line in pieces, with a gap at each value that can't be shown.
    func pieces(_ series: Series) -> [[(x: Double, y: Double)]] {
        var pieces: [[(x: Double, y: Double)]] = []
        var isDown = false
        for point in series.thinned(to: Self.buckets).points {
            guard ChartRange.isShown(point.y, isLog: isLog) else {
                isDown = false
                continue
            }
            let place = (left + x.share(point.x) * (right - left), bottom - y.share(point.y) * (bottom - top))
            if isDown { pieces[pieces.count - 1].append(place) } else { pieces.append([place]) }
            isDown = true
        }
        return pieces
    }
}
