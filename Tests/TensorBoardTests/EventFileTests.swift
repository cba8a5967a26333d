// SPDX-License-Identifier: Apache-2.0
import Testing

@testable import TensorBoard

@Suite struct EventFileTests {
    @Test func checksumsAreCastagnolis() {
        // RFC 3720, appendix B.4, and the check value of the catalogue of CRCs.
        #expect(Array("123456789".utf8).withUnsafeBytes { CRC32C.value($0) } == 0xE306_9283)
        #expect([UInt8](repeating: 0, count: 32).withUnsafeBytes { CRC32C.value($0) } == 0x8A91_36AA)
        #expect([UInt8](repeating: 0xFF, count: 32).withUnsafeBytes { CRC32C.value($0) } == 0x62A8_AB43)
        #expect(Array(UInt8(0)..<32).withUnsafeBytes { CRC32C.value($0) } == 0x46DD_794E)
    }

    @Test(arguments: [0, 1, 127, 128, 16_383, 16_384, 1 << 35, .max] as [UInt64])
    func varintsAreCounted(value: UInt64) {
        var writer = ProtobufWriter()
        writer.varint(value)
        #expect(writer.bytes.count == ProtobufWriter.varintByteCount(value))
    }

    private func rows(_ steps: some Sequence<Int64>) -> [UInt8] {
        var bytes: [UInt8] = []
        for step in steps {
            EventFile.append(
                [("loss", .scalar(0.5)), ("t", .text("x"))], step: step, wallTime: 1, to: &bytes)
        }
        return bytes
    }

    private func start(at step: Int64) -> [UInt8] {
        var bytes: [UInt8] = []
        EventFile.appendHeader(wallTime: 1, to: &bytes)
        EventFile.appendStart(at: step, wallTime: 1, to: &bytes)
        return bytes
    }

    private func lastStep(_ files: [UInt8]...) -> Int64? {
        var scan = EventScan()
        for file in files {
            scan.nextFile()
            _ = file.withUnsafeBytes { scan.read($0) }
        }
        return scan.lastStep
    }

    @Test func whatIsShownIsFoundOut() {
        #expect(lastStep() == nil)
        #expect(lastStep(start(at: 0)) == nil)
        #expect(lastStep(start(at: 0) + rows(1...5)) == 5)
        #expect(lastStep(start(at: -3) + rows(-3...(-2))) == -2)
        // A later file takes back.
        #expect(lastStep(start(at: 0) + rows(1...5), start(at: 4)) == 3)
        #expect(lastStep(start(at: 0) + rows(1...5), start(at: 4) + rows(4...9)) == 9)
        #expect(lastStep(start(at: 0) + rows(1...5), start(at: 9)) == 5)
    }

    @Test func whereToCutIsFoundOut() {
        let file = start(at: 0) + rows(1...5)
        for kept in Int64(0)...6 {
            var scan = EventScan(keeping: kept)
            _ = file.withUnsafeBytes { scan.read($0) }
            #expect(scan.cut == (kept < 5 ? UInt64(start(at: 0).count + rows(1..<(kept + 1)).count) : nil))
            scan.nextFile()
            _ = start(at: 6).withUnsafeBytes { scan.read($0) }
            #expect(scan.cut == nil && scan.lastStep == 5)
        }
    }

    /// A file that was cut off anywhere shows its whole events, and what follows in pieces is the same as at once.
    @Test func aFileMayBeCutAnywhere() {
        let file = start(at: 0) + rows(1...3)
        let ends = (0...3).map { start(at: 0).count + rows(1..<(1 + $0)).count }
        for count in 0...file.count {
            let whole = ends.lastIndex { $0 <= count }
            #expect(lastStep(Array(file[..<count])) == (whole ?? 0 > 0 ? Int64(whole ?? 0) : nil))
            var scan = EventScan()
            let first = file[..<count].withUnsafeBytes { scan.read($0) }
            let second = file[first...].withUnsafeBytes { scan.read($0) }
            #expect(scan.lastStep == 3 && first + second == file.count && !scan.isBroken)
        }
    }

    @Test func whatIsBrokenEndsItsFile() {
        let good = start(at: 0) + rows(1...2)
        var file = good + rows(3...4)
        for index in good.count..<(good.count + rows(3...3).count) {
            file[index] ^= 0x40
            var scan = EventScan()
            #expect(file.withUnsafeBytes { scan.read($0) } == good.count)
            #expect(scan.lastStep == 2)
            file[index] ^= 0x40
        }
    }
}
