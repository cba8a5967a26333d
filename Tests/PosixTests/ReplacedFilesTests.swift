// SPDX-License-Identifier: Apache-2.0
import Foundation
import Glibc
import Testing

@testable import Posix

/// Descriptors of this process whose file is gone from `folder`.
private func heldCount(in folder: String) -> Int {
    let names = (try? FileManager.default.contentsOfDirectory(atPath: "/proc/self/fd")) ?? []
    return names.count { name in
        let target =
            (try? FileManager.default.destinationOfSymbolicLink(atPath: "/proc/self/fd/\(name)")) ?? ""
        return target.hasPrefix(folder) && target.hasSuffix(" (deleted)")
    }
}

@Suite(.serialized)
struct ReplacedFilesTests {
    let folder: String
    let directory: Directory

    init() throws {
        folder = FileManager.default.temporaryDirectory.path + "/nw-replaced-\(UInt64.random(in: 0 ... .max))"
        directory = try Directory.openOrCreateRoot(folder)
    }

    private func write(_ name: String, failing: Bool = false) throws(PosixError) {
        let length = DurableFile.chunkByteCount * 2
        try DurableFile.write(name, in: directory, length: UInt64(length)) { buffer throws(PosixError) in
            if failing { throw PosixError(EIO, "made up") }
            buffer.initializeMemory(as: UInt8.self, repeating: 7)
            return buffer.count
        }
    }

    /// They are closed on a queue of their own.
    private func untilNoneIsHeld() async throws {
        for _ in 0..<1000 where heldCount(in: folder) > 0 { try await Task.sleep(for: .milliseconds(10)) }
        #expect(heldCount(in: folder) == 0)
    }

    @Test func heldWhileSomebodyWrites() async throws {
        try write("a")
        ReplacedFiles.enter(directory.device)
        try write("a")
        try write("a")
        #expect(heldCount(in: folder) == 2)
        ReplacedFiles.leave(directory.device)
        try await untilNoneIsHeld()
        try FileManager.default.removeItem(atPath: folder)
    }

    @Test func letGoWhereNobodyElseWrites() async throws {
        try write("a")
        try write("a")
        try await untilNoneIsHeld()
        try FileManager.default.removeItem(atPath: folder)
    }

    @Test func letGoWhereAWriteFails() async throws {
        try write("a")
        ReplacedFiles.enter(directory.device)
        defer { ReplacedFiles.leave(directory.device) }
        try write("a")
        #expect(heldCount(in: folder) == 1)
        #expect(throws: PosixError.self) { try write("a", failing: true) }
        try await untilNoneIsHeld()
        try FileManager.default.removeItem(atPath: folder)
    }

    @Test func letGoAfterAWhile() async throws {
        try write("a")
        ReplacedFiles.enter(directory.device)
        defer { ReplacedFiles.leave(directory.device) }
        try write("a")
        #expect(heldCount(in: folder) == 1)
        try await untilNoneIsHeld()
        try FileManager.default.removeItem(atPath: folder)
    }
}
