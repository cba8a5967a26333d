// SPDX-License-Identifier: Apache-2.0
/// The same chart as an SVG file: vector lines, no script, no outside references. Pure.

public struct SVGChart: Sendable {
    private let series: [Series]
    private let isLog: Bool
    private let title: String

    /// Okabe and Ito's colours: told apart also by who does not see red and green apart.
    public static let colours = [
        "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442",
    ]

    public init(_ series: [Series], isLog: Bool, title: String) {
        self.series = series
        self.isLog = isLog
        self.title = title
    }

    /// nil if there is nothing to show.
    public func text() -> String? {
        guard let layout = ChartLayout(series, isLog: isLog) else { return nil }
        let middle = n((layout.left + layout.right) / 2)
        let (left, right, top, bottom) = (n(layout.left), n(layout.right), n(layout.top), n(layout.bottom))
        var out = """
            <svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 \(n(layout.width)) \(n(layout.height))" \
            font-family="system-ui, sans-serif" font-size="13">
            <rect width="100%" height="100%" fill="white"/>
            <text x="\(n(layout.width / 2))" y="24" text-anchor="middle" font-size="16">\(escaped(title))</text>

            """
        for tick in layout.yTicks {
            out += """
                <line x1="\(left)" x2="\(right)" y1="\(n(tick.place))" y2="\(n(tick.place))" stroke="#dddddd"/>
                <text x="\(n(layout.left - 8))" y="\(n(tick.place + 4))" text-anchor="end">\(tick.label)</text>

                """
        }
        for tick in layout.xTicks {
            let place = n(tick.place)
            out += """
                <line x1="\(place)" x2="\(place)" y1="\(bottom)" y2="\(n(layout.bottom + 5))" stroke="black"/>
                <text x="\(place)" y="\(n(layout.bottom + 20))" text-anchor="middle">\(tick.label)</text>

                """
        }
        out += """
            <path d="M\(left) \(top)V\(bottom)H\(right)" fill="none" stroke="black"/>
            <text x="\(middle)" y="\(n(layout.bottom + 40))" text-anchor="middle">update</text>

            """
        for (index, line) in series.enumerated() {
            let colour = Self.colours[index % Self.colours.count]
            let place = layout.legend(index)
            let path = layout.pieces(line).map(path).joined()
            out += """
                <path d="\(path)" fill="none" stroke="\(colour)" stroke-width="1.5" \
                stroke-linejoin="round" stroke-linecap="round"/>
                <path d="M\(n(place.x)) \(n(place.y - 4))h18" stroke="\(colour)" stroke-width="3"/>
                <text x="\(n(place.x + 24))" y="\(n(place.y))">\(escaped(line.name))</text>

                """
        }
        if let words = layout.unshown {
            let twice = n(2 * ChartLayout.markSize)
            let marks = layout.marks(series).map { place in
                let start = "M\(n(place - ChartLayout.markSize)) \(n(layout.bottom - ChartLayout.markSize))"
                return start + "l\(twice) \(twice)m0 -\(twice)l-\(twice) \(twice)"
            }
            let place = layout.unshownPlace(series.count)
            out += """
                <path class="unshown" d="\(marks.joined())" fill="none" stroke="black" stroke-width="1.2"/>
                <text x="\(n(place.x))" y="\(n(place.y))">\(escaped(words))</text>

                """
        }
        return out + "</svg>\n"
    }

    /// One point alone is a dot: round ends.
    private func path(_ piece: [(x: Double, y: Double)]) -> String {
        guard let first = piece.first else { return "" }
        return piece.dropFirst().reduce("M\(n(first.x)) \(n(first.y))" + (piece.count == 1 ? "h0" : "")) {
            $0 + "L\(n($1.x)) \(n($1.y))"
        }
    }

    private func n(_ value: Double) -> String {
        let text = Axis.fixed(value, decimals: 2)
        return text.hasSuffix(".00") ? String(text.dropLast(3)) : text
    }

    private func escaped(_ text: String) -> String {
        text.reduce(into: "") { out, character in
            switch character {
            case "&": out += "&amp;"
            case "<": out += "&lt;"
            case ">": out += "&gt;"
            case "\"": out += "&quot;"
            // What XML 1.0 does not know.
            case _ where character.unicodeScalars.contains { $0.value < 32 }: out += "\u{FFFD}"
            default: out.append(character)
            }
        }
    }
}
