// SPDX-License-Identifier: Apache-2.0
/// Reads the pickle of entries.th: `{key: {update: value}}`, as noether-writerd and torch.save write it. No general
/// unpickler: it knows a dict of dicts of plain values and nothing else, so there is nothing in a file that it could
/// execute, and no class that it could make. Everything is bounds-checked; memory is bounded by what the file holds.
/// Source: CPython Lib/pickletools.py; Modules/_pickle.c, batch_dict_exact (batches of 1,000 items; one item alone by
/// SETITEM).

public enum EntryValue: Sendable, Equatable {
    /// IEEE 754 bits, as they are in the file.
    case float(UInt64)
    case int(Int64)
    case bool(Bool)
    case none
    case string(String)
    /// Two's complement, at most 255 bytes.
    case bigInt(littleEndian: [UInt8])
}

public struct EntriesError: Error, Sendable, Equatable, CustomStringConvertible {
    /// In the pickle.
    public var offset: Int
    public var problem: String
    public var description: String { "not a log's pickle, at byte \(offset): \(problem)" }
}

public struct EntriesReader {
    private static let keyByteCount = 1 << 16
    private static let stringByteCount = 1 << 20
    private static let keyCount = 1 << 17

    private let bytes: UnsafeRawBufferPointer
    private var position = 0
    /// Strings that the pickle may name again, by memo number.
    private var memo: [Int: String] = [:]

    /// - Parameter bytes: must stay as long as this is used.
    public init(_ bytes: UnsafeRawBufferPointer) { self.bytes = bytes }

    /// - Parameters:
    ///   - wants: whether a key's values are wanted; the others are read over.
    ///   - visit: a wanted key's values, in the file's order.
    /// - Returns: all keys, in the file's order.
    public mutating func read(
        wants: (String) -> Bool = { _ in true }, _ visit: (_ key: String, _ update: Int64, EntryValue) -> Void
    ) throws(EntriesError) -> [String] {
        guard try byte() == 0x80, try byte() == 2 else { throw error("it is not of protocol 2") }
        var keys: [String] = []
        try dict(startsKey: Self.startsString) { (reader: inout EntriesReader) throws(EntriesError) in
            guard case .string(let key) = try reader.value(limit: Self.keyByteCount) else {
                throw reader.error("a key is no string")
            }
            guard keys.count < Self.keyCount else { throw reader.error("more than \(Self.keyCount) keys") }
            keys.append(key)
            let isWanted = wants(key)
            try reader.dict(startsKey: Self.startsInt) { (reader: inout EntriesReader) throws(EntriesError) in
                guard case .int(let update) = try reader.value(limit: 0) else {
                    throw reader.error("an update is no integer of 64 bits")
                }
                let value = try reader.value(limit: Self.stringByteCount)
                if isWanted { visit(key, update, value) }
            }
        }
        guard try byte() == UInt8(ascii: ".") else {
            throw error("something else than a log's values is in it")
        }
        return keys
    }

    private static func startsString(_ code: UInt8) -> Bool {
        code == UInt8(ascii: "X") || code == UInt8(ascii: "h") || code == UInt8(ascii: "j")
    }

    private static func startsInt(_ code: UInt8) -> Bool {
        code == UInt8(ascii: "K") || code == UInt8(ascii: "M") || code == UInt8(ascii: "J") || code == 0x8A
    }

    private func error(_ problem: String) -> EntriesError { EntriesError(offset: position, problem: problem) }

    private func peek() -> UInt8? { position < bytes.count ? bytes[position] : nil }

    private mutating func byte() throws(EntriesError) -> UInt8 {
        guard let next = peek() else { throw error("it ends too early") }
        position += 1
        return next
    }

    private mutating func read(_ count: Int) throws(EntriesError) -> UnsafeRawBufferPointer {
        guard count >= 0, count <= bytes.count - position else { throw error("it ends too early") }
        defer { position += count }
        return UnsafeRawBufferPointer(rebasing: bytes[position..<position + count])
    }

    private mutating func little<T: FixedWidthInteger>(_: T.Type) throws(EntriesError) -> T {
        T(littleEndian: try read(MemoryLayout<T>.size).loadUnaligned(as: T.self))
    }

    /// EMPTY_DICT, then its items: MARK, many and SETITEMS as often as there are batches, or one alone and SETITEM.
    /// What starts a key tells an item of this dict from the next one of the dict around it.
    private mutating func dict(
        startsKey: (UInt8) -> Bool, item: (inout EntriesReader) throws(EntriesError) -> Void
    ) throws(EntriesError) {
        guard try byte() == UInt8(ascii: "}") else { throw error("a dict is wanted") }
        try memoize(nil)
        while let next = peek() {
            if next == UInt8(ascii: "(") {
                position += 1
                while peek() != UInt8(ascii: "u") { try item(&self) }
                position += 1
            } else if startsKey(next) {
                try item(&self)
                guard try byte() == UInt8(ascii: "s") else { throw error("an item alone is not set") }
            } else {
                return
            }
        }
    }

    /// BINPUT or LONG_BINPUT, if one follows.
    private mutating func memoize(_ string: String?) throws(EntriesError) {
        let number: Int
        switch peek() {
        case UInt8(ascii: "q"):
            position += 1
            number = Int(try byte())
        case UInt8(ascii: "r"):
            position += 1
            number = Int(try little(UInt32.self))
        default: return
        }
        if let string { memo[number] = string }
    }

    /// - Parameter limit: of a string, in bytes.
    private mutating func value(limit: Int) throws(EntriesError) -> EntryValue {
        let code = try byte()
        switch code {
        case UInt8(ascii: "G"): return .float(try little(UInt64.self).byteSwapped)
        case UInt8(ascii: "K"): return .int(Int64(try byte()))
        case UInt8(ascii: "M"): return .int(Int64(try little(UInt16.self)))
        case UInt8(ascii: "J"): return .int(Int64(try little(Int32.self)))
        case UInt8(ascii: "N"): return .none
        case 0x88: return .bool(true)
        case 0x89: return .bool(false)
        case 0x8A:
            let digits = Array(try read(Int(try byte())))
            guard digits.count <= 8 else { return .bigInt(littleEndian: digits) }
            var value: Int64 = digits.last.map { $0 >= 0x80 ? -1 : 0 } ?? 0
            for digit in digits.reversed() { value = value << 8 | Int64(digit) }
            return .int(value)
        case UInt8(ascii: "X"):
            let count = Int(try little(UInt32.self))
            guard count <= limit else { throw error("a string of \(count) bytes; at most \(limit)") }
            guard let string = String(validating: try read(count), as: UTF8.self) else {
                throw error("a string is not UTF-8")
            }
            try memoize(string)
            return .string(string)
        case UInt8(ascii: "h"), UInt8(ascii: "j"):
            let number = code == UInt8(ascii: "h") ? Int(try byte()) : Int(try little(UInt32.self))
            guard let string = memo[number], string.utf8.count <= limit else {
                throw error("it names something that is no string")
            }
            return .string(string)
        default: throw error("opcode 0x\(String(code, radix: 16)) is not of a log")
        }
    }
}
