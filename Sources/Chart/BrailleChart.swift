// SPDX-License-Identifier: Apache-2.0
/// A chart of text: lines of braille dots, two by four a character, with axes. Pure.

public struct BrailleChart: Sendable {
    private let series: [Series]
    private let isLog: Bool
    private let columns: Int
    private let rows: Int

    /// - Parameters:
    ///   - columns: of the whole chart, in characters; at least 30.
    ///   - rows: of the whole chart, axis and legend too; at least 8.
    public init(_ series: [Series], isLog: Bool, columns: Int, rows: Int) {
        self.series = series
        self.isLog = isLog
        self.columns = max(30, columns)
        self.rows = max(8, rows)
    }

    /// - Parameter paint: the text in the colour of the n-th line.
    /// - Returns: the chart's lines, or nil if there is nothing to show.
    public func lines(paint: (String, Int) -> String = { text, _ in text }) -> [String]? {
        guard let range = ChartRange(series, isLog: isLog) else { return nil }
        // A row for the axis, one for its numbers, and the legend's.
        let legend = legendLines(paint)
        let plotRows = max(4, rows - 2 - legend.count)
        let y = Axis(range.y, isLog: isLog, count: max(2, plotRows / 4))
        let margin = max(4, y.ticks.map(\.label.count).max() ?? 0)
        let plotColumns = columns - margin - 2
        let x = Axis(range.x, count: max(2, plotColumns / 12))
        var canvas = Canvas(columns: plotColumns, rows: plotRows)
        for (index, line) in series.enumerated() { draw(line, index, x, y, &canvas) }

        var labels: [Int: String] = [:]
        for tick in y.ticks {
            let row = plotRows - 1 - Int((y.share(tick.value) * Double(plotRows - 1)).rounded())
            labels[row] = tick.label
        }
        var lines = (0..<plotRows).map { row in
            let label = labels[row] ?? ""
            let left = String(repeating: " ", count: margin - label.count) + label
            return left + (label.isEmpty ? " │" : " ┤") + canvas.text(row: row, paint: paint)
        }
        lines += axisLines(x, margin: margin, plotColumns: plotColumns, canvas: canvas)
        return lines + legend
    }

    private func draw(_ line: Series, _ index: Int, _ x: Axis, _ y: Axis, _ canvas: inout Canvas) {
        var last: (Int, Int)?
        for point in line.points {
            let column = Int((x.share(point.x) * Double(canvas.width - 1)).rounded())
            guard ChartRange.isShown(point.y, isLog: isLog) else {
                // The line stops here and continues after it: a gap. The axis shows where.
                canvas.mark(column: column / 2)
                last = nil
                continue
            }
            let row = canvas.height - 1 - Int((y.share(point.y) * Double(canvas.height - 1)).rounded())
            canvas.line(from: last ?? (column, row), to: (column, row), index)
            last = (column, row)
        }
    }

    private func axisLines(_ x: Axis, margin: Int, plotColumns: Int, canvas: Canvas) -> [String] {
        var axis = [Character](repeating: "─", count: plotColumns)
        var numbers = [Character](repeating: " ", count: columns)
        var free = 0
        for tick in x.ticks {
            let column = Int((x.share(tick.value) * Double(plotColumns - 1)).rounded())
            axis[column] = "┬"
            let start = min(columns - tick.label.count, margin + 2 + column - tick.label.count / 2)
            guard start >= free else { continue }
            for (offset, character) in tick.label.enumerated() { numbers[start + offset] = character }
            free = start + tick.label.count + 2
        }
        for column in canvas.marks { axis[column] = "×" }
        let left = String(repeating: " ", count: margin)
        return [left + " └" + String(axis), String(numbers).trimmedEnd]
    }

    /// Names after a piece of their line, as many in a row as have room, in at most a third of the rows; what is not
    /// shown is said.
    private func legendLines(_ paint: (String, Int) -> String) -> [String] {
        var lines: [(text: String, width: Int)] = []
        func add(_ text: String, width: Int) {
            if let last = lines.last, last.width + 3 + width <= columns {
                lines[lines.count - 1] = (last.text + "   " + text, last.width + 3 + width)
            } else {
                lines.append((text, width))
            }
        }
        var named = 0
        for (index, line) in series.enumerated() {
            let name = String(line.name.prefix(columns - 4))
            let before = lines
            add(paint("━━", index) + " " + name, width: name.count + 3)
            guard lines.count <= max(1, rows / 3) else {
                lines = before
                break
            }
            named += 1
        }
        if named < series.count {
            let words = "... and \(series.count - named) more"
            add(words, width: words.count)
        }
        if let words = ChartRange(series, isLog: isLog)?.unshownWords(isLog: isLog) { add(words, width: words.count) }
        return lines.map(\.text)
    }
}

/// Dots, and whose they are.
private struct Canvas {
    let columns: Int
    let rows: Int
    var width: Int { columns * 2 }
    var height: Int { rows * 4 }
    private var dots: [UInt8]
    private var owner: [Int]
    private(set) var marks: Set<Int> = []

    init(columns: Int, rows: Int) {
        self.columns = columns
        self.rows = rows
        dots = [UInt8](repeating: 0, count: columns * rows)
        owner = [Int](repeating: 0, count: columns * rows)
    }

    /// Unicode numbers the dots of a cell column by column, and the lowest two last.
    private static let bits: [[UInt8]] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]]

    private mutating func set(_ column: Int, _ row: Int, _ index: Int) {
        let cell = row / 4 * columns + column / 2
        dots[cell] |= Self.bits[column % 2][row % 4]
        owner[cell] = index
    }

    mutating func mark(column: Int) { marks.insert(column) }

    /// Bresenham's.
    mutating func line(from start: (Int, Int), to end: (Int, Int), _ index: Int) {
        var (x, y) = start
        let (dx, dy) = (abs(end.0 - x), -abs(end.1 - y))
        let (stepX, stepY) = (x < end.0 ? 1 : -1, y < end.1 ? 1 : -1)
        var error = dx + dy
        while true {
            set(x, y, index)
            if x == end.0, y == end.1 { return }
            let twice = 2 * error
            if twice >= dy {
                error += dy
                x += stepX
            }
            if twice <= dx {
                error += dx
                y += stepY
            }
        }
    }

    /// Runs of one line's cells are painted together.
    func text(row: Int, paint: (String, Int) -> String) -> String {
        var text = ""
        var run = ""
        var runOwner = 0
        for column in 0..<columns {
            let cell = row * columns + column
            if dots[cell] != 0, owner[cell] != runOwner, !run.isEmpty {
                text += paint(run, runOwner)
                run = ""
            }
            if dots[cell] != 0 { runOwner = owner[cell] }
            run.unicodeScalars.append(
                dots[cell] == 0 ? " " : Unicode.Scalar(0x2800 + UInt32(dots[cell])) ?? " ")
        }
        let end = run.trimmedEnd
        return text + (end.isEmpty ? "" : paint(end, runOwner))
    }
}

extension String {
    fileprivate var trimmedEnd: String {
        var text = self[...]
        while text.last == " " { text = text.dropLast() }
        return String(text)
    }
}
