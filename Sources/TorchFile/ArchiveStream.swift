// SPDX-License-Identifier: Apache-2.0
/// The file's bytes in order, for one sequential pass. Payload bytes are copied first and summed where they were copied
/// to: the CRC is of the bytes that get written, whatever happens to the source meanwhile.

public struct ArchiveStream {
    /// Copied and summed at once: small enough that the sum reads from the cache.
    static let pieceByteCount = 128 << 10

    private enum Step { case header, payload, descriptor, tail, done }

    /// A record whose content comes from outside.
    public enum Part: Sendable {
        case pickle
        case storage(Int)
    }

    private let layout: ArchiveLayout
    private let copy: (Part, Int, UnsafeMutableRawBufferPointer) -> Void
    private var step = Step.header
    private var record = 0
    private var position = 0
    private var crc = CRC32()
    private var crcs: [UInt32] = []
    private let knownSums: [UInt32]?
    /// Bytes made here (headers, small records) that are not handed out yet.
    private var pending: [UInt8] = []
    private var pendingStart = 0

    /// - Parameters:
    ///   - knownSums: `storageSums` of a stream of the same storages, if bytes are skipped.
    ///   - copy: fills the buffer with a part's bytes from a position on; asked for no more than the layout says there
    ///     are.
    public init(
        layout: ArchiveLayout, knownSums: [UInt32]? = nil,
        copy: @escaping (Part, Int, UnsafeMutableRawBufferPointer) -> Void
    ) {
        self.layout = layout
        self.knownSums = knownSums
        self.copy = copy
        crcs.reserveCapacity(layout.records.count)
    }

    /// Fills the buffer; fewer bytes only at the end of the file, 0 after it.
    public mutating func read(into buffer: UnsafeMutableRawBufferPointer) -> Int {
        var filled = 0
        while filled < buffer.count {
            let room = UnsafeMutableRawBufferPointer(rebasing: buffer[filled...])
            if pendingStart < pending.count {
                let count = min(room.count, pending.count - pendingStart)
                pending.withUnsafeBytes {
                    room.copyMemory(
                        from: UnsafeRawBufferPointer(rebasing: $0[pendingStart..<pendingStart + count]))
                }
                pendingStart += count
                filled += count
                continue
            }
            if step == .payload, record == 0 || isStorage(record) {
                let length = Int(layout.records[record].byteCount)
                let count = min(room.count, length - position, Self.pieceByteCount)
                if count > 0 {
                    let piece = UnsafeMutableRawBufferPointer(rebasing: room[..<count])
                    copy(
                        record == 0 ? .pickle : .storage(record - ArchiveLayout.firstStorage), position, piece
                    )
                    if knownSums == nil || record == 0 { crc.update(UnsafeRawBufferPointer(piece)) }
                    position += count
                    filled += count
                    continue
                }
            }
            guard advance() else { break }
        }
        return filled
    }

    /// Continues after this many bytes of a storage, which are in the file already.
    public mutating func skip(_ byteCount: Int) {
        precondition(
            knownSums != nil && step == .payload && isStorage(record) && pendingStart == pending.count)
        position += byteCount
        precondition(position <= layout.records[record].byteCount)
    }

    /// The CRC-32 of each storage, when all of the file was read.
    public var storageSums: [UInt32] {
        precondition(step == .done)
        return Array(crcs[ArchiveLayout.firstStorage..<ArchiveLayout.firstStorage + layout.storageCount])
    }

    private func isStorage(_ index: Int) -> Bool {
        index >= ArchiveLayout.firstStorage && index < ArchiveLayout.firstStorage + layout.storageCount
    }

    /// Goes one step on; false at the end.
    private mutating func advance() -> Bool {
        var made = ZipHeaders()
        switch step {
        case .header:
            made.localHeader(layout.records[record])
            hold(made.bytes)
            position = 0
            crc = CRC32()
            step = .payload
            if record != 0, !isStorage(record) {
                let content = smallContent(record)
                content.withUnsafeBytes { crc.update($0) }
                pending += content
            }
        case .payload:
            step = .descriptor
        case .descriptor:
            let sum =
                isStorage(record) ? knownSums?[record - ArchiveLayout.firstStorage] ?? crc.value : crc.value
            crcs.append(sum)
            made.descriptor(layout.records[record], crc: sum)
            hold(made.bytes)
            record += 1
            step = record < layout.records.count ? .header : .tail
        case .tail:
            for (index, entry) in layout.records.enumerated() { made.centralEntry(entry, crc: crcs[index]) }
            made.end(layout)
            hold(made.bytes)
            step = .done
        case .done:
            return false
        }
        return true
    }

    private mutating func hold(_ bytes: [UInt8]) {
        pending = bytes
        pendingStart = 0
    }

    private func smallContent(_ index: Int) -> [UInt8] {
        if index < ArchiveLayout.firstStorage { return Array(layout.leading[index - 1].content.utf8) }
        if index == layout.records.count - 1 { return serializationID() }
        return Array(ArchiveLayout.version.content.utf8)
    }

    /// 40 digits that are a function of the content: 20 of the records' names, 20 of their checksums (FNV-1a, 64 bits).
    /// torch.load only logs them.
    private func serializationID() -> [UInt8] {
        var (names, sums): (UInt64, UInt64) = (0xCBF2_9CE4_8422_2325, 0xCBF2_9CE4_8422_2325)
        func add(_ byte: UInt8, to hash: inout UInt64) { hash = (hash ^ UInt64(byte)) &* 0x100_0000_01B3 }
        for entry in layout.records.dropLast() { for byte in entry.name.utf8 { add(byte, to: &names) } }
        for sum in crcs { withUnsafeBytes(of: sum.littleEndian) { for byte in $0 { add(byte, to: &sums) } } }
        return [names, sums].flatMap { hash -> [UInt8] in
            let digits = Array(String(hash).utf8)
            return [UInt8](repeating: UInt8(ascii: "0"), count: 20 - digits.count) + digits
        }
    }
}
