// SPDX-License-Identifier: Apache-2.0
/// An answer that is given once: the first one counts, and those after it are dropped. Owned by the daemon's queue.
@DaemonActor
public final class Once<Answer: Sendable> {
    private var completion: (@Sendable @DaemonActor (Answer) -> Void)?
    private var remaining: Int

    /// - Parameter count: how many calls of `count(then:)` make an answer.
    public nonisolated init(
        counting count: Int = 1, _ completion: @escaping @Sendable @DaemonActor (Answer) -> Void
    ) {
        remaining = count
        self.completion = completion
    }

    /// - Returns: whether this was the first answer.
    @discardableResult
    public func give(_ answer: Answer) -> Bool {
        guard let completion else { return false }
        self.completion = nil
        completion(answer)
        return true
    }

    /// One of those that are counted has ended: the last one gives the answer.
    public func count(then answer: Answer) {
        remaining -= 1
        if remaining == 0 { give(answer) }
    }

    /// If there is no answer after this time, works one out and gives it.
    public func give(
        after seconds: Double, _ answer: @escaping @Sendable @DaemonActor () -> Answer
    ) {
        DaemonActor.enter(after: seconds) { if self.completion != nil { self.give(answer()) } }
    }
}
