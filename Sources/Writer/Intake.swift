// SPDX-License-Identifier: Apache-2.0
/// The one serial queue that owns sockets, runs, logs and the table of checkpoint jobs.
///
/// Concurrency model: everything marked `@Intake` runs on `Intake.queue`, and the compiler checks it. Disk work runs on
/// the disk queues (`DiskQueues`), which get values and hand values back through `Intake.enter`. Nothing else is shared.
///
/// A global actor with a Dispatch queue under it, since Linux has no DispatchSerialQueue (swift-corelibs-libdispatch#848)
/// and event handlers of Dispatch sources are not checked by the compiler otherwise.
public import Dispatch
import Posix

@globalActor
public actor Intake: GlobalActor {
    public static let shared = Intake()
    public static let queue = DispatchQueue(label: "noether-writer.intake")

    private final class Executor: SerialExecutor {
        func enqueue(_ job: consuming ExecutorJob) {
            let job = UnownedJob(job)
            Intake.queue.async { job.runSynchronously(on: self.asUnownedSerialExecutor()) }
        }
        func checkIsolated() { dispatchPrecondition(condition: .onQueue(Intake.queue)) }
    }

    private let executor = Executor()
    public nonisolated var unownedExecutor: UnownedSerialExecutor { executor.asUnownedSerialExecutor() }

    /// From any thread: run on the intake queue, in order of calling.
    public static func enter(_ work: @escaping @Sendable @Intake () -> Void) {
        Machine.scheduler.async(on: queue) { assumeIsolated(work) }
    }

    /// The same, later.
    public static func enter(after seconds: Double, _ work: @escaping @Sendable @Intake () -> Void) {
        Machine.scheduler.async(on: queue, after: seconds) { assumeIsolated(work) }
    }

    /// From an event handler that Dispatch runs on the intake queue. Traps anywhere else.
    public static func assumeIsolated<T: Sendable>(_ work: @Intake () -> T) -> T {
        dispatchPrecondition(condition: .onQueue(queue))
        // What MainActor.assumeIsolated does; the language has no general form for global actors yet.
        return withoutActuallyEscaping(work) { unsafeBitCast($0, to: (() -> T).self)() }
    }
}
