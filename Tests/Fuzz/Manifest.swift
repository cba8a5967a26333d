// SPDX-License-Identifier: Apache-2.0
/// Fuzz target: what a `save` says of its memfd. The bytes are a payload as it comes, or (first bit of the first byte)
/// numbers from which a likely one is made. Whatever the checks let through must give a file that verifies, from a
/// memfd of 64 KiB.
import Posix
import TorchFile
import Wire

@testable import Writer

private let memory: OwnedFD = {
    do {
        let memory = try SharedMemory(capacity: 1 << 16)
        for index in 0..<1 << 16 { memory.bytes[index] = UInt8(truncatingIfNeeded: index &* 31) }
        return memory.fd
    } catch { preconditionFailure("no memfd: \(error)") }
}()

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzManifest(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
    let bytes = Array(UnsafeBufferPointer(start: data, count: size))
    guard let first = bytes.first else { return 0 }
    let payload =
        first & 1 == 0 ? try? SavePayload(decoding: Array(bytes.dropFirst())) : made(bytes.dropFirst())
    guard let payload, let snapshot = try? Snapshot(payload, in: "/r/checkpoints", fd: memory)
    else { return 0 }
    for index in snapshot.targets.indices where snapshot.targets[index].byteCount <= 1 << 20 {
        // A file whose bytes are the buffer's has no layout.
        guard let layout = snapshot.targets[index].layout else { continue }
        let image = image(snapshot, index, layout)
        precondition(
            UInt64(image.count) == snapshot.targets[index].byteCount, "another length than the layout's")
        do {
            let names = try image.withUnsafeBytes { try ArchiveVerifier($0).verify() }
            precondition(names.count == payload.storageLengths.count + 6)
        } catch { preconditionFailure("an accepted save gives a broken file: \(error)") }
    }
    return 0
}

private func image(_ snapshot: Snapshot, _ index: Int, _ layout: ArchiveLayout) -> [UInt8] {
    let target = snapshot.targets[index]
    var stream = ArchiveStream(layout: layout) { part, position, buffer in
        let start =
            switch part {
            case .pickle: target.pickle.lowerBound
            case .storage(let number): snapshot.storages[number].lowerBound
            }
        do { try snapshot.memory.copy(from: start + position, to: buffer) } catch {
            preconditionFailure("a checked place can't be read: \(error)")
        }
    }
    var image: [UInt8] = []
    var piece = [UInt8](repeating: 0, count: 4096)
    while true {
        let count = piece.withUnsafeMutableBytes { stream.read(into: $0) }
        if count == 0 { return image }
        image += piece[..<count]
    }
}

/// Small numbers mostly, and their neighbours of powers of two: what a random payload would never be.
private func made(_ bytes: ArraySlice<UInt8>) -> SavePayload {
    var rest = bytes
    func byte() -> UInt8 { rest.popFirst() ?? 0 }
    func number() -> UInt64 {
        let kind = byte()
        switch kind % 4 {
        case 0: return UInt64(byte())
        case 1: return UInt64(byte()) << 8 | UInt64(byte())
        case 2: return (1 << (UInt64(byte()) % 64)) &- UInt64(kind >> 2)
        default: return UInt64.max &- UInt64(byte())
        }
    }
    let lengths = (0..<Int(byte()) % 9).map { _ in number() }
    let end = SavePayload.storagePlaces(lengths)?.end ?? 0
    let isRight = byte() & 3 != 0
    let storagesLength = isRight ? end : number()
    let names = ["net", "a.b", "..", "", "x/y", "n\u{0}", String(repeating: "ä", count: 130)]
    var offset = end
    let targets = (0..<Int(byte()) % 5).map { index in
        let length = number()
        defer { offset = offset &+ length }
        return SavePayload.Target(
            kind: CheckpointKind.allCases[Int(byte()) % 3], name: names[Int(byte()) % names.count],
            tag: "t\(index % 3)", info: byte() & 1 == 0 ? nil : names[Int(byte()) % names.count],
            pickleOffset: byte() & 3 == 0 ? number() : offset, pickleLength: length)
    }
    return SavePayload(
        sequence: 1, storageLengths: lengths, storagesLength: storagesLength, buffer: 1, logUpdate: nil,
        targets: targets)
}
