// SPDX-License-Identifier: Apache-2.0
/// The one serial queue that owns sockets, runs, logs and the table of checkpoint jobs.
///
/// Concurrency model: everything marked `@DaemonActor` runs on `DaemonActor.queue`, and the compiler checks it. Disk work runs on
/// the disk queues (`DiskQueues`), which get values and hand values back through `DaemonActor.enter`. Nothing else is shared.
///
/// A global actor with a Dispatch queue under it, since Linux has no DispatchSerialQueue (swift-corelibs-libdispatch#848)
/// and event handlers of Dispatch sources are not checked by the compiler otherwise.
public import Dispatch
import Posix

@globalActor
public actor DaemonActor: GlobalActor {
    public static let shared = DaemonActor()
    public static let queue = DispatchQueue(label: "noether-writer.daemon")

    private final class Executor: SerialExecutor {
        func enqueue(_ job: consuming ExecutorJob) {
            let job = UnownedJob(job)
            DaemonActor.queue.async { job.runSynchronously(on: self.asUnownedSerialExecutor()) }
        }
        func checkIsolated() { dispatchPrecondition(condition: .onQueue(DaemonActor.queue)) }
    }

    private let executor = Executor()
    public nonisolated var unownedExecutor: UnownedSerialExecutor { executor.asUnownedSerialExecutor() }

    /// From any thread: run on the daemon's queue, in order of calling.
    public static func enter(_ work: @escaping @Sendable @DaemonActor () -> Void) {
        Machine.scheduler.async(on: queue) { assumeIsolated(work) }
    }

    /// The same, later.
    public static func enter(after seconds: Double, _ work: @escaping @Sendable @DaemonActor () -> Void) {
        Machine.scheduler.async(on: queue, after: seconds) { assumeIsolated(work) }
    }

    /// From an event handler that Dispatch runs on the daemon's queue. Traps anywhere else.
    public static func assumeIsolated<T: Sendable>(_ work: @DaemonActor () -> T) -> T {
        dispatchPrecondition(condition: .onQueue(queue))
        // What MainActor.assumeIsolated does; the language has no general form for global actors yet.
        return withoutActuallyEscaping(work) { unsafeBitCast($0, to: (() -> T).self)() }
    }
}
