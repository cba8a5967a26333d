// SPDX-License-Identifier: Apache-2.0
/// Buffers of saves: used again, given back, and bounded.
import Testing

@testable import NoetherWriterClient

@Suite struct BufferPoolTests {
    private static func pool(_ variables: [Variable: String]) throws -> BufferPool {
        try BufferPool(Variables { name in Variable(rawValue: name).flatMap { variables[$0] } })
    }

    @Test func aReleasedBufferIsUsedAgain() throws {
        let pool = try Self.pool([:])
        let first = try pool.reserve(3_000_000)
        pool.release(first.number)
        let second = try pool.reserve(3_500_000)
        #expect(second.number == first.number)
    }

    @Test func whatIsNotUsedGoes() async throws {
        let pool = try Self.pool([.poolIdleSeconds: "0.05"])
        let buffer = try pool.reserve(3_000_000)
        pool.release(buffer.number)
        #expect(pool.byteCount == buffer.capacity)
        while pool.byteCount > 0 { try await Task.sleep(for: .milliseconds(5)) }
        #expect(try pool.reserve(3_000_000).number != buffer.number)
    }

    @Test func aFullPoolSaysSo() throws {
        let pool = try Self.pool([.poolBytes: "8388608", .poolTimeout: "0.02"])
        let held = try pool.reserve(6 << 20)
        #expect(throws: NoetherWriterError.poolExhausted(held: held.capacity, needed: 4 << 20, limit: 8 << 20)) {
            try pool.reserve(4 << 20)
        }
    }

    @Test func buffersLeaveDescriptorsToTheProgram() throws {
        let variables = try Variables { $0 == Variable.poolTimeout.rawValue ? "0.02" : nil }
        let pool = BufferPool(variables, mostCount: 2)
        let held = [try pool.reserve(1), try pool.reserve(1)]
        #expect(throws: NoetherWriterError.tooManySaves(count: 2)) { try pool.reserve(1) }
        pool.release(held[0].number)
        // One of another size takes the place of the free one.
        #expect(try pool.reserve(8 << 20).capacity >= 8 << 20)
    }

    @Test func aWaiterGetsWhatIsReleased() async throws {
        let pool = try Self.pool([.poolBytes: "8388608", .poolTimeout: "30"])
        let held = try pool.reserve(6 << 20)
        async let next = Task.detached { try pool.reserve(6 << 20) }.value
        pool.release(held.number)
        #expect(try await next.number == held.number)
    }
}
