// SPDX-License-Identifier: Apache-2.0
/// Columns of text. On a terminal that is too narrow the ones that can be missed go, and then long names lose their
/// middle.
import Posix

struct Table {
    struct Column {
        var title: String
        var right = false
        /// Gives way if there is too little room: a name or a path.
        var isName = false
        /// Above 0: left out if there is too little room, the highest first.
        var canBeMissed = 0
    }

    struct Cell {
        var text: String
        var colour: Text.Colour?

        init(_ text: String, _ colour: Text.Colour? = nil) {
            self.text = Text.printable(text)
            self.colour = colour
        }
    }

    private static let gap = 2
    private static let shortestName = 12

    private var columns: [Column]
    private var rows: [[Cell]] = []

    init(_ columns: [Column]) { self.columns = columns }

    mutating func add(_ row: [Cell]) { rows.append(row) }

    /// - Parameter width: of the whole, in columns; nil: as wide as it is.
    /// - Returns: the columns that are shown, and how wide each one is.
    private func fitted(to width: Int?) -> (shown: [Int], widths: [Int]) {
        var widths = columns.indices.map { index in
            rows.reduce(Text.width(columns[index].title)) { max($0, Text.width($1[index].text)) }
        }
        var shown = Array(columns.indices)
        if let width {
            func excess() -> Int {
                shown.reduce(-Self.gap) { $0 + widths[$1] + Self.gap } - width
            }
            /// What names can give, down to their shortest.
            func slack() -> Int {
                shown.reduce(0) { $0 + (columns[$1].isName ? max(0, widths[$1] - 2 * Self.shortestName) : 0) }
            }
            while excess() > slack(),
                let least = shown.filter({ columns[$0].canBeMissed > 0 }).max(by: {
                    columns[$0].canBeMissed < columns[$1].canBeMissed
                })
            {
                shown.removeAll { $0 == least }
            }
            while excess() > 0,
                let longest = shown.filter({ columns[$0].isName && widths[$0] > Self.shortestName }).max(by: {
                    widths[$0] < widths[$1]
                })
            {
                widths[longest] -= 1
            }
            if excess() > 0, let last = shown.last { widths[last] = max(4, widths[last] - excess()) }
        }
        return (shown, widths)
    }

    /// - Parameter width: of the whole, in columns; nil: as wide as it is.
    func lines(width: Int?) -> [String] {
        let (shown, widths) = fitted(to: width)
        let title = columns.map { Cell($0.title, .bold) }
        return ([title] + rows).map { row in
            var line = ""
            for index in shown {
                let column = columns[index]
                let text =
                    column.isName
                    ? Text.clippedInTheMiddle(row[index].text, widths[index])
                    : Text.clipped(row[index].text, widths[index])
                let isLast = index == shown.last
                let space = String(repeating: " ", count: max(0, widths[index] - Text.width(text)))
                let painted = Text.paint(text, row[index].colour)
                line += column.right ? space + painted : painted + (isLast ? "" : space)
                if !isLast { line += String(repeating: " ", count: Self.gap) }
            }
            return line
        }
    }

    var columnCount: Int { columns.count }

    /// For the page of `report`.
    /// - Parameter limit: of the columns, the first ones.
    func json(columns limit: Int) -> String {
        func object(_ cell: Cell) -> String {
            Text.json(object: [("text", Text.json(cell.text)), ("colour", cell.colour.map { Text.json("\($0)") })])
        }
        return Text.json(object: [
            (
                "columns",
                Text.json(
                    array: columns.prefix(limit).map {
                        Text.json(object: [("title", Text.json($0.title)), ("right", $0.right ? "true" : "false")])
                    })
            ),
            ("rows", Text.json(array: rows.map { Text.json(array: $0.prefix(limit).map(object)) })),
        ])
    }

    /// - Parameter saysWhatIsMissing: whether it ends with the titles of the columns that have no room.
    func print(saysWhatIsMissing: Bool = false) {
        let width = Terminal.isTerminal ? Terminal.width : nil
        for line in lines(width: width) { Swift.print(line) }
        let missing = saysWhatIsMissing ? Set(columns.indices).subtracting(fitted(to: width).shown) : []
        guard !missing.isEmpty else { return }
        let titles = missing.sorted().map { columns[$0].title }.joined(separator: ", ")
        Swift.print(Text.paint(Text.clipped("no room here for \(titles) (--json has all)", width ?? .max), .dim))
    }
}
