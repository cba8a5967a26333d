// SPDX-License-Identifier: Apache-2.0
/// The chart as a PNG picture: drawn by anti-aliased strokes, letters too, at twice the size on a screen. Pure.
/// Source: PNG (Third Edition), W3C: signature, IHDR, IDAT with the filter byte of each line, IEND.
import CDeflate

public struct PNGChart: Sendable {
    private let series: [Series]
    private let isLog: Bool
    private let title: String

    /// Pixels for each unit of the SVG's size.
    private static let scale = 2.0

    public init(_ series: [Series], isLog: Bool, title: String) {
        self.series = series
        self.isLog = isLog
        self.title = title
    }

    /// nil if there is nothing to show.
    public func bytes() -> [UInt8]? {
        guard let layout = ChartLayout(series, isLog: isLog) else { return nil }
        var picture = Picture(width: Int(layout.width * Self.scale), height: Int(layout.height * Self.scale))
        draw(layout, on: &picture)
        return Self.encode(picture)
    }

    private func draw(_ layout: ChartLayout, on picture: inout Picture) {
        let black = Picture.Colour(hex: "#000000")
        let grey = Picture.Colour(hex: "#dddddd")
        func line(_ points: [(x: Double, y: Double)], width: Double, _ colour: Picture.Colour) {
            picture.stroke(
                points.map { ($0.x * Self.scale, $0.y * Self.scale) }, width: width * Self.scale, colour)
        }
        /// - Parameter anchor: where in the text `x` is, from 0, its beginning, to 1, its end.
        func text(_ text: String, _ x: Double, _ y: Double, anchor: Double, size: Double) {
            // In units of the chart for each of the font's.
            let unit = size / 10
            var left = x - anchor * (Double(text.count) * StrokeFont.advance - 2) * unit
            for character in text {
                for stroke in StrokeFont.strokes(character) {
                    line(
                        stroke.map { (left + $0.x * unit, y + ($0.y - StrokeFont.capHeight) * unit) },
                        width: size / 12, black)
                }
                left += StrokeFont.advance * unit
            }
        }
        text(
            fitting(title, layout.width / (1.6 * StrokeFont.advance)), layout.width / 2, 24, anchor: 0.5,
            size: 16)
        for tick in layout.yTicks {
            line([(layout.left, tick.place), (layout.right, tick.place)], width: 1, grey)
            text(tick.label, layout.left - 8, tick.place + 4, anchor: 1, size: 13)
        }
        for tick in layout.xTicks {
            line([(tick.place, layout.bottom), (tick.place, layout.bottom + 5)], width: 1, black)
            text(tick.label, tick.place, layout.bottom + 20, anchor: 0.5, size: 13)
        }
        text("update", (layout.left + layout.right) / 2, layout.bottom + 40, anchor: 0.5, size: 13)
        line(
            [(layout.left, layout.top), (layout.left, layout.bottom), (layout.right, layout.bottom)],
            width: 1, black)
        for (index, series) in series.enumerated() {
            let colour = Picture.Colour(hex: SVGChart.colours[index % SVGChart.colours.count])
            for piece in layout.pieces(series) { line(piece, width: 1.5, colour) }
            let place = layout.legend(index)
            line([(place.x, place.y - 4), (place.x + 18, place.y - 4)], width: 3, colour)
            text(
                fitting(series.name, 230 / (1.3 * StrokeFont.advance)), place.x + 24, place.y, anchor: 0,
                size: 13)
        }
        guard let words = layout.unshown else { return }
        let size = ChartLayout.markSize
        for place in layout.marks(series) {
            line([(place - size, layout.bottom - size), (place + size, layout.bottom + size)], width: 1.2, black)
            line([(place - size, layout.bottom + size), (place + size, layout.bottom - size)], width: 1.2, black)
        }
        let place = layout.unshownPlace(series.count)
        text(words, place.x, place.y, anchor: 0, size: 13)
    }

    /// The end is what tells runs' names and paths apart.
    private func fitting(_ text: String, _ count: Double) -> String {
        text.count > Int(count) ? "..." + text.suffix(max(0, Int(count) - 3)) : text
    }

    // MARK: The file

    private static func encode(_ picture: Picture) -> [UInt8] {
        var lines: [UInt8] = []
        lines.reserveCapacity(picture.height * (picture.width * 3 + 1))
        for row in 0..<picture.height {
            // No filter: most of a chart is white.
            lines.append(0)
            lines += picture.pixels[row * picture.width * 3..<(row + 1) * picture.width * 3]
        }
        var png: [UInt8] = [0x89, 0x50, 0x4E, 0x47, 0x0D, 0x0A, 0x1A, 0x0A]
        // 8 bits of red, green and blue each; no interlacing.
        chunk("IHDR", big(UInt32(picture.width)) + big(UInt32(picture.height)) + [8, 2, 0, 0, 0], to: &png)
        chunk("IDAT", compressed(lines), to: &png)
        chunk("IEND", [], to: &png)
        return png
    }

    private static func big(_ number: UInt32) -> [UInt8] {
        withUnsafeBytes(of: number.bigEndian) { Array($0) }
    }

    private static func chunk(_ type: String, _ body: [UInt8], to png: inout [UInt8]) {
        let typed = Array(type.utf8) + body
        png += big(UInt32(body.count)) + typed + big(libdeflate_crc32(0, typed, typed.count))
    }

    private static func compressed(_ bytes: [UInt8]) -> [UInt8] {
        guard let compressor = libdeflate_alloc_compressor(6) else {
            preconditionFailure("no memory to compress")
        }
        defer { libdeflate_free_compressor(compressor) }
        let bound = libdeflate_zlib_compress_bound(compressor, bytes.count)
        return [UInt8](unsafeUninitializedCapacity: bound) { buffer, count in
            count = libdeflate_zlib_compress(compressor, bytes, bytes.count, buffer.baseAddress, bound)
        }
    }
}
