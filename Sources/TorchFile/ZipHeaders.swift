// SPDX-License-Identifier: Apache-2.0
/// The bytes between payloads, exactly as torch's writer (miniz, as inline_container.cc drives it) lays them.

struct ZipHeaders {
    private(set) var bytes: [UInt8] = []

    private mutating func put(_ value: some FixedWidthInteger) {
        withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
    }

    private static func flags(_ record: ArchiveLayout.Record) -> UInt16 {
        record.byteCount == 0 ? 0x0800 : 0x0808
    }

    mutating func localHeader(_ record: ArchiveLayout.Record) {
        let start = bytes.count
        let name = Array(record.name.utf8)
        put(UInt32(0x0403_4B50))
        put(UInt16(0))
        put(Self.flags(record))
        // Method (stored), time, date; then crc and both sizes: they follow in the descriptor.
        for _ in 0..<3 { put(UInt16(0)) }
        for _ in 0..<3 { put(UInt32(0)) }
        put(UInt16(name.count))
        put(UInt16(record.localHeaderByteCount - 30 - name.count))
        bytes += name
        if record.localZip64ByteCount > 0 {
            put(UInt16(1))
            put(UInt16(record.localZip64ByteCount - 4))
            if record.sizeNeedsZip64 {
                put(record.byteCount)
                put(UInt64(0))
            }
            if record.offsetNeedsZip64 { put(record.headerOffset) }
        }
        let padding = record.localHeaderByteCount - (bytes.count - start) - 4
        bytes += Array("FB".utf8)
        put(UInt16(padding))
        bytes += [UInt8](repeating: UInt8(ascii: "Z"), count: padding)
    }

    mutating func descriptor(_ record: ArchiveLayout.Record, crc: UInt32) {
        guard record.descriptorByteCount > 0 else { return }
        put(UInt32(0x0807_4B50))
        put(crc)
        if record.descriptorByteCount == 24 {
            put(record.byteCount)
            put(record.byteCount)
        } else {
            put(UInt32(record.byteCount))
            put(UInt32(record.byteCount))
        }
    }

    mutating func centralEntry(_ record: ArchiveLayout.Record, crc: UInt32) {
        let name = Array(record.name.utf8)
        let size = record.sizeNeedsZip64 ? UInt32.max : UInt32(record.byteCount)
        put(UInt32(0x0201_4B50))
        put(UInt16(0))
        put(UInt16(0))
        put(Self.flags(record))
        for _ in 0..<3 { put(UInt16(0)) }
        put(crc)
        put(size)
        put(size)
        put(UInt16(name.count))
        put(UInt16(record.centralZip64ByteCount))
        for _ in 0..<3 { put(UInt16(0)) }
        put(UInt32(0))
        put(record.offsetNeedsZip64 ? UInt32.max : UInt32(record.headerOffset))
        bytes += name
        if record.centralZip64ByteCount > 0 {
            put(UInt16(1))
            put(UInt16(record.centralZip64ByteCount - 4))
            if record.sizeNeedsZip64 {
                put(record.byteCount)
                put(record.byteCount)
            }
            if record.offsetNeedsZip64 { put(record.headerOffset) }
        }
    }

    mutating func end(_ layout: ArchiveLayout) {
        let count = UInt64(layout.records.count)
        let (offset, size) = (layout.centralDirectoryOffset, layout.centralDirectoryByteCount)
        put(UInt32(0x0606_4B50))
        put(UInt64(44))
        put(UInt16(0x031E))
        put(UInt16(0x002D))
        put(UInt32(0))
        put(UInt32(0))
        for value in [count, count, size, offset] { put(value) }
        put(UInt32(0x0706_4B50))
        put(UInt32(0))
        put(offset + size)
        put(UInt32(1))
        put(UInt32(0x0605_4B50))
        put(UInt16(0))
        put(UInt16(0))
        for _ in 0..<2 { put(UInt16(min(count, 0xFFFF))) }
        for value in [size, offset] { put(UInt32(min(value, 0xFFFF_FFFF))) }
        put(UInt16(0))
    }
}
