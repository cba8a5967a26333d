// SPDX-License-Identifier: Apache-2.0
/// Checks a whole .th file: its structure, and the CRC of each record. torch.load never looks at CRCs.
/// Every read is bounds-checked with checked sums, since the file may hold anything.

public struct ArchiveDamage: Error, Sendable, Equatable, CustomStringConvertible {
    /// The record's name, or the part of the structure.
    public var place: String
    public var problem: String
    public var description: String { "\(place): \(problem)" }

    public init(place: String, problem: String) {
        self.place = place
        self.problem = problem
    }
}

public struct ArchiveVerifier {
    /// Payloads are summed in pieces of so many bytes.
    private static let pieceByteCount = 1 << 20

    private let byteCount: UInt64
    private let read: (UInt64, UnsafeMutableRawBufferPointer) -> Bool

    private struct Entry {
        var name: String
        var crc: UInt32
        var byteCount: UInt64
        var headerOffset: UInt64
    }

    /// - Parameters:
    ///   - byteCount: of the file.
    ///   - read: fills the buffer with the bytes from an offset on, all of them in the file; false if it can't.
    public init(byteCount: UInt64, read: @escaping (UInt64, UnsafeMutableRawBufferPointer) -> Bool) {
        self.byteCount = byteCount
        self.read = read
    }

    /// - Parameter file: the whole file; must stay mapped while this is used.
    public init(_ file: UnsafeRawBufferPointer) {
        self.init(byteCount: UInt64(file.count)) { offset, buffer in
            buffer.copyMemory(
                from: UnsafeRawBufferPointer(rebasing: file[Int(offset)..<Int(offset) + buffer.count]))
            return true
        }
    }

    private func fill(
        _ buffer: UnsafeMutableRawBufferPointer, at offset: UInt64, _ place: String
    ) throws(ArchiveDamage) {
        let (end, overflow) = offset.addingReportingOverflow(UInt64(buffer.count))
        guard !overflow, end <= byteCount else { throw damage(place, "lies outside the file") }
        guard buffer.isEmpty || read(offset, buffer) else { throw damage(place, "can't be read") }
    }

    private func number<T: FixedWidthInteger>(
        _: T.Type, at offset: UInt64, _ place: String
    ) throws(ArchiveDamage) -> T {
        var value: T = 0
        var problem: ArchiveDamage?
        withUnsafeMutableBytes(of: &value) {
            do throws(ArchiveDamage) { try fill($0, at: offset, place) } catch { problem = error }
        }
        if let problem { throw problem }
        return T(littleEndian: value)
    }

    private func bytes(at offset: UInt64, count: UInt64, _ place: String) throws(ArchiveDamage) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: Int(count))
        var problem: ArchiveDamage?
        bytes.withUnsafeMutableBytes {
            do throws(ArchiveDamage) { try fill($0, at: offset, place) } catch { problem = error }
        }
        if let problem { throw problem }
        return bytes
    }

    private func sum(at offset: UInt64, count: UInt64, _ place: String) throws(ArchiveDamage) -> UInt32 {
        let (end, overflow) = offset.addingReportingOverflow(count)
        guard !overflow, end <= byteCount else { throw damage(place, "lies outside the file") }
        let piece = UnsafeMutableRawBufferPointer.allocate(
            byteCount: Int(min(count, UInt64(Self.pieceByteCount))), alignment: 16)
        defer { piece.deallocate() }
        var crc = CRC32()
        var done: UInt64 = 0
        while done < count {
            let part = UnsafeMutableRawBufferPointer(
                rebasing: piece[..<Int(min(UInt64(piece.count), count - done))])
            try fill(part, at: offset + done, place)
            crc.update(UnsafeRawBufferPointer(part))
            done += UInt64(part.count)
        }
        return crc.value
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
        // Records that lie over one another would make a small file one that takes days to read.
        var total: UInt64 = 0
        for entry in entries {
            let (sum, overflow) = total.addingReportingOverflow(entry.byteCount)
            guard !overflow, sum <= byteCount else { throw damage(entry.name, "lies over others") }
            total = sum
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

    /// Where the pickle's bytes lie in the file, their CRC checked.
    public func pickle() throws(ArchiveDamage) -> Range<UInt64> {
        for entry in try centralDirectory() {
            let parts = entry.name.split(separator: "/", omittingEmptySubsequences: false)
            guard parts.count == 2, parts[1] == "data.pkl" else { continue }
            let start = try check(entry)
            return start..<start + entry.byteCount
        }
        throw damage("data.pkl", "is missing")
    }

    /// Where the bytes of each record lie in the file, by its name below the archive's.
    /// - Parameter checksSums: whether each has the CRC that the directory says; of the pickle it is checked anyway.
    public func records(checksSums: Bool) throws(ArchiveDamage) -> [String: Range<UInt64>] {
        var records: [String: Range<UInt64>] = [:]
        for entry in try centralDirectory() {
            guard let slash = entry.name.firstIndex(of: "/") else {
                throw damage(entry.name, "is not below an archive's name")
            }
            let name = String(entry.name[entry.name.index(after: slash)...])
            let start = checksSums || name == "data.pkl" ? try check(entry) : try place(entry)
            let (end, overflow) = start.addingReportingOverflow(entry.byteCount)
            guard !overflow, end <= byteCount else { throw damage(entry.name, "lies outside the file") }
            guard records.updateValue(start..<end, forKey: name) == nil else {
                throw damage(entry.name, "is there twice")
            }
        }
        return records
    }

    private func centralDirectory() throws(ArchiveDamage) -> [Entry] {
        let endByteCount: UInt64 = 22
        guard byteCount >= endByteCount else {
            throw damage("end record", "the file has only \(byteCount) bytes")
        }
        let end = byteCount - endByteCount
        guard try number(UInt32.self, at: end, "end record") == 0x0605_4B50 else {
            throw damage("end record", "is missing: the file is cut off or not a checkpoint")
        }
        var count = UInt64(try number(UInt16.self, at: end + 10, "end record"))
        var offset = UInt64(try number(UInt32.self, at: end + 16, "end record"))
        if end >= 20, try number(UInt32.self, at: end - 20, "zip64 locator") == 0x0706_4B50 {
            let record = try number(UInt64.self, at: end - 12, "zip64 locator")
            guard record <= byteCount,
                try number(UInt32.self, at: record, "zip64 end record") == 0x0606_4B50
            else { throw damage("zip64 end record", "is missing") }
            count = try number(UInt64.self, at: record + 32, "zip64 end record")
            offset = try number(UInt64.self, at: record + 48, "zip64 end record")
        }
        var entries: [Entry] = []
        var read: UInt64 = 0
        while read < count {
            let place = "central directory, entry \(read)"
            guard offset <= byteCount, try number(UInt32.self, at: offset, place) == 0x0201_4B50
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

    /// - Returns: where the record's bytes lie.
    private func place(_ entry: Entry) throws(ArchiveDamage) -> UInt64 {
        guard entry.headerOffset <= byteCount,
            try number(UInt32.self, at: entry.headerOffset, entry.name) == 0x0403_4B50
        else { throw damage(entry.name, "has no local header where the directory says") }
        let nameLength = UInt64(try number(UInt16.self, at: entry.headerOffset + 26, entry.name))
        let extraLength = UInt64(try number(UInt16.self, at: entry.headerOffset + 28, entry.name))
        let name = try bytes(at: entry.headerOffset + 30, count: nameLength, entry.name)
        guard name.elementsEqual(entry.name.utf8) else {
            throw damage(entry.name, "has another name in its local header")
        }
        guard try number(UInt16.self, at: entry.headerOffset + 8, entry.name) == 0 else {
            throw damage(entry.name, "is compressed")
        }
        return entry.headerOffset + 30 + nameLength + extraLength
    }

    /// - Returns: where the record's bytes lie.
    @discardableResult
    private func check(_ entry: Entry) throws(ArchiveDamage) -> UInt64 {
        let start = try place(entry)
        let sum = try sum(at: start, count: entry.byteCount, entry.name)
        guard sum == entry.crc else {
            throw damage(
                entry.name,
                "its bytes have CRC \(String(sum, radix: 16)), the directory says \(String(entry.crc, radix: 16))"
            )
        }
        return start
    }
}
