// SPDX-License-Identifier: Apache-2.0
/// A run's log in memory: one column a key, 8 bytes a value, and the types as runs. Chunks stay where they are, so a
/// growing log never copies what it has; a value type, so a snapshot for the disk costs nothing.
public import Wire

public struct LogColumns: Sendable {
    static let chunkValues = 4096

    /// Values in chunks that stay where they are: the first ones double, since most columns are short, up to `chunkValues`.
    /// An array that grows would leave a smaller one behind each time: as much as a short column holds.
    struct Chunked<Element: Sendable>: Sendable {
        static var firstValues: Int { 64 }
        /// The chunks that double hold `chunkValues` together.
        private static var doubling: Int { (LogColumns.chunkValues / firstValues).trailingZeroBitCount + 1 }

        private var chunks: [[Element]] = []
        private(set) var count = 0

        /// Which chunk holds a value, and the first one in that chunk.
        private static func place(of index: Int) -> (chunk: Int, first: Int) {
            if index >= LogColumns.chunkValues {
                let whole = index / LogColumns.chunkValues
                return (doubling + whole - 1, whole * LogColumns.chunkValues)
            }
            guard index >= firstValues else { return (0, 0) }
            let power = Int.bitWidth - 1 - index.leadingZeroBitCount
            return (power - firstValues.trailingZeroBitCount + 1, 1 << power)
        }

        mutating func append(_ value: Element) {
            let (chunk, first) = Self.place(of: count)
            if chunk == chunks.count {
                chunks.append([])
                chunks[chunk].reserveCapacity(min(LogColumns.chunkValues, max(Self.firstValues, first)))
            }
            chunks[chunk].append(value)
            count += 1
        }

        mutating func removeLast() {
            count -= 1
            chunks[Self.place(of: count).chunk].removeLast()
        }

        subscript(index: Int) -> Element {
            let (chunk, first) = Self.place(of: index)
            return chunks[chunk][index - first]
        }

        /// The chunk that holds a value, and which value is its first.
        func chunk(holding index: Int) -> (values: [Element], first: Int) {
            let (chunk, first) = Self.place(of: index)
            return (chunks[chunk], first)
        }
    }

    /// How many values each row has: the same from row to row, mostly.
    struct Widths: Sendable {
        private var runs: [(from: Int, width: Int)] = []

        /// - Returns: how many bytes that took.
        mutating func append(_ width: Int, row: Int) -> Int {
            guard runs.last?.width != width else { return 0 }
            runs.append((row, width))
            return MemoryLayout<(from: Int, width: Int)>.stride
        }

        /// The last row has another width now.
        /// - Returns: how many bytes more that takes.
        mutating func changeLast(to width: Int, row: Int) -> Int {
            guard runs.last?.from == row else { return append(width, row: row) }
            runs.removeLast()
            return append(width, row: row) - MemoryLayout<(from: Int, width: Int)>.stride
        }

        subscript(row: Int) -> Int { runs[partition(of: runs) { $0.from <= row } - 1].width }
    }

    /// When each row was logged, to the millisecond: half of what a Double takes.
    struct WallTimes: Sendable {
        /// Milliseconds behind the base of the last one that is not behind the row.
        private var milliseconds = Chunked<UInt32>()
        private var bases: [(from: Int, seconds: Double)] = []

        mutating func append(_ said: Double) {
            // What is no time can't be compared or shown: as if nothing was said.
            let seconds = said.isFinite ? said : 0
            if let since = since(seconds) { return milliseconds.append(since) }
            // The first one, one that is 49 days behind it, or a clock that was set back.
            bases.append((milliseconds.count, seconds))
            milliseconds.append(0)
        }

        private func since(_ seconds: Double) -> UInt32? {
            bases.last.flatMap { UInt32(exactly: ((seconds - $0.seconds) * 1000).rounded()) }
        }

        subscript(row: Int) -> Double {
            let base = bases[partition(of: bases) { $0.from <= row } - 1].seconds
            return base + Double(milliseconds[row]) / 1000
        }
    }

    /// Which rows a column has values in: runs of (first row, stride, count), since keys come each update or each k-th.
    struct Rows: Sendable {
        struct Segment: Sendable {
            var first: Int
            var stride: Int
            var count: Int
            /// Values before this segment.
            var before: Int
        }
        private(set) var segments: [Segment] = []

        /// Calls `visit` with each row of the range and the position of its value.
        func forEach(in range: Range<Int>, _ visit: (Int, Int) -> Void) {
            for segment in segments.dropFirst(
                max(0, partition(of: segments) { $0.first <= range.lowerBound } - 1))
            {
                var step = (max(0, range.lowerBound - segment.first) + segment.stride - 1) / segment.stride
                while step < segment.count {
                    let row = segment.first + step * segment.stride
                    guard row < range.upperBound else { return }
                    visit(row, segment.before + step)
                    step += 1
                }
            }
        }

        mutating func append(_ row: Int) {
            if var last = segments.last {
                if last.count == 1 { last.stride = row - last.first }
                if row == last.first + last.stride * last.count {
                    last.count += 1
                    segments[segments.count - 1] = last
                    return
                }
                segments.append(Segment(first: row, stride: 1, count: 1, before: last.before + last.count))
            } else {
                segments.append(Segment(first: row, stride: 1, count: 1, before: 0))
            }
        }

        /// The row of the last value.
        var last: Int? { segments.last.map { $0.first + $0.stride * ($0.count - 1) } }

        mutating func removeLast() {
            segments[segments.count - 1].count -= 1
            if segments[segments.count - 1].count == 0 { segments.removeLast() }
        }

        /// The one that holds the n-th value.
        func segment(of index: Int) -> Segment {
            segments[partition(of: segments) { $0.before <= index } - 1]
        }

        /// The row of the n-th value.
        subscript(index: Int) -> Int {
            let segment = segment(of: index)
            return segment.first + segment.stride * (index - segment.before)
        }

        /// The position of a row's value in the column.
        func index(ofRow row: Int) -> Int? {
            let position = partition(of: segments) { $0.first <= row } - 1
            guard position >= 0 else { return nil }
            let segment = segments[position]
            let (steps, rest) = (row - segment.first).quotientAndRemainder(dividingBy: max(1, segment.stride))
            return rest == 0 && steps < segment.count ? segment.before + steps : nil
        }
    }

    struct Column: Sendable {
        var values = Chunked<UInt64>()
        var rows = Rows()
        /// (first value of this tag, tag), ascending.
        var tags: [(from: Int, tag: ValueTag)] = []
        /// Bytes of strings and big integers; `values` holds their index here.
        var tails: [[UInt8]] = []

        /// - Returns: about how many bytes that took.
        mutating func append(_ scalar: ScalarBits, row: Int) -> Int {
            var byteCount = MemoryLayout<UInt64>.size
            if tags.last?.tag != scalar.tag {
                tags.append((values.count, scalar.tag))
                byteCount += MemoryLayout<(from: Int, tag: ValueTag)>.stride
            }
            let segmentCount = rows.segments.count
            rows.append(row)
            byteCount += (rows.segments.count - segmentCount) * MemoryLayout<Rows.Segment>.stride
            if scalar.tag == .string || scalar.tag == .bigInt {
                // An array's own header, and what malloc rounds up.
                byteCount += 48 + scalar.tail.count
                values.append(UInt64(tails.count))
                tails.append(Array(scalar.tail))
            } else {
                values.append(scalar.bits)
            }
            return byteCount
        }

        /// - Returns: about how many bytes that took.
        mutating func removeLast() -> Int {
            var byteCount = MemoryLayout<UInt64>.size
            values.removeLast()
            if let last = tags.last {
                if last.tag == .string || last.tag == .bigInt {
                    byteCount += 48 + tails.removeLast().count
                }
                if last.from == values.count {
                    tags.removeLast()
                    byteCount += MemoryLayout<(from: Int, tag: ValueTag)>.stride
                }
            }
            let segmentCount = rows.segments.count
            rows.removeLast()
            return byteCount + (segmentCount - rows.segments.count) * MemoryLayout<Rows.Segment>.stride
        }

        /// The type of the n-th value, and behind which one another starts.
        func tag(at index: Int) -> (tag: ValueTag, end: Int) {
            let next = partition(of: tags) { $0.from <= index }
            return (tags[next - 1].tag, next < tags.count ? tags[next].from : .max)
        }

        subscript(index: Int) -> ScalarBits {
            let tag = tag(at: index).tag
            guard tag == .string || tag == .bigInt else { return ScalarBits(tag: tag, bits: values[index]) }
            let tail = tails[Int(values[index])]
            return ScalarBits(tag: tag, bits: UInt64(tail.count), tail: tail[...])
        }
    }

    public private(set) var keys: [String] = []
    /// What a value of each key takes in a page, with the key's name and without its tail.
    private var pageByteCounts: [Int] = []
    private var ids: [ByteName: Int] = [:]
    private var columns: [Column] = []
    private var updates = Chunked<UInt64>()
    /// How many values each row has.
    private var widths = Widths()
    private var wallTimes = WallTimes()
    public private(set) var lastUpdate: Int64?
    /// The bytes of the last row in a page of its own, with the names of its keys.
    private var lastRowPageByteCount = 0
    /// Whether the last row has got values after it was made.
    public private(set) var hasAddedToLastRow = false
    /// About what all of it takes in memory.
    public private(set) var byteCount = 0
    private static let keyByteCount = 256
    private static let rowByteCount = MemoryLayout<UInt64>.size + MemoryLayout<UInt32>.size

    public init() {}

    /// Rows: one an update.
    public var count: Int { updates.count }
    /// Seconds since 1970, as the trainer said; 0 where it did not.
    public func wallTime(row: Int) -> Double { wallTimes[row] }
    public func update(row: Int) -> Int64 { Int64(bitPattern: updates[row]) }
    public func valueCount(key: String) -> Int { ids[ByteName(key)].map { columns[$0].values.count } ?? 0 }

    /// The column of a key, made where it is new. Columns are in order of definition.
    public mutating func column(for key: String) throws(WireError) -> Int { try columns(for: [key])[0] }

    /// All of them, or none where they are too many.
    public mutating func columns(for names: [String]) throws(WireError) -> [Int] {
        guard
            keys.count + names.count <= Limits.keysPerRun  // guard: keys-of-a-run (always)
                || keys.count + Set(names.map(ByteName.init).filter { ids[$0] == nil }).count
                    <= Limits.keysPerRun
        else { throw WireError(.badKey, "more than \(Limits.keysPerRun) keys in one run") }
        return names.map { key in
            let name = ByteName(key)
            if let id = ids[name] { return id }
            ids[name] = keys.count
            keys.append(key)
            pageByteCounts.append(
                LogPayload.valueByteCount + EntriesPage.keyHeadByteCount + key.utf8.count)
            columns.append(Column())
            byteCount += Self.keyByteCount + key.utf8.count
            return keys.count - 1
        }
    }

    /// - Parameter columnIDs: from `column(for:)`; checked by the caller to be different from one another.
    public mutating func append(
        update: Int64, columnIDs: [Int], values: [ScalarBits], wallTime: Double = 0
    ) throws(WireError) {
        if let lastUpdate, update <= lastUpdate {  // guard: update-larger (never)
            throw WireError(.updateOrder, "update \(update) is not larger than the last one, \(lastUpdate)")
        }
        let pageByteCount = Self.emptyPageByteCount + pageByteCount(of: columnIDs, values)
        try Self.checkPage(pageByteCount, update: update)
        lastRowPageByteCount = pageByteCount
        hasAddedToLastRow = false
        let row = updates.count
        updates.append(UInt64(bitPattern: update))
        byteCount += Self.rowByteCount + widths.append(columnIDs.count, row: row)
        wallTimes.append(wallTime)
        lastUpdate = update
        for (position, id) in columnIDs.enumerated() {
            byteCount += columns[id].append(values[position], row: row)
        }
    }

    /// Adds values to the last row, which keeps its wall time. A key that the row has already takes the later value.
    /// - Parameter columnIDs: from `column(for:)`; checked by the caller to be different from one another.
    public mutating func addToLastRow(columnIDs: [Int], values: [ScalarBits]) throws(WireError) {
        let row = updates.count - 1
        let replaced = columnIDs.filter { columns[$0].rows.last == row }
        let width = widths[row] + columnIDs.count - replaced.count
        guard width <= Limits.valuesPerLog else {
            throw WireError(
                .tooMany,
                "update \(update(row: row)) would have \(width) values; at most \(Limits.valuesPerLog)")
        }
        let pageByteCount =
            lastRowPageByteCount + pageByteCount(of: columnIDs, values)
            - pageByteCount(of: replaced, replaced.map { columns[$0][columns[$0].values.count - 1] })
        try Self.checkPage(pageByteCount, update: update(row: row))
        lastRowPageByteCount = pageByteCount
        hasAddedToLastRow = true
        for id in replaced { byteCount -= columns[id].removeLast() }
        for (position, id) in columnIDs.enumerated() {
            byteCount += columns[id].append(values[position], row: row)
        }
        byteCount += widths.changeLast(to: width, row: row)
    }

    private static let emptyPageByteCount = EntriesPage.headByteCount + LogPayload.headByteCount

    private func pageByteCount(of columnIDs: [Int], _ values: [ScalarBits]) -> Int {
        var byteCount = 0
        for (id, value) in zip(columnIDs, values) {
            byteCount += pageByteCounts[id] + value.tail.count
        }
        return byteCount
    }

    /// A row must fit into a page of `entries`, with the names of its keys.
    private static func checkPage(_ byteCount: Int, update: Int64) throws(WireError) {
        guard byteCount <= Limits.payloadBytes else {  // guard: row-fits-an-answer (always)
            throw WireError(
                .tooMany,
                "update \(update) and the names of its keys have \(byteCount) bytes; at most \(Limits.payloadBytes)"
            )
        }
    }

    /// Forgets every row behind `update`; keys stay.
    public mutating func cut(after update: Int64) {
        guard let lastUpdate, lastUpdate > update else { return }
        var kept = LogColumns()
        kept.keys = keys
        kept.pageByteCounts = pageByteCounts
        kept.ids = ids
        kept.columns = keys.map { _ in Column() }
        kept.byteCount = keys.reduce(0) { $0 + Self.keyByteCount + $1.utf8.count }
        for row in payloads(rows: 0..<count, sequence: 0) {
            guard row.update <= update else { break }
            // Their order was checked when they came.
            try? kept.append(
                update: row.update, columnIDs: row.keyIDs.map { Int($0) }, values: row.values,
                wallTime: row.wallTime)
        }
        self = kept
    }

    /// Values of one key in order, with their updates.
    public func values(key: String, from: Int, limit: Int) -> [(update: Int64, value: ScalarBits)] {
        guard let id = ids[ByteName(key)] else { return [] }
        let column = columns[id]
        // Both numbers come from a client: no sum of them that could overflow.
        let first = min(max(0, from), column.values.count)
        return (first..<first + min(max(0, limit), column.values.count - first)).map {
            (update(row: column.rows[$0]), column[$0])
        }
    }

    /// One row: the keys that have a value in it.
    public func row(_ row: Int) -> (keyIDs: [UInt32], values: [ScalarBits]) {
        var found: (keyIDs: [UInt32], values: [ScalarBits]) = ([], [])
        for (id, column) in columns.enumerated() {
            guard let index = column.rows.index(ofRow: row) else { continue }
            found.keyIDs.append(UInt32(id))
            found.values.append(column[index])
        }
        return found
    }

    /// One row as `log` carries it, with columns for key ids.
    public func payload(row index: Int, sequence: UInt64) -> LogPayload {
        let (ids, values) = row(index)
        return LogPayload(
            sequence: sequence, update: update(row: index), wallTime: wallTime(row: index), keyIDs: ids,
            values: values)
    }

    /// Rows as `log` carries them, in order. A block of rows is gathered column by column: with tens of thousands of keys, looking
    /// through all columns for each row would stop the queue that asks.
    public func payloads(rows range: Range<Int>, sequence: UInt64) -> some Sequence<LogPayload> {
        blocks(of: range).lazy.flatMap { block(rows: $0, sequence: sequence) }
    }

    /// The rows from one on that hold about so many values; at least one where there is one.
    public func rows(from first: Int, holding values: Int, atMost limit: Int) -> Range<Int> {
        guard first < count else { return first..<first }
        var (end, held) = (first + 1, widths[first])
        while end < min(count, first + limit), held < values {
            held += widths[end]
            end += 1
        }
        return first..<end
    }

    private static let blockValues: UInt64 = 1 << 18
    private static let blockRows = 4096

    /// The range in blocks of bounded size.
    private func blocks(of range: Range<Int>) -> some Sequence<Range<Int>> {
        sequence(state: range.lowerBound) { start in
            guard start < range.upperBound else { return nil }
            var end = start
            var values: UInt64 = 0
            while end < range.upperBound, end - start < Self.blockRows,
                end == start || values < Self.blockValues
            {
                values += UInt64(widths[end])
                end += 1
            }
            defer { start = end }
            return start..<end
        }
    }

    private func block(rows range: Range<Int>, sequence: UInt64) -> [LogPayload] {
        var rows = range.map { row in
            var payload = LogPayload(
                sequence: sequence, update: update(row: row), wallTime: wallTime(row: row), keyIDs: [],
                values: [])
            payload.keyIDs.reserveCapacity(widths[row])
            payload.values.reserveCapacity(widths[row])
            return payload
        }
        for (id, column) in columns.enumerated() {
            column.rows.forEach(in: range) { row, position in
                rows[row - range.lowerBound].keyIDs.append(UInt32(id))
                rows[row - range.lowerBound].values.append(column[position])
            }
        }
        return rows
    }

    /// The last value of a column; nil where it has none.
    func last(column id: Int) -> ScalarBits? {
        let column = columns[id]
        return column.values.count > 0 ? column[column.values.count - 1] : nil
    }

    /// The last update of the first `count` rows; the smallest number where there is none.
    func update(before count: Int) -> Int64 {
        min(count, self.count) > 0 ? update(row: min(count, self.count) - 1) : .min
    }

    /// Rows behind `update`.
    func rowCount(after update: Int64?) -> Int {
        guard let update else { return count }
        var (low, high) = (0, count)
        while low < high {
            let middle = (low + high) / 2
            if self.update(row: middle) <= update { low = middle + 1 } else { high = middle }
        }
        return count - low
    }

    func valueCount(column id: Int) -> Int { columns[id].values.count }
    /// Whether some of its values are strings or big integers.
    func hasTails(column id: Int) -> Bool { !columns[id].tails.isEmpty }

    /// Calls `visit` for each value of a column in order, with its update, type, 64 bits, and the bytes of a string or big integer.
    @inline(__always)
    func forEach(
        column id: Int, from first: Int = 0, count: Int = .max,
        _ visit: (Int64, ValueTag, UInt64, [UInt8]) -> Void
    ) {
        let column = columns[id]
        let end = count == .max ? column.values.count : min(column.values.count, first + count)
        var index = first
        while index < end {
            // As far as type, stride and chunk stay the same.
            let (tag, tagEnd) = column.tag(at: index)
            let segment = column.rows.segment(of: index)
            var row = segment.first + segment.stride * (index - segment.before)
            let (values, chunkFirst) = column.values.chunk(holding: index)
            let stop = min(end, tagEnd, segment.before + segment.count, chunkFirst + values.count)
            let isPlain = tag != .string && tag != .bigInt
            while index < stop {
                let bits = values[index - chunkFirst]
                visit(update(row: row), tag, bits, isPlain ? [] : column.tails[Int(bits)])
                row += segment.stride
                index += 1
            }
        }
    }
}

extension LogColumns {
    /// Whether every value of the other log is in this one, at its update.
    func holds(_ other: LogColumns) -> Bool {
        for (otherID, key) in other.keys.enumerated() where other.valueCount(column: otherID) > 0 {
            guard let id = ids[ByteName(key)] else { return false }
            var own: [(update: Int64, tag: ValueTag, bits: UInt64, tail: [UInt8])] = []
            own.reserveCapacity(valueCount(column: id))
            forEach(column: id) { own.append(($0, $1, $2, $3)) }
            var next = 0
            var isHeld = true
            other.forEach(column: otherID) { update, tag, bits, tail in
                while next < own.count, own[next].update < update { next += 1 }
                guard isHeld, next < own.count, own[next].update == update, own[next].tag == tag else {
                    isHeld = false
                    return
                }
                let hasTail = tag == .string || tag == .bigInt
                isHeld = hasTail ? own[next].tail == tail : own[next].bits == bits
            }
            guard isHeld else { return false }
        }
        return true
    }

    /// Makes a log of columns that come one after the other, as a file has them.
    struct Filler {
        private var log = LogColumns()
        private let updates: [Int64]
        private var widths: [Int]
        private var pageByteCounts: [Int]
        private var nextRow = 0
        private var lastColumn = -1

        /// - Parameter updates: ascending.
        /// - Returns: nil where the keys could not come over the wire.
        init?(updates: [Int64], keys: [String]) {
            guard keys.allSatisfy(KeyDefinitions.isKey), let ids = try? log.columns(for: keys),
                ids == Array(keys.indices)
            else { return nil }
            self.updates = updates
            widths = Array(repeating: 0, count: updates.count)
            pageByteCounts = Array(repeating: LogColumns.emptyPageByteCount, count: updates.count)
            for update in updates {
                log.updates.append(UInt64(bitPattern: update))
                log.wallTimes.append(0)
            }
            log.lastUpdate = updates.last
        }

        /// - Parameter update: one of those given, and of a column in order.
        mutating func add(_ value: ScalarBits, at update: Int64, to column: Int) {
            if column != lastColumn { (lastColumn, nextRow) = (column, 0) }
            if updates[nextRow] != update { nextRow += partition(of: updates[nextRow...]) { $0 < update } }
            log.byteCount += log.columns[column].append(value, row: nextRow)
            widths[nextRow] += 1
            pageByteCounts[nextRow] += log.pageByteCount(of: [column], [value])
            nextRow = min(nextRow + 1, updates.count - 1)
        }

        /// - Returns: nil where a row could not have come over the wire.
        consuming func finished() -> LogColumns? {
            guard widths.allSatisfy({ $0 <= Limits.valuesPerLog }),
                pageByteCounts.allSatisfy({ $0 <= Limits.payloadBytes })
            else { return nil }
            for (row, width) in widths.enumerated() {
                log.byteCount += LogColumns.rowByteCount + log.widths.append(width, row: row)
            }
            log.lastRowPageByteCount = pageByteCounts.last ?? 0
            return log
        }
    }
}

/// How many of the first ones `holds` is true for: of none behind the first for which it isn't.
private func partition<Item>(of items: ArraySlice<Item>, _ holds: (Item) -> Bool) -> Int {
    var (low, high) = (items.startIndex, items.endIndex)
    while low < high {
        let middle = (low + high) / 2
        if holds(items[middle]) { low = middle + 1 } else { high = middle }
    }
    return low - items.startIndex
}

private func partition<Item>(of items: [Item], _ holds: (Item) -> Bool) -> Int {
    partition(of: items[...], holds)
}
