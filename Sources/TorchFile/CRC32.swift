// SPDX-License-Identifier: Apache-2.0
/// zlib's CRC-32, by libdeflate (three times zlib's speed).
import CDeflate

public struct CRC32: Sendable {
    public private(set) var value: UInt32 = 0

    public init() {}

    public mutating func update(_ bytes: UnsafeRawBufferPointer) {
        guard bytes.count > 0 else { return }
        value = libdeflate_crc32(value, bytes.baseAddress, bytes.count)
    }
}
