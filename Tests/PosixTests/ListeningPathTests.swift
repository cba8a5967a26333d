// SPDX-License-Identifier: Apache-2.0
import Foundation
import Glibc
import Testing

@testable import Posix

@Suite
struct ListeningPathTests {
    /// Short, for the length of a socket's address.
    let folder = FileManager.default.temporaryDirectory.path + "/nw-\(UInt32.random(in: 0 ... .max))"
    var path: String { folder + "/d/socket" }
    var lock: String { path + ".lock" }

    init() throws { _ = try Directory.openOrCreateRoot(folder + "/d") }

    private var written: String? { try? String(contentsOfFile: lock, encoding: .utf8) }

    @Test("The lock file names its process, also after a longer number")
    func testOwner() throws {
        try "4123456".write(toFile: lock, atomically: false, encoding: .utf8)
        let listening = try ListeningPath(path)
        #expect(written == String(getpid()))
        #expect(ListeningPath.holder(of: path)?.pid == getpid())
        listening.remove()
    }

    @Test("Who reads the number while another process writes its own finds one of the two")
    func testOwnerWhileItChanges() throws {
        // No process has it: it is above what Linux gives.
        let before = "1234567890"
        try before.write(toFile: lock, atomically: false, encoding: .utf8)
        let reader = Thread { [lock] in
            while !Thread.current.isCancelled {
                let file = open(lock, O_RDONLY)
                var bytes = [UInt8](repeating: 0, count: 32)
                let count = read(file, &bytes, bytes.count)
                close(file)
                let number = String(decoding: bytes.prefix(max(0, count)), as: UTF8.self)
                    .trimmingCharacters(in: .whitespaces)
                #expect(number == before || number == String(getpid()))
            }
        }
        reader.start()
        for _ in 0..<500 {
            let listening = try ListeningPath(path)
            listening.remove()
            try before.write(toFile: lock, atomically: true, encoding: .utf8)
        }
        reader.cancel()
    }
}
