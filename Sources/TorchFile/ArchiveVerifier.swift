/// Checks a whole .th file: its structure, and the CRC of each record. torch.load never looks at CRCs.
/// Every read is bounds-checked with checked sums, since the file may hold anything.

public struct ArchiveDamage: Error, Sendable, Equatable, CustomStringConvertible {
    /// The record's name, or the part of the structure.
    public var place: String
    public var problem: String
    public var description: String { "\(place): \(problem)" }
}

public struct ArchiveVerifier {
    private let file: UnsafeRawBufferPointer

    private struct Entry {
        var name: String
        var crc: UInt32
        var byteCount: UInt64
        var headerOffset: UInt64
    }

    /// - Parameter file: the whole file; must stay mapped while this is used.
    public init(_ file: UnsafeRawBufferPointer) { self.file = file }

    private func number<T: FixedWidthInteger>(
        _: T.Type, at offset: UInt64, _ place: String
    ) throws(ArchiveDamage) -> T {
        let (end, overflow) = offset.addingReportingOverflow(UInt64(MemoryLayout<T>.size))
        guard !overflow, end <= UInt64(file.count) else { throw damage(place, "lies outside the file") }
        return T(littleEndian: file.loadUnaligned(fromByteOffset: Int(offset), as: T.self))
    }

    private func bytes(
        at offset: UInt64, count: UInt64, _ place: String
    ) throws(ArchiveDamage) -> UnsafeRawBufferPointer {
        let (end, overflow) = offset.addingReportingOverflow(count)
        guard !overflow, end <= UInt64(file.count) else { throw damage(place, "lies outside the file") }
        return UnsafeRawBufferPointer(rebasing: file[Int(offset)..<Int(end)])
    }

    private func damage(_ place: String, _ problem: String) -> ArchiveDamage {
        ArchiveDamage(place: place, problem: problem)
    }

    /// - Returns: the records' names.
    /// - Throws: the first damage found.
    public func verify() throws(ArchiveDamage) -> [String] {
        let entries = try centralDirectory()
        var expectedStorage = 0
        let prefix =
            entries.first.flatMap { entry in entry.name.split(separator: "/").first.map { "\($0)/" } } ?? ""
        for entry in entries {
            guard !prefix.isEmpty, entry.name.hasPrefix(prefix) else {
                throw damage(entry.name, "is not below the archive's name \(prefix)")
            }
            try check(entry)
            if entry.name.hasPrefix(prefix + "data/"), !entry.name.hasSuffix(".pkl") { expectedStorage += 1 }
        }
        let names = Set(entries.map(\.name))
        guard names.count == entries.count else { throw damage("central directory", "names a record twice") }
        guard names.contains(prefix + "data.pkl") else { throw damage(prefix + "data.pkl", "is missing") }
        for index in 0..<expectedStorage where !names.contains("\(prefix)data/\(index)") {
            throw damage("\(prefix)data/\(index)", "is missing")
        }
        return entries.map(\.name)
    }

    private func centralDirectory() throws(ArchiveDamage) -> [Entry] {
        let endByteCount = 22
        guard file.count >= endByteCount else {
            throw damage("end record", "the file has only \(file.count) bytes")
        }
        let end = UInt64(file.count - endByteCount)
        guard try number(UInt32.self, at: end, "end record") == 0x0605_4B50 else {
            throw damage("end record", "is missing: the file is cut off or not a checkpoint")
        }
        var count = UInt64(try number(UInt16.self, at: end + 10, "end record"))
        var offset = UInt64(try number(UInt32.self, at: end + 16, "end record"))
        if end >= 20, try number(UInt32.self, at: end - 20, "zip64 locator") == 0x0706_4B50 {
            let record = try number(UInt64.self, at: end - 12, "zip64 locator")
            guard record <= UInt64(file.count),
                try number(UInt32.self, at: record, "zip64 end record") == 0x0606_4B50
            else { throw damage("zip64 end record", "is missing") }
            count = try number(UInt64.self, at: record + 32, "zip64 end record")
            offset = try number(UInt64.self, at: record + 48, "zip64 end record")
        }
        var entries: [Entry] = []
        var read: UInt64 = 0
        while read < count {
            let place = "central directory, entry \(read)"
            guard offset <= UInt64(file.count), try number(UInt32.self, at: offset, place) == 0x0201_4B50
            else {
                throw damage(place, "is missing")
            }
            let nameLength = UInt64(try number(UInt16.self, at: offset + 28, place))
            let extraLength = UInt64(try number(UInt16.self, at: offset + 30, place))
            let commentLength = UInt64(try number(UInt16.self, at: offset + 32, place))
            let name = try bytes(at: offset + 46, count: nameLength, place)
            var entry = Entry(
                name: String(decoding: name, as: UTF8.self),
                crc: try number(UInt32.self, at: offset + 16, place),
                byteCount: UInt64(try number(UInt32.self, at: offset + 24, place)),
                headerOffset: UInt64(try number(UInt32.self, at: offset + 42, place)))
            if extraLength >= 4, try number(UInt16.self, at: offset + 46 + nameLength, place) == 1 {
                var field = offset + 46 + nameLength + 4
                if entry.byteCount == 0xFFFF_FFFF {
                    entry.byteCount = try number(UInt64.self, at: field, place)
                    field += 16
                }
                if entry.headerOffset == 0xFFFF_FFFF {
                    entry.headerOffset = try number(UInt64.self, at: field, place)
                }
            }
            entries.append(entry)
            offset += 46 + nameLength + extraLength + commentLength
            read += 1
        }
        return entries
    }

    private func check(_ entry: Entry) throws(ArchiveDamage) {
        guard entry.headerOffset <= UInt64(file.count),
            try number(UInt32.self, at: entry.headerOffset, entry.name) == 0x0403_4B50
        else { throw damage(entry.name, "has no local header where the directory says") }
        let nameLength = UInt64(try number(UInt16.self, at: entry.headerOffset + 26, entry.name))
        let extraLength = UInt64(try number(UInt16.self, at: entry.headerOffset + 28, entry.name))
        let name = try bytes(at: entry.headerOffset + 30, count: nameLength, entry.name)
        guard name.elementsEqual(entry.name.utf8) else {
            throw damage(entry.name, "has another name in its local header")
        }
        let payload = try bytes(
            at: entry.headerOffset + 30 + nameLength + extraLength, count: entry.byteCount, entry.name)
        var crc = CRC32()
        crc.update(payload)
        guard crc.value == entry.crc else {
            throw damage(
                entry.name,
                "its bytes have CRC \(String(crc.value, radix: 16)), the directory says \(String(entry.crc, radix: 16))"
            )
        }
    }
}
