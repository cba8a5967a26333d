// SPDX-License-Identifier: Apache-2.0
import Testing

@testable import Chart

@Suite struct ChartTests {
    @Test func smoothingIsDebiasedAndGoesOnBehindNaN() {
        let smoothed = Series("a", [(0, 2), (1, 2), (2, .nan), (3, 4)]).smoothed(0.5).points.map(\.y)
        #expect(smoothed[0] == 2 && smoothed[1] == 2 && smoothed[2].isNaN)
        // (0.5^2 * 0.5 * 2 + 0.5 * 0.5 * 2 + 0.5 * 4) / (1 - 0.5^3)
        #expect(abs(smoothed[3] - (0.25 + 0.5 + 2) / 0.875) < 1e-12)
    }

    @Test(arguments: [
        (0.0...1.0, false, ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.0...12_000.0, false, ["0", "5k", "10k"]),
        (1.0...1.5, false, ["1.0", "1.1", "1.2", "1.3", "1.4", "1.5"]),
        (0.001...100.0, true, ["0.001", "0.01", "0.1", "1", "10", "100"]),
        (-3e-5...2e-5, false, ["-3e-5", "-2e-5", "-1e-5", "0", "1e-5", "2e-5"]),
    ])
    func ticksAreRound(range: ClosedRange<Double>, isLog: Bool, labels: [String]) {
        #expect(Axis(range, isLog: isLog, count: labels.count == 3 ? 3 : 5).ticks.map(\.label) == labels)
    }

    @Test func aLineGoesFromCornerToCorner() throws {
        let up = Series("up", (0...100).map { (Double($0), Double($0)) })
        let lines = try #require(BrailleChart([up], isLog: false, columns: 40, rows: 10).lines())
        #expect(
            lines == [
                " 100 ┤                             ⢀⡠⠤⠒⠋",
                "     │                        ⢀⡠⠤⠒⠋⠁",
                "     │                   ⢀⣀⠤⠒⠋⠁",
                "  50 ┤              ⢀⣠⠤⠒⠋⠁",
                "     │         ⢀⣠⠤⠒⠉⠁",
                "     │    ⢀⣠⠤⠒⠊⠁",
                "   0 ┤⣠⠤⠒⠊⠁",
                "     └┬────────────────┬───────────────┬",
                "      0               50             100",
                "━━ up",
            ])
    }

    @Test func gapsAreLeftAndMarked() throws {
        let values = (0..<100).map { (Double($0), (40..<60).contains($0) ? Double.nan : 1) }
        let lines = try #require(
            BrailleChart([Series("a", values)], isLog: false, columns: 60, rows: 12).lines())
        let line = try #require(
            lines.first { $0.unicodeScalars.contains { (0x2801...0x28FF).contains($0.value) } })
        #expect(line.contains("  ") && line.split(separator: " ").count >= 3)
        #expect(lines.contains { $0.contains("××") })
        #expect(lines.last?.contains("× 20 values not shown") == true)
    }

    @Test func nothingToShowIsNil() {
        #expect(BrailleChart([Series("a", [(0, .nan)])], isLog: false, columns: 40, rows: 10).lines() == nil)
        #expect(BrailleChart([Series("a", [(0, -1)])], isLog: true, columns: 40, rows: 10).lines() == nil)
        #expect(SVGChart([], isLog: false, title: "").text() == nil)
    }

    @Test func svgEscapesAndBreaksAtNaN() throws {
        let text = try #require(
            SVGChart([Series("a<b", [(0, 1), (1, 2), (2, .nan), (3, 1)])], isLog: false, title: "R&D").text())
        #expect(text.contains("a&lt;b") && text.contains("R&amp;D") && !text.contains("nan"))
        // Two pieces: a line, and a dot behind the gap.
        #expect(text.contains("d=\"M80 450L346.67 40M880 450h0\""))
    }

    /// A million points look as they are: extremes and gaps stay.
    @Test func thinningKeepsExtremesAndGaps() {
        var points = (0..<100_000).map { (x: Double($0), y: Double($0 % 7)) }
        points[43_210].y = 99
        points[43_211].y = -99
        points[70_000].y = .nan
        points[99_999].y = .infinity
        let thin = Series("a", points).thinned(to: 100).points
        #expect(thin.count <= 501 && thin.count >= 300)
        #expect(thin.contains { $0 == (43_210, 99) } && thin.contains { $0 == (43_211, -99) })
        #expect(thin.contains { $0.x == 70_000 && $0.y.isNaN } && thin.contains { $0.y == .infinity })
        #expect(zip(thin, thin.dropFirst()).allSatisfy { $0.x < $1.x })
    }

    @Test func averagesOfPartsCountEachNumberOnce() {
        var points = (0..<1000).map { (x: Double($0), y: Double($0 % 10)) }
        #expect(Series("a", points).averages(of: 250) == nil)
        points[3].y = .nan
        points[999].y = .greatestFiniteMagnitude
        points[998].y = .greatestFiniteMagnitude
        guard let averages = Series("a", points).averages(of: 100) else { return #expect(Bool(false)) }
        #expect(averages.count == 100 && averages.reduce(0) { $0 + $1.count } == 999)
        #expect(averages.allSatisfy { $0.y.isFinite })
        let first = points.prefix(10).filter { $0.y.isFinite }.reduce(0) { $0 + $1.y } / 9
        #expect(abs(averages[0].y - first) < 1e-12)
    }

    @Test func everyLetterOfASCIIHasStrokes() {
        // What is not known is a box.
        let box = "\(StrokeFont.strokes("日"))"
        for code in UInt8(0x21)...0x7E {
            let character = Character(Unicode.Scalar(code))
            let strokes = StrokeFont.strokes(character)
            #expect(!strokes.isEmpty && strokes.allSatisfy { $0.count > 1 }, "\(character)")
            #expect("\(strokes)" != box, "\(character)")
        }
        #expect(StrokeFont.strokes(" ").isEmpty)
    }
}
