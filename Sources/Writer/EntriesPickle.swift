// SPDX-License-Identifier: Apache-2.0
/// The pickle of `{key: {update: value}}`, made piece by piece: its length is known before its first byte, and no more of it
/// is in memory than a few thousand entries. A log of ten million scalars would otherwise be there three times.
///
/// Opcodes as in `PickleWriter`; a plain loop over raw memory, since it runs once a scalar.
import TorchFile
import Wire

struct EntriesPickle {
    /// Of the whole pickle, in bytes.
    let byteCount: Int

    private let log: LogColumns
    /// Columns that have values, in order.
    private let columns: [Int]
    private var nextColumn = 0
    private var nextValue = 0
    /// Made, and not handed out yet.
    private var made: [UInt8] = []
    private var madeStart = 0
    private var isEnded = false

    private static let batchValues = 4096
    /// The longest that has no tail: an update and an integer, each as LONG1 of 8 bytes.
    private static let plainEntryBytes = 10 + 10

    init(_ log: LogColumns) {
        self.log = log
        columns = log.keys.indices.filter { log.valueCount(column: $0) > 0 }
        var count = Self.start.count + Self.end.count
        for column in columns {
            count += Self.head(of: log.keys[column]).count + 1
            log.forEach(column: column) { update, tag, bits, tail in
                count += Self.intByteCount(update) + Self.valueByteCount(tag, bits, tail.count)
            }
        }
        byteCount = count
        made = Self.start
    }

    private static let start: [UInt8] = {
        var pickle = PickleWriter()
        pickle.proto()
        pickle.emptyDict()
        pickle.mark()
        return pickle.bytes
    }()

    private static let end: [UInt8] = {
        var pickle = PickleWriter()
        pickle.setItems()
        pickle.stop()
        return pickle.bytes
    }()

    private static func head(of key: String) -> [UInt8] {
        var pickle = PickleWriter()
        pickle.string(key)
        pickle.emptyDict()
        pickle.mark()
        return pickle.bytes
    }

    /// Fills the buffer with the next bytes. Asked for no more than `byteCount` in all.
    mutating func read(into buffer: UnsafeMutableRawBufferPointer) {
        var filled = 0
        while filled < buffer.count {
            if madeStart == made.count { makeMore() }
            let count = min(buffer.count - filled, made.count - madeStart)
            precondition(count > 0, "the pickle ended early")
            made.withUnsafeBytes {
                UnsafeMutableRawBufferPointer(rebasing: buffer[filled..<filled + count]).copyMemory(
                    from: UnsafeRawBufferPointer(rebasing: $0[madeStart..<madeStart + count]))
            }
            madeStart += count
            filled += count
        }
    }

    private mutating func makeMore() {
        madeStart = 0
        guard nextColumn < columns.count else {
            made = isEnded ? [] : Self.end
            isEnded = true
            return
        }
        let column = columns[nextColumn]
        if nextValue == 0 {
            made = Self.head(of: log.keys[column])
            nextValue = 0
            appendBatch(column)
        } else {
            made.removeAll(keepingCapacity: true)
            appendBatch(column)
        }
    }

    private mutating func appendBatch(_ column: Int) {
        let count = min(Self.batchValues, log.valueCount(column: column) - nextValue)
        var tailBytes = 0
        if log.hasTails(column: column) {
            log.forEach(column: column, from: nextValue, count: count) { _, _, _, tail in
                tailBytes += 5 + tail.count
            }
        }
        let before = made.count
        let room = before + count * Self.plainEntryBytes + tailBytes
        if made.count < room { made += [UInt8](repeating: 0, count: room - made.count) }
        var end = before
        made.withUnsafeMutableBytes { bytes in
            var cursor = Cursor(at: bytes.baseAddress! + before)
            log.forEach(column: column, from: nextValue, count: count) { update, tag, bits, tail in
                cursor.int(update)
                cursor.value(tag, bits, tail)
            }
            end = cursor.at - bytes.baseAddress!
            precondition(end <= bytes.count, "an entry is longer than the room for it")
        }
        made.removeLast(made.count - end)
        nextValue += count
        if nextValue == log.valueCount(column: column) {
            made.append(UInt8(ascii: "u"))
            nextColumn += 1
            nextValue = 0
        }
    }

    // MARK: Opcodes

    @inline(__always)
    private static func intByteCount(_ value: Int64) -> Int {
        switch value {
        case 0...0xFF: 2
        case 0...0xFFFF: 3
        case Int64(Int32.min)...Int64(Int32.max): 5
        default: 2 + longByteCount(value)
        }
    }

    /// Minimal two's complement, as Python writes it.
    private static func longByteCount(_ value: Int64) -> Int {
        8 - ((value < 0 ? ~value : value).leadingZeroBitCount - 1) / 8
    }

    @inline(__always)
    private static func valueByteCount(_ tag: ValueTag, _ bits: UInt64, _ tailCount: Int) -> Int {
        switch tag {
        case .float: 9
        case .int: intByteCount(Int64(bitPattern: bits))
        case .bool, .none: 1
        case .string: 5 + tailCount
        case .bigInt: 2 + tailCount
        }
    }

    private struct Cursor {
        var at: UnsafeMutableRawPointer

        @inline(__always)
        mutating func put<T>(_ op: UInt8, _ value: T) {
            at.storeBytes(of: op, as: UInt8.self)
            (at + 1).storeBytes(of: value, as: T.self)
            at += 1 + MemoryLayout<T>.size
        }

        @inline(__always)
        mutating func int(_ value: Int64) {
            switch value {
            case 0...0xFF: put(UInt8(ascii: "K"), UInt8(truncatingIfNeeded: value))
            case 0...0xFFFF: put(UInt8(ascii: "M"), UInt16(truncatingIfNeeded: value).littleEndian)
            case Int64(Int32.min)...Int64(Int32.max):
                put(UInt8(ascii: "J"), Int32(truncatingIfNeeded: value).littleEndian)
            default:
                let count = EntriesPickle.longByteCount(value)
                put(0x8A, UInt8(count))
                withUnsafeBytes(of: value.littleEndian) {
                    at.copyMemory(from: $0.baseAddress!, byteCount: count)
                }
                at += count
            }
        }

        @inline(__always)
        mutating func value(_ tag: ValueTag, _ bits: UInt64, _ tail: [UInt8]) {
            switch tag {
            // From IEEE 754 bits: NaN payloads and -0.0 stay as they are.
            case .float: put(UInt8(ascii: "G"), bits.bigEndian)
            case .int: int(Int64(bitPattern: bits))
            case .bool: op(bits == 1 ? 0x88 : 0x89)
            case .none: op(UInt8(ascii: "N"))
            case .string:
                put(UInt8(ascii: "X"), UInt32(tail.count).littleEndian)
                bytes(tail)
            case .bigInt:
                put(0x8A, UInt8(tail.count))
                bytes(tail)
            }
        }

        private mutating func op(_ code: UInt8) {
            at.storeBytes(of: code, as: UInt8.self)
            at += 1
        }

        private mutating func bytes(_ source: [UInt8]) {
            source.withUnsafeBytes { source in
                if let base = source.baseAddress { at.copyMemory(from: base, byteCount: source.count) }
            }
            at += source.count
        }
    }
}
