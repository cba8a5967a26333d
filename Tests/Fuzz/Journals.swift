// SPDX-License-Identifier: Apache-2.0
/// Fuzz target: a journal that a crash, a disk or somebody left. As it is, and (second look) with the CRC of each
/// record put right, so that what is in the records is reached too.
import TorchFile
import Wire

@testable import Writer

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzJournals(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
    let bytes = Array(UnsafeBufferPointer(start: data, count: size))
    replay(bytes)
    replay(withRightSums(bytes))
    return 0
}

private func replay(_ bytes: [UInt8]) {
    guard let found = JournalFormat.replay(bytes) else { return }
    precondition(found.byteCount <= UInt64(bytes.count))
    guard let again = JournalFormat.replay(Array(bytes[..<Int(found.byteCount)])) else {
        preconditionFailure("what is good of a journal does not replay")
    }
    precondition(again.byteCount == found.byteCount && rows(again.log) == rows(found.log))
    // As the next daemon starts its journal with it.
    do {
        let whole = try JournalFormat.encode(found.origin, found.log, lastSequence: found.lastSequence)
        guard let next = JournalFormat.replay(whole) else {
            preconditionFailure("a new journal does not replay")
        }
        precondition(next.byteCount == UInt64(whole.count), "a new journal is cut off")
        precondition(rows(next.log) == rows(found.log) && next.log.keys == found.log.keys)
    } catch { preconditionFailure("a journal's log does not encode: \(error)") }
    // The length that is known beforehand is the one that comes.
    var pickle = EntriesPickle(found.log)
    var bytes = [UInt8](repeating: 0, count: pickle.byteCount)
    bytes.withUnsafeMutableBytes { pickle.read(into: $0) }
    precondition(bytes.last == UInt8(ascii: "."), "the pickle of a log ends elsewhere")
    var cut = found.log
    cut.cut(after: found.log.count > 0 ? found.log.update(row: found.log.count / 2) : 0)
}

private func rows(_ log: LogColumns) -> [LogPayload] {
    (0..<log.count).map { log.payload(row: $0, sequence: 0) }
}

private func withRightSums(_ bytes: [UInt8]) -> [UInt8] {
    var bytes = bytes
    if bytes.count >= 16 { bytes.replaceSubrange(..<16, with: JournalFormat.header) }
    var start = 16
    while start + JournalFormat.recordHeaderByteCount <= bytes.count {
        let length = (0..<4).reduce(0) { $0 | Int(bytes[start + $1]) << (8 * $1) }
        let end = start + JournalFormat.recordHeaderByteCount + length
        guard end <= bytes.count else { break }
        var crc = CRC32()
        bytes[(start + 8)..<end].withUnsafeBytes { crc.update($0) }
        for index in 0..<4 {
            bytes[start + 4 + index] = UInt8(truncatingIfNeeded: crc.value >> (8 * UInt32(index)))
        }
        start = end
    }
    return bytes
}
