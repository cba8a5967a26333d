// SPDX-License-Identifier: Apache-2.0
/// Serial queues for everything that may block on storage: so many for each file system, made while it has work. One that hangs (a
/// dead network mount, a frozen disk) holds up its own files and nobody else's. Never a global queue: Dispatch grows those when
/// workers block. Owned by the daemon's queue.
import Dispatch
import Posix

@DaemonActor
final class DiskQueues {
    /// What may hang together.
    enum Place: Sendable, Hashable {
        /// A file system, by its device number.
        case device(UInt64)
        /// What is not open yet, by the path that opens it: finding out its device may hang too.
        case path(String)
    }

    /// Storage that moves nothing for so long is reported, and again after each such time.
    nonisolated static let silenceSeconds = 10.0
    private static let lookSeconds = 2.0
    /// Places with work at one moment; more share queues.
    nonisolated static let places = 32

    /// Somebody's work, from asking for a queue to its end.
    @DaemonActor
    private final class Job {
        /// Returns what is to be done on the daemon's queue behind it.
        nonisolated let work: @Sendable () -> @Sendable @DaemonActor () -> Void
        let progress: @Sendable () -> UInt64
        let silent: (@Sendable @DaemonActor (Double) -> Void)?
        var movedBytes: UInt64 = 0
        var movedSeconds = Clock.monotonicSeconds
        var reportedSeconds = Clock.monotonicSeconds

        init(
            _ work: @escaping @Sendable () -> @Sendable @DaemonActor () -> Void,
            _ progress: @escaping @Sendable () -> UInt64, _ silent: (@Sendable @DaemonActor (Double) -> Void)?
        ) {
            self.work = work
            self.progress = progress
            self.silent = silent
        }

        func reportSilence(_ now: Double) {
            guard now - reportedSeconds >= DiskQueues.silenceSeconds else { return }
            reportedSeconds = now
            silent?(now - movedSeconds)  // guard: silence-said (skip)
        }
    }

    @DaemonActor
    private final class Lane {
        var idle: [DispatchQueue]
        var running: [Job] = []
        var waiting: [Job] = []

        init(_ queues: [DispatchQueue]) { idle = queues }
    }

    private let count: Int
    let name: String
    private var lanes: [Place: Lane] = [:]
    private var isLooking = false

    nonisolated init(count: Int, name: String) {
        self.count = count
        self.name = name
    }

    /// Runs `work` on the place's next free queue, in order of asking, then `completion` on the daemon's queue.
    /// - Parameters:
    ///   - progress: grows while the work moves; read on the daemon's queue.
    ///   - silent: hears for how many seconds nothing has moved, where these are many.
    func run<T: Sendable>(
        at place: Place, _ work: @escaping @Sendable () -> T,
        progress: @escaping @Sendable () -> UInt64 = { 0 },
        silent: (@Sendable @DaemonActor (Double) -> Void)? = nil,
        completion: @escaping @Sendable @DaemonActor (T) -> Void
    ) {
        var place = place  // guard: own-queues (= .path("all"))
        if lanes[place] == nil {
            if lanes.count < Self.places {
                lanes[place] = Lane(
                    (0..<count).map { DispatchQueue(label: "noether-writer.\(name).\($0)") })
            } else if let least = lanes.min(by: { $0.value.waiting.count < $1.value.waiting.count }) {
                place = least.key
            }
        }
        let job = Job(
            {
                let result = work()
                return { completion(result) }
            }, progress, silent)
        if let lane = lanes[place] {
            lane.waiting.append(job)
            startNext(lane, at: place)
        }
        look()
    }

    private func startNext(_ lane: Lane, at place: Place) {
        guard !lane.waiting.isEmpty, let queue = lane.idle.popLast() else { return }
        let job = lane.waiting.removeFirst()
        job.movedSeconds = Clock.monotonicSeconds
        lane.running.append(job)
        Machine.scheduler.async(on: queue) {
            let complete = job.work()
            DaemonActor.enter {
                lane.running.removeAll { $0 === job }
                lane.idle.append(queue)
                self.startNext(lane, at: place)
                if lane.running.isEmpty { self.lanes[place] = nil }
                complete()
            }
        }
    }

    /// Monotonic, in seconds: when the running work that has been silent longest last moved; nil if none runs.
    var oldestProgressSeconds: Double? { lanes.values.flatMap { $0.running.map(\.movedSeconds) }.min() }
    var runningCount: Int { lanes.values.reduce(0) { $0 + $1.running.count } }
    var waitingCount: Int { lanes.values.reduce(0) { $0 + $1.waiting.count } }

    /// Looks for what does not move, as long as there is work.
    private func look() {
        guard !isLooking, !lanes.isEmpty else { return }
        isLooking = true
        DaemonActor.enter(after: Self.lookSeconds) {
            self.isLooking = false
            let now = Clock.monotonicSeconds
            for lane in self.lanes.values {
                for job in lane.running {
                    let bytes = job.progress()
                    if bytes != job.movedBytes {
                        job.movedBytes = bytes
                        job.movedSeconds = now
                    }
                }
                let silent = lane.running.filter { now - $0.movedSeconds >= Self.silenceSeconds }
                for job in silent { job.reportSilence(now) }
                // Who waits behind nothing but those waits as long.
                if lane.idle.isEmpty, silent.count == lane.running.count {
                    for job in lane.waiting { job.reportSilence(now) }
                }
            }
            self.look()
        }
    }
}
