// SPDX-License-Identifier: Apache-2.0
/// A journal that is damaged before its end. A daemon that dies leaves a torn record at the end, and nothing follows
/// that. If whole records follow, they may be durable ones: nobody may take the damage for an end, and let go of them.
import Posix

enum JournalDamage {
    /// How much is summed at most to find the next record: a byte in the wrong place could make each look like one.
    private static let sumByteCount = 256 << 20

    /// Keeps a copy of a journal whose good bytes are followed by damage and then by whole records. Blocks.
    /// - Parameter count: of the good bytes.
    /// - Returns: what to tell the operator; nil if nothing but a torn end follows.
    static func keep(_ file: AppendFile, after count: UInt64, in tracker: Directory) throws(PosixError) -> String? {
        guard try isFollowed(file, after: count) else { return nil }
        let length = try file.byteCount
        let name = try keep(file, length: length, in: tracker)
        return "\(file.path) is damaged at byte \(count) of \(length), and whole updates follow: those before the "
            + "damage are in the log, those after it are not. The damaged journal is kept as \(name). If the power was lost, "
            + "they may be some that were not durable yet; otherwise check the disk"
    }

    private static func isFollowed(_ file: AppendFile, after count: UInt64) throws(PosixError) -> Bool {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: JournalReplay.pieceByteCount, alignment: 16)
        defer { buffer.deallocate() }
        let step = buffer.count - JournalReplay.longestRecordByteCount
        var (offset, sumsLeft) = (count, sumByteCount)
        while true {
            let found = try file.read(at: offset, into: buffer)
            if JournalReplay.holdsRecord(
                UnsafeRawBufferPointer(rebasing: buffer[..<found]), in: step, sumByteCount: &sumsLeft)
            {
                return true
            }
            guard found > step else { return false }
            offset += UInt64(step)
        }
    }

    /// A copy, and not a second name: a journal has one name, or no daemon appends to it.
    private static func keep(_ file: AppendFile, length: UInt64, in tracker: Directory) throws(PosixError) -> String {
        for number in 1... {
            let name = "entries.\(number).journal"
            switch try AppendFile.open(name, in: tracker, create: false, locks: false) {
            case .missing:
                _ = try file.copied(to: name, in: tracker, length: length)
                return name
            case .file(let kept):
                // Of a recovery that did not come to its end. Each try would keep one more otherwise.
                if try kept.isSame(as: file) { return name }
            case .held: continue
            }
        }
        preconditionFailure("there are not so many names")
    }
}
