/// A fixed number of serial queues for everything that may block on storage. Never a global queue: Dispatch grows those
/// when workers block.
import Dispatch

@Intake
final class DiskQueues {
    private var idle: [DispatchQueue]
    private var waiting: [@Sendable () -> Void] = []

    nonisolated init(count: Int, name: String) {
        idle = (0..<count).map { DispatchQueue(label: "noether-writer.\(name).\($0)") }
    }

    /// Runs `work` on the next free disk queue, in order of asking, then `completion` on the intake queue.
    func run<T: Sendable>(
        _ work: @escaping @Sendable () -> T, completion: @escaping @Sendable @Intake (T) -> Void
    ) {
        guard let queue = idle.popLast() else {
            waiting.append { Intake.enter { self.run(work, completion: completion) } }
            return
        }
        queue.async {
            let result = work()
            Intake.enter {
                self.idle.append(queue)
                if !self.waiting.isEmpty { self.waiting.removeFirst()() }
                completion(result)
            }
        }
    }
}
