// SPDX-License-Identifier: Apache-2.0
/// Little-endian integers in and out of byte arrays; every read is bounds-checked.

public struct ByteReader: Sendable {
    private let bytes: ArraySlice<UInt8>
    private var position: Int

    public init(_ bytes: ArraySlice<UInt8>) {
        self.bytes = bytes
        position = bytes.startIndex
    }

    public init(_ bytes: [UInt8]) { self.init(bytes[...]) }

    public var remaining: Int { bytes.endIndex - position }

    public mutating func read(_ count: Int) throws(WireError) -> ArraySlice<UInt8> {
        guard count >= 0, count <= remaining else {  // guard: bytes-that-are-there (always: count <= remaining)
            throw WireError(.badFrame, "the payload ends \(count - remaining) bytes too early")
        }
        defer { position += count }
        return bytes[position..<position + count]
    }

    private mutating func integer<T: FixedWidthInteger>(_: T.Type) throws(WireError) -> T {
        let slice = try read(MemoryLayout<T>.size)
        return slice.withUnsafeBytes { T(littleEndian: $0.loadUnaligned(as: T.self)) }
    }

    public mutating func u8() throws(WireError) -> UInt8 { try integer(UInt8.self) }
    public mutating func u16() throws(WireError) -> UInt16 { try integer(UInt16.self) }
    public mutating func u32() throws(WireError) -> UInt32 { try integer(UInt32.self) }
    public mutating func u64() throws(WireError) -> UInt64 { try integer(UInt64.self) }
    public mutating func i64() throws(WireError) -> Int64 { try integer(Int64.self) }

    /// `count` integers in one go: the hot path of `log` and the sizes of `save`.
    public mutating func array<T: FixedWidthInteger>(of _: T.Type, count: Int) throws(WireError) -> [T] {
        let (byteCount, overflow) = count.multipliedReportingOverflow(by: MemoryLayout<T>.size)
        // guard: counts-times-sizes (always)
        guard !overflow else { throw WireError(.badFrame, "a count of \(count) overflows") }
        // Its place is shared, and would be written to.
        guard count > 0 else { return [] }
        let slice = try read(byteCount)
        return slice.withUnsafeBytes { raw in
            [T](unsafeUninitializedCapacity: count) { out, initialized in
                for index in 0..<count {
                    let value = raw.loadUnaligned(fromByteOffset: index * MemoryLayout<T>.size, as: T.self)
                    out.initializeElement(at: index, to: T(littleEndian: value))
                }
                initialized = count
            }
        }
    }

    public func expectEnd(_ what: String) throws(WireError) {
        guard remaining == 0 else {  // guard: payload-used-up (always)
            throw WireError(.badFrame, "\(remaining) bytes after the end of \(what)")
        }
    }
}

public struct ByteWriter: Sendable {
    public private(set) var bytes: [UInt8] = []

    public init(capacity: Int = 0) { bytes.reserveCapacity(capacity) }

    public mutating func bytes(_ more: some Sequence<UInt8>) { bytes.append(contentsOf: more) }
    private mutating func integer(_ value: some FixedWidthInteger) {
        withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
    }
    public mutating func u8(_ value: UInt8) { bytes.append(value) }
    public mutating func u16(_ value: UInt16) { integer(value) }
    public mutating func u32(_ value: UInt32) { integer(value) }
    public mutating func u64(_ value: UInt64) { integer(value) }
    public mutating func i64(_ value: Int64) { integer(value) }
}
