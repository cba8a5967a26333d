// SPDX-License-Identifier: Apache-2.0
import Glibc
import Posix
import SimulatedMachine
import Testing

@testable import Writer

struct DirectoryTests {
    /// Its maker may have failed to, or died.
    @Test func aDirectoryThatIsThereIsMadeDurable() async {
        await #expect(processExitsWith: .success) {
            try await Scenario.run { scenario in
                let data = try Directory.open("/data")
                scenario.refuse([.fsync], EIO)
                var refusal: PosixError?
                do { _ = try data.child("new") } catch let error as PosixError { refusal = error }
                try scenario.require(refusal?.errno == EIO, "a directory that is not durable is given")
                scenario.takeAll()
                try scenario.require(scenario.disk.find("/data/new") != nil, "it is not there")
                try scenario.require(scenario.disk.find("/data/new", isSafe: true) == nil, "it is durable already")
                _ = try data.child("new")
                try scenario.require(scenario.disk.find("/data/new", isSafe: true) != nil, "it is not durable")
            }
        }
    }
}
