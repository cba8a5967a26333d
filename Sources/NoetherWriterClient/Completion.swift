// SPDX-License-Identifier: Apache-2.0
/// A value that arrives once, and those who wait for it: blocked threads and suspended tasks.
import Dispatch
internal import Synchronization

final class Completion<Value: Sendable>: Sendable {
    private struct State {
        var value: Value?
        var callbacks: [@Sendable (Value) -> Void] = []
    }
    private let state = Mutex(State())

    var value: Value? { state.withLock { $0.value } }

    /// The first value counts.
    func complete(_ value: Value) {
        let callbacks = state.withLock { state in
            guard state.value == nil else { return [@Sendable (Value) -> Void]() }
            state.value = value
            defer { state.callbacks = [] }
            return state.callbacks
        }
        for callback in callbacks { callback(value) }
    }

    func whenComplete(_ callback: @escaping @Sendable (Value) -> Void) {
        let value = state.withLock { state in
            if state.value == nil { state.callbacks.append(callback) }
            return state.value
        }
        if let value { callback(value) }
    }

    /// Blocks until the value is there; nil if the time is over first.
    func wait(until deadline: DispatchTime) -> Value? {
        if let value { return value }
        let arrived = DispatchSemaphore(value: 0)
        whenComplete { _ in arrived.signal() }
        _ = arrived.wait(timeout: deadline)
        return value
    }

    func arrived() async -> Value {
        await withCheckedContinuation { continuation in whenComplete { continuation.resume(returning: $0) } }
    }
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
