// SPDX-License-Identifier: Apache-2.0
/// Where each record of a torch.save file lies: a function of names and sizes alone. All arithmetic is checked, since
/// the sizes come from a client. Source: caffe2/serialize/inline_container.cc and miniz, read at torch 2.13.

public enum ArchiveLayoutError: Error, Sendable, Equatable {
    /// The file would have more than 2^63 - 1 bytes.
    case overflow
    case nameTooLong(Int)
}

public struct ArchiveLayout: Sendable {
    public struct Record: Sendable, Equatable {
        /// With the archive's name before it.
        public var name: String
        public var headerOffset: UInt64
        public var payloadOffset: UInt64
        public var byteCount: UInt64

        var sizeNeedsZip64: Bool { byteCount >= 0xFFFF_FFFF }
        var offsetNeedsZip64: Bool { headerOffset >= 0xFFFF_FFFF }
        /// Of the zip64 extra field in the local header, its own header of 4 bytes included.
        var localZip64ByteCount: Int {
            sizeNeedsZip64 || offsetNeedsZip64
                ? 4 + (sizeNeedsZip64 ? 16 : 0) + (offsetNeedsZip64 ? 8 : 0) : 0
        }
        var centralZip64ByteCount: Int { localZip64ByteCount }
        /// An empty record has none.
        var descriptorByteCount: Int { byteCount == 0 ? 0 : localZip64ByteCount > 0 ? 24 : 16 }
        var localHeaderByteCount: Int { Int(payloadOffset - headerOffset) }
    }

    static let storageAlignment: UInt64 = 64
    /// File systems share whole blocks; no block in use is larger.
    static let blockByteCount: UInt64 = 4096
    /// From here on sharing costs less than writing.
    public static let sharedByteCount: UInt64 = 1 << 20
    /// The small records before the storages, with torch 2.13's contents. From format version 1 on torch may calculate
    /// where storages lie (`torch.utils.serialization.config.load.calculate_storage_offsets`), which it can't where
    /// they lie as in another file.
    static func leading(isShared: Bool) -> [(name: String, content: String)] {
        [
            (".format_version", isShared ? "0" : "1"), (".storage_alignment", "64"), ("byteorder", "little"),
        ]
    }
    static let version = (name: "version", content: "3\n")
    static let serializationID = (name: ".data/serialization_id", byteCount: 40)
    static let firstStorage = 4

    let leading: [(name: String, content: String)]
    public let records: [Record]
    public let storageCount: Int
    let centralDirectoryOffset: UInt64
    let centralDirectoryByteCount: UInt64
    /// Of the whole file, in bytes.
    public let imageLength: UInt64

    /// What the names of the records that torch.save writes to a path begin with: the last part of the path, after a
    /// slash or a backslash, without its last extension. If one character of the whole path, also of a directory's
    /// name, is not ASCII, torch writes through a file that Python has opened, and its archive does not know the name.
    public static func archiveName(path: String) -> String {
        guard path.utf8.allSatisfy({ $0 < 0x80 }) else { return "archive" }
        let start = path.lastIndex { $0 == "/" || $0 == "\\" }.map(path.index(after:)) ?? path.startIndex
        let name = path[start...]
        return String(name.lastIndex(of: ".").map { name[..<$0] } ?? name)
    }

    /// - Parameters:
    ///   - archiveName: see `archiveName(path:)`.
    ///   - pickleLength: of data.pkl in bytes.
    ///   - storageLengths: of data/0, data/1, ... in bytes.
    ///   - other: of a file with the same storages. Large ones then lie at the same place in a block of the file system
    ///     as there, after up to a block of padding, so that both files can share blocks. It is torch's file but for
    ///     these paddings and the format version.
    public init(
        archiveName: String, pickleLength: UInt64, storageLengths: [UInt64],
        sharingWith other: ArchiveLayout? = nil
    ) throws(ArchiveLayoutError) {
        guard archiveName.utf8.count <= 1024 else { throw .nameTooLong(archiveName.utf8.count) }
        var records: [Record] = []
        records.reserveCapacity(storageLengths.count + 6)
        var offset: UInt64 = 0
        var central: UInt64 = 0
        func add(_ name: String, _ byteCount: UInt64) throws(ArchiveLayoutError) {
            var record = Record(
                name: "\(archiveName)/\(name)", headerOffset: offset, payloadOffset: 0, byteCount: byteCount)
            let nameLength = UInt64(record.name.utf8.count)
            let start = offset + 30 + nameLength + 4 + UInt64(record.localZip64ByteCount)
            record.payloadOffset = (start + Self.storageAlignment - 1) & ~(Self.storageAlignment - 1)
            if let other, byteCount >= Self.sharedByteCount, records.count >= Self.firstStorage {
                let there = other.records[records.count].payloadOffset
                record.payloadOffset += (there &- record.payloadOffset) % Self.blockByteCount
            }
            let (end, overflow) = record.payloadOffset.addingReportingOverflow(byteCount)
            // Far below 2^64, so that the sums above can't wrap in the next round.
            guard !overflow, end < 1 << 62 else { throw .overflow }
            offset = end + UInt64(record.descriptorByteCount)
            central += 46 + nameLength + UInt64(record.centralZip64ByteCount)
            records.append(record)
        }
        try add("data.pkl", pickleLength)
        leading = Self.leading(isShared: other != nil)
        for small in leading { try add(small.name, UInt64(small.content.utf8.count)) }
        for (index, length) in storageLengths.enumerated() { try add("data/\(index)", length) }
        try add(Self.version.name, UInt64(Self.version.content.utf8.count))
        try add(Self.serializationID.name, UInt64(Self.serializationID.byteCount))
        self.records = records
        storageCount = storageLengths.count
        centralDirectoryOffset = offset
        centralDirectoryByteCount = central
        // zip64 end record, its locator, end record: always all three.
        imageLength = offset + central + 56 + 20 + 22
    }

    public var pickleOffset: UInt64 { records[0].payloadOffset }
    public func storageOffset(_ index: Int) -> UInt64 { records[Self.firstStorage + index].payloadOffset }

    /// Whole blocks of large storages, in order: where they start here, where in the other layout, and how many bytes.
    public func blocks(sharedWith other: ArchiveLayout) -> [(here: UInt64, there: UInt64, byteCount: UInt64)] {
        let block = Self.blockByteCount
        return (0..<storageCount).compactMap { index in
            let record = records[Self.firstStorage + index]
            guard record.byteCount >= Self.sharedByteCount else { return nil }
            let start = (record.payloadOffset + block - 1) / block * block
            let end = (record.payloadOffset + record.byteCount) / block * block
            return (start, start - record.payloadOffset + other.storageOffset(index), end - start)
        }
    }
}
