// SPDX-License-Identifier: Apache-2.0
/// Pixels, and lines on them. Pure.

struct Picture {
    struct Colour {
        var parts: (red: Double, green: Double, blue: Double)

        /// - Parameter hex: `#rrggbb`.
        init(hex: String) {
            let number = UInt32(hex.dropFirst(), radix: 16) ?? 0
            parts = (Double(number >> 16 & 255), Double(number >> 8 & 255), Double(number & 255))
        }
    }

    let width: Int
    let height: Int
    /// Red, green, blue of each pixel, row by row; white at first.
    private(set) var pixels: [UInt8]

    init(width: Int, height: Int) {
        self.width = width
        self.height = height
        pixels = [UInt8](repeating: 255, count: width * height * 3)
    }

    /// A polyline with round ends and joints, in pixels. Each of its pieces is drawn once; a single point is a dot.
    mutating func stroke(_ points: [(x: Double, y: Double)], width: Double, _ colour: Colour) {
        guard let first = points.first else { return }
        if points.count == 1 { return segment(first, first, width / 2, colour) }
        for (start, end) in zip(points, points.dropFirst()) { segment(start, end, width / 2, colour) }
    }

    private mutating func segment(
        _ start: (x: Double, y: Double), _ end: (x: Double, y: Double), _ radius: Double, _ colour: Colour
    ) {
        let reach = radius + 1
        let (dx, dy) = (end.x - start.x, end.y - start.y)
        let length = dx * dx + dy * dy
        let rows = clamped(min(start.y, end.y) - reach, max(start.y, end.y) + reach, height)
        for row in rows {
            // Of a long line only what lies near this row: a chart is full of steep and flat ones.
            let y = Double(row) + 0.5
            var (low, high) = (min(start.x, end.x) - reach, max(start.x, end.x) + reach)
            if abs(dy) > 1 {
                let (a, b) = (
                    start.x + dx * (y - reach - start.y) / dy, start.x + dx * (y + reach - start.y) / dy
                )
                let slack = reach
                (low, high) = (max(low, min(a, b) - slack), min(high, max(a, b) + slack))
            }
            for column in clamped(low, high, width) {
                let x = Double(column) + 0.5
                let along =
                    length == 0 ? 0 : max(0, min(1, ((x - start.x) * dx + (y - start.y) * dy) / length))
                let (nearX, nearY) = (start.x + along * dx - x, start.y + along * dy - y)
                let distance = (nearX * nearX + nearY * nearY).squareRoot()
                // How much of the pixel is covered, about.
                blend(row, column, colour, max(0, min(1, radius + 0.5 - distance)))
            }
        }
    }

    private func clamped(_ low: Double, _ high: Double, _ limit: Int) -> Range<Int> {
        guard high >= 0, low < Double(limit), low <= high else { return 0..<0 }
        return Int(max(0, low))..<min(limit, Int(min(high, Double(limit))) + 1)
    }

    private mutating func blend(_ row: Int, _ column: Int, _ colour: Colour, _ share: Double) {
        guard share > 0 else { return }
        let at = (row * width + column) * 3
        func mixed(_ old: UInt8, _ new: Double) -> UInt8 {
            UInt8((Double(old) * (1 - share) + new * share).rounded())
        }
        pixels[at] = mixed(pixels[at], colour.parts.red)
        pixels[at + 1] = mixed(pixels[at + 1], colour.parts.green)
        pixels[at + 2] = mixed(pixels[at + 2], colour.parts.blue)
    }
}
