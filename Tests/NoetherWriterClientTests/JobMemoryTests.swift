// SPDX-License-Identifier: Apache-2.0
/// What a job may still take of its memory, read from files as the kernel has them.
import Foundation
import Posix
import Testing

@testable import NoetherWriterClient

@Suite struct JobMemoryTests {
    private static func root(_ files: [String: String]) throws -> String {
        let root = FileManager.default.temporaryDirectory.appending(path: "job-\(UUID())").path()
        for (name, text) in files {
            let path = "\(root)\(name)"
            let folder = String(path[..<path.lastIndex(of: "/")!])
            try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
            try text.write(toFile: path, atomically: false, encoding: .utf8)
        }
        return root
    }

    private static let two = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
    private static let one = "36 32 0:31 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"

    @Test func theSmallestLimitAboveCounts() throws {
        let root = try Self.root([
            "/proc/self/cgroup": "0::/job/step\n", "/proc/self/mountinfo": Self.two,
            "/sys/fs/cgroup/job/step/memory.max": "max\n", "/sys/fs/cgroup/job/step/memory.current": "7\n",
            "/sys/fs/cgroup/job/memory.max": "1000\n", "/sys/fs/cgroup/job/memory.current": "700\n",
            // What the kernel could give back counts as free; shared memory does not.
            "/sys/fs/cgroup/job/memory.stat": "anon 400\nactive_file 50\ninactive_file 150\nshmem 100\n",
        ])
        #expect(JobMemory(root: root).room == 500)
        #expect(JobMemory(root: root).limit == 1000)
    }

    @Test func versionOneHasAHierarchyOfItsOwn() throws {
        let root = try Self.root([
            "/proc/self/cgroup": "7:cpu:/\n4:memory:/job\n0::/\n", "/proc/self/mountinfo": Self.two + Self.one,
            "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000\n",
            "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": "900\n",
            "/sys/fs/cgroup/memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 300\n",
            // No limit.
            "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes": "900\n",
        ])
        #expect(JobMemory(root: root).room == 400)
    }

    @Test func withoutALimitThereIsNone() throws {
        #expect(JobMemory(root: "/nowhere").room == nil)
        #expect(JobMemory(root: "/nowhere").limit == nil)
        let root = try Self.root(["/proc/self/cgroup": "0::/../outside\n", "/proc/self/mountinfo": Self.two])
        #expect(JobMemory(root: root).room == nil)
    }

    @Test func buffersKeepWithinTheJob() throws {
        let megabyte = 1 << 20
        let root = try Self.root([
            "/proc/self/cgroup": "0::/job\n", "/proc/self/mountinfo": Self.two,
            "/sys/fs/cgroup/job/memory.max": "\(100 * megabyte)\n",
            "/sys/fs/cgroup/job/memory.current": "\(20 * megabyte)\n",
        ])
        let variables = try Variables { $0 == Variable.poolTimeout.rawValue ? "0.01" : nil }
        let pool = BufferPool(variables, job: JobMemory(root: root))
        #expect(throws: NoetherWriterError.jobMemory(needed: 81 * megabyte, room: 80 * megabyte)) {
            try pool.reserve(81 * megabyte)
        }
        let held = try pool.reserve(40 * megabyte)
        // The test's job does not notice what is held, so that its room stays as it was, less what is left for the
        // trainer.
        #expect(throws: NoetherWriterError.self) { try pool.reserve(90 * megabyte) }
        pool.release(held.number)
        #expect(try pool.reserve(30 * megabyte).capacity >= 30 * megabyte)
    }
}
