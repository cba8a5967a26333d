// SPDX-License-Identifier: Apache-2.0
/// TFRecord: u64 length, u32 masked CRC-32C of the length, the data, u32 masked CRC-32C of the data. Pure.
/// Source: tensorflow/core/lib/io/record_writer.h.

enum TFRecord {
    static let headerByteCount = 12
    static let overheadByteCount = 16

    /// Adds a record; its data is what `build` adds, which may be told how much that is.
    static func append(
        to bytes: inout [UInt8], reserving byteCount: Int = 0, _ build: (inout ProtobufWriter) -> Void
    ) {
        let start = bytes.count
        var writer = ProtobufWriter()
        // The array is lent, not copied.
        swap(&writer.bytes, &bytes)
        let needed = start + byteCount + overheadByteCount
        // reserveCapacity takes what it is told to the byte: each record would copy all before it.
        let capacity = writer.bytes.capacity
        if needed > capacity { writer.bytes.reserveCapacity(max(needed, 2 * capacity)) }
        writer.bytes += repeatElement(0, count: headerByteCount)
        build(&writer)
        let end = writer.bytes.count
        let length = UInt64(end - start - headerByteCount)
        let sum = writer.bytes.withUnsafeMutableBytes { all in
            all.storeBytes(of: length.littleEndian, toByteOffset: start, as: UInt64.self)
            let head = UnsafeRawBufferPointer(rebasing: all[start..<start + 8])
            all.storeBytes(of: CRC32C.masked(head).littleEndian, toByteOffset: start + 8, as: UInt32.self)
            return CRC32C.masked(UnsafeRawBufferPointer(rebasing: all[(start + headerByteCount)..<end]))
        }
        writer.fixed(sum)
        swap(&writer.bytes, &bytes)
    }

    /// - Returns: the first record's data and how many bytes it takes in all; nil if it is not whole, or no record.
    static func first(_ bytes: UnsafeRawBufferPointer) -> (data: UnsafeRawBufferPointer, byteCount: Int)? {
        guard let length = length(bytes), bytes.count >= length + overheadByteCount else { return nil }
        let data = UnsafeRawBufferPointer(rebasing: bytes[headerByteCount..<headerByteCount + length])
        let sum = bytes.loadUnaligned(fromByteOffset: headerByteCount + length, as: UInt32.self)
        guard CRC32C.masked(data) == UInt32(littleEndian: sum) else { return nil }
        return (data, length + overheadByteCount)
    }

    /// Of the first record's data; nil if its header is not there or not good.
    static func length(_ bytes: UnsafeRawBufferPointer) -> Int? {
        guard bytes.count >= headerByteCount else { return nil }
        let sum = UInt32(littleEndian: bytes.loadUnaligned(fromByteOffset: 8, as: UInt32.self))
        let length = UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: 0, as: UInt64.self))
        guard CRC32C.masked(UnsafeRawBufferPointer(rebasing: bytes[..<8])) == sum, length < 1 << 31 else {
            return nil
        }
        return Int(length)
    }
}

/// Castagnoli's polynomial, eight bytes a step (Intel's slicing-by-8), and TFRecord's mask: a checksum of data with
/// checksums in it would be weak.
enum CRC32C {
    /// Eight tables of 256.
    private static let tables: [UInt32] = {
        var tables = [UInt32](repeating: 0, count: 8 * 256)
        for index in 0..<256 {
            var value = UInt32(index)
            for _ in 0..<8 { value = value & 1 == 1 ? value >> 1 ^ 0x82F6_3B78 : value >> 1 }
            tables[index] = value
        }
        for index in 256..<tables.count {
            let before = tables[index - 256]
            tables[index] = before >> 8 ^ tables[Int(before & 0xFF)]
        }
        return tables
    }()

    static func value(_ bytes: UnsafeRawBufferPointer) -> UInt32 {
        tables.withUnsafeBufferPointer { tables in
            var crc = UInt32.max
            var index = 0
            while index + 8 <= bytes.count {
                let word =
                    UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: index, as: UInt64.self))
                    ^ UInt64(crc)
                crc = 0
                for step in 0..<8 {
                    crc ^= tables[(7 - step) << 8 | Int(word >> (UInt64(step) * 8) & 0xFF)]
                }
                index += 8
            }
            while index < bytes.count {
                crc = crc >> 8 ^ tables[Int((crc ^ UInt32(bytes[index])) & 0xFF)]
                index += 1
            }
            return ~crc
        }
    }

    static func masked(_ bytes: UnsafeRawBufferPointer) -> UInt32 {
        let crc = value(bytes)
        return (crc >> 15 | crc << 17) &+ 0xA282_EAD8
    }
}
