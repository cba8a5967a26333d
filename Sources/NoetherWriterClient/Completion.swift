// SPDX-License-Identifier: Apache-2.0
/// A value that arrives once, and those who wait for it: blocked threads, and tasks that hold no thread.
import Dispatch
internal import Posix
internal import Synchronization

final class Completion<Value: Sendable>: Sendable {
    private struct State {
        var value: Value?
        var next = 0
        var callbacks: [Int: @Sendable (Value) -> Void] = [:]
    }
    private let state = Mutex(State())

    var value: Value? { state.withLock { $0.value } }

    /// The first value counts.
    func complete(_ value: Value) {
        let callbacks = state.withLock { state in
            guard state.value == nil else { return [Int: @Sendable (Value) -> Void]() }
            state.value = value
            defer { state.callbacks = [:] }
            return state.callbacks
        }
        for callback in callbacks.values { callback(value) }
    }

    /// - Returns: what `forget` takes; nil if the value was there, and the callback has run.
    @discardableResult
    private func whenComplete(_ callback: @escaping @Sendable (Value) -> Void) -> Int? {
        let (value, number) = state.withLock { state -> (Value?, Int?) in
            if let value = state.value { return (value, nil) }
            state.next += 1
            state.callbacks[state.next] = callback
            return (nil, state.next)
        }
        if let value { callback(value) }
        return number
    }

    private func forget(_ number: Int?) {
        if let number { state.withLock { $0.callbacks[number] = nil } }
    }

    /// Blocks until the value is there, or nil if the time ran out first.
    func wait(until deadline: DispatchTime) -> Value? {
        if let value { return value }
        let arrived = DispatchSemaphore(value: 0)
        let number = whenComplete { _ in arrived.signal() }
        defer { forget(number) }
        _ = arrived.wait(timeout: deadline)
        return value
    }

    /// Suspends this task until the value is there, the time is over, or the task is cancelled: nil then.
    func arrived(until deadline: DispatchTime) async -> Value? {
        if let value { return value }
        let wakeUp = WakeUp()
        let number = whenComplete { _ in wakeUp.signal() }
        defer { forget(number) }
        let timer = deadline == .distantFuture ? nil : DispatchWorkItem { wakeUp.signal() }
        if let timer { DispatchQueue.waits.asyncAfter(deadline: deadline, execute: timer) }
        await withTaskCancellationHandler {
            await wakeUp.wait()
        } onCancel: {
            wakeUp.signal()
        }
        timer?.cancel()
        return value
    }
}

/// Ends one suspension, once, whoever comes first.
final class WakeUp: Sendable {
    private struct State {
        var isOver = false
        var continuation: CheckedContinuation<Void, Never>?
    }
    private let state = Mutex(State())

    func signal() {
        state.withLock { state in
            state.isOver = true
            return state.continuation.take()
        }?.resume()
    }

    func wait() async {
        await withCheckedContinuation { continuation in
            let isOver = state.withLock { state in
                if !state.isOver { state.continuation = continuation }
                return state.isOver
            }
            if isOver { continuation.resume() }
        }
    }
}

extension DispatchQueue {
    /// The ends of waits with a time limit: nothing blocks here.
    static let waits = DispatchQueue(label: "noether-writer.waits")
}

/// Runs what blocks for a while on a thread that is not the tasks'.
func offTasks<Value: Sendable>(
    _ body: @escaping @Sendable () throws(NoetherWriterError) -> Value
) async throws(NoetherWriterError) -> Value {
    let result: Result<Value, NoetherWriterError> = await withCheckedContinuation { continuation in
        OwnThread.start {
            do throws(NoetherWriterError) { continuation.resume(returning: .success(try body())) } catch {
                continuation.resume(returning: .failure(error))
            }
        }
    }
    return try result.get()
}

extension DispatchTime {
    static func after(_ duration: Duration?) -> DispatchTime {
        guard let duration else { return .distantFuture }
        return .now() + duration.seconds
    }
}

extension Duration {
    var seconds: Double { Double(components.seconds) + Double(components.attoseconds) * 1e-18 }
}
