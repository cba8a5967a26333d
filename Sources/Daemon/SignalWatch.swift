// SPDX-License-Identifier: Apache-2.0
/// Signals as events on the daemon's queue. Made before the socket is there, so that no signal comes too early: one
/// that arrives before anybody handles it waits.
import Dispatch
import Posix
public import Writer

@DaemonActor
public final class SignalWatch {
    private var sources: [any DispatchSourceSignal] = []
    private var pending: [Int32] = []
    var handler: (@Sendable @DaemonActor (Int32) -> Void)? {
        didSet {
            guard let handler else { return }
            let numbers = pending
            pending = []
            for number in numbers { handler(number) }
        }
    }

    /// Returns when the signals are watched.
    public nonisolated init() {
        let ready = DispatchGroup()
        for number in [ThisProcess.terminate, ThisProcess.interrupt, ThisProcess.hangUp] {
            ThisProcess.ignoreSignal(number)
            ready.enter()
            DaemonActor.enter { self.watch(number) { ready.leave() } }
        }
        ready.wait()
    }

    private func watch(_ number: Int32, _ registered: @escaping @Sendable () -> Void) {
        let source = DispatchSource.makeSignalSource(signal: number, queue: DaemonActor.queue)
        source.setRegistrationHandler { registered() }
        source.setEventHandler {
            DaemonActor.assumeIsolated {
                if let handler = self.handler { handler(number) } else { self.pending.append(number) }
            }
        }
        source.activate()
        sources.append(source)
    }
}
