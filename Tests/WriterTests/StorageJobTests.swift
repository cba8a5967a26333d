// SPDX-License-Identifier: Apache-2.0
import Dispatch
import Foundation
import Posix
import Testing

@testable import Writer

/// Refuses so often, and says what it was asked.
private final class Storage: Sendable {
    let refusals: Mutexed<[PosixError]>
    let tries = Mutexed(0)
    init(_ refusals: [PosixError]) { self.refusals = Mutexed(refusals) }

    func use() throws(PosixError) -> Int {
        let count = tries.with { count -> Int in
            count += 1
            return count
        }
        let refusal = refusals.with { $0.isEmpty ? nil : $0.removeFirst() }
        if let refusal { throw refusal }
        return count
    }
}

private final class Mutexed<Value: Sendable>: @unchecked Sendable {
    private let lock = NSLock()
    private var value: Value
    init(_ value: Value) { self.value = value }
    func with<Result>(_ body: (inout Value) -> Result) -> Result {
        lock.lock()
        defer { lock.unlock() }
        return body(&value)
    }
}

/// Runs it until it has ended; what was told on the way, in words.
@DaemonActor
private func run(_ storage: Storage, _ patience: StorageJob.Patience) async -> [String] {
    let told = Mutexed<[String]>([])
    let job = StorageJob(DiskQueues(count: 1, name: "test"), patience, letGo: { told.with { $0.append("let go") } })
    await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
        @DaemonActor func begin() {
            job.run(
                at: .path("/"), "write", "/a/file", { () throws(PosixError) in try storage.use() },
                refused: { error in told.with { $0.append("refused \(error.name) \(job.refusals)") } },
                again: { begin() },
                ended: { result in
                    switch result {
                    case .success(let count): told.with { $0.append("done \(count)") }
                    case .failure(let error): told.with { $0.append("given up \(error.name)") }
                    }
                    continuation.resume()
                })
        }
        begin()
    }
    #expect(job.refusal == nil && job.refusals == 0 && !job.isWaiting)
    return told.with { $0 }
}

@Test func `A lack of room is tried again and lets go of nothing`() async {
    let told = await run(Storage([PosixError(ENOSPC, "write")]), .whileRetryable)
    #expect(told == ["refused ENOSPC 1", "done 2"])
}

@Test func `Another refusal that may pass lets go of what is open before the next try`() async {
    let told = await run(Storage([PosixError(EIO, "write")]), .whileRetryable)
    #expect(told == ["let go", "refused EIO 1", "done 2"])
}

@Test func `A refusal that can not pass ends the work unless it is tried always`() async {
    #expect(await run(Storage([PosixError(EISDIR, "write")]), .whileRetryable) == ["given up EISDIR"])
    #expect(await run(Storage([PosixError(EISDIR, "write")]), .always) == ["let go", "refused EISDIR 1", "done 2"])
}

@Test @DaemonActor func `The first answer counts and those after it are dropped`() {
    let given = Mutexed<[Int]>([])
    let once = Once<Int> { answer in given.with { $0.append(answer) } }
    #expect(once.give(1))
    #expect(!once.give(2))
    #expect(given.with { $0 } == [1])
}

@Test @DaemonActor func `The last of those that are counted gives the answer`() {
    let given = Mutexed<[Int]>([])
    let once = Once<Int>(counting: 3) { answer in given.with { $0.append(answer) } }
    once.count(then: 1)
    once.count(then: 2)
    #expect(given.with { $0 }.isEmpty)
    once.count(then: 3)
    once.count(then: 4)
    #expect(given.with { $0 } == [3])
}
