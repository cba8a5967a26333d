// SPDX-License-Identifier: Apache-2.0
/// Time and order. Whatever waits to be done waits in a lane, as on a serial queue; a throw of the dice says which lane
/// goes next. Work that may block (disk work) has a thread of its own, so that it can stop in the middle of each system
/// call; only one thread ever runs, and hands over to the next. So one seed gives one course of events.
package import Dispatch
import Glibc
import Posix
import Writer

/// SplitMix64.
package final class Dice: @unchecked Sendable {
    private var state: UInt64
    package init(seed: UInt64) { state = seed &* 0x9E37_79B9_7F4A_7C15 &+ 0x1234_5678_9ABC_DEF1 }

    package func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }

    package func below(_ count: Int) -> Int { Int(next() % UInt64(count)) }
    package func among(_ range: ClosedRange<Int>) -> Int { range.lowerBound + below(range.count) }
    package func share() -> Double { Double(next() >> 11) / Double(1 << 53) }
    package func chance(_ probability: Double) -> Bool { probability > 0 && share() < probability }
    package func seconds(_ range: ClosedRange<Double>) -> Double {
        range.lowerBound + share() * (range.upperBound - range.lowerBound)
    }
    package func pick<T>(_ values: [T]) -> T { values[below(values.count)] }
}

/// A thread for work that blocks.
package final class Worker: @unchecked Sendable {
    private let go = DispatchSemaphore(value: 0)
    private let back = DispatchSemaphore(value: 0)
    private var work: (() -> Void)?
    package private(set) var isDone = true
    /// Its process is dead: every call fails, so that it comes to its end.
    package var isDead = false

    package init() {
        var thread = pthread_t()
        let code = pthread_create(
            &thread, nil,
            { context in
                Unmanaged<Worker>.fromOpaque(context!).takeUnretainedValue().loop()
                return nil
            }, Unmanaged.passRetained(self).toOpaque())
        precondition(code == 0, "a thread can be made")
    }

    private func loop() {
        while true {
            go.wait()
            work?()
            // Here, while nobody else runs: what it held may do something when it goes.
            work = nil
            isDone = true
            back.signal()
        }
    }

    package func begin(_ work: @escaping () -> Void) {
        self.work = work
        isDone = false
        isDead = false
    }

    /// Runs it until it pauses or ends. Called by the thread that decides.
    package func run() {
        go.signal()
        back.wait()
    }

    /// Called by the work.
    package func pause() {
        back.signal()
        go.wait()
    }
}

package final class Schedule: Scheduler, TimeSource, @unchecked Sendable {
    /// Done in order.
    package final class Lane {
        package let name: String
        /// Dies with the daemon.
        package let isDaemons: Bool
        package let blocks: Bool
        package var tasks: [() -> Void] = []
        package var worker: Worker?
        /// The work, or the next task, goes on then.
        package var wakeTime = 0.0

        package init(_ name: String, isDaemons: Bool, blocks: Bool) {
            self.name = name
            self.isDaemons = isDaemons
            self.blocks = blocks
        }

        package var hasWork: Bool { worker != nil || !tasks.isEmpty }
    }

    private struct Timer {
        let time: Double
        let number: Int
        let lane: Lane
        let task: () -> Void
    }

    package let dice: Dice
    package private(set) var now = 1000.0
    package private(set) var steps = 0
    private var lanes: [Lane] = []
    /// Ascending.
    private var timers: [Timer] = []
    private var timerCount = 0
    private var queueLanes: [ObjectIdentifier: Lane] = [:]
    private var idle: [Worker] = []
    /// Whose work runs; nil: the thread that decides.
    package private(set) var current: Worker?
    /// Disk work pauses in so many of its calls.
    package var pauseShare = 0.3
    /// Asked when work pauses where only a crash may come between.
    package var crashesNow: () -> Bool = { false }
    package var crash: () -> Void = {}
    private var isUnwinding = false
    /// What has happened, if anybody wants to know.
    package var trace: [String]?

    /// - Parameter workers: of the world before.
    package init(_ dice: Dice, workers: [Worker]) {
        self.dice = dice
        idle = workers
    }

    package func note(_ words: @autoclosure () -> String) {
        guard trace != nil else { return }
        let time = Int((now - 1000) * 1e6)
        let fraction = String(time % 1_000_000)
        trace?.append(
            "\(steps) \(time / 1_000_000).\(String(repeating: "0", count: 6 - fraction.count))\(fraction) \(words())")
    }

    // MARK: The clock

    package var monotonicSeconds: Double { now }
    package var wallSeconds: Double { now + 1_700_000_000 }

    package func sleep(_ seconds: Double) { now += seconds }

    // MARK: Queues

    package func async(on queue: DispatchQueue, _ work: @escaping @Sendable () -> Void) {
        async(on: queue, after: 0, work)
    }

    package func async(on queue: DispatchQueue, after seconds: Double, _ work: @escaping @Sendable () -> Void) {
        // What a dead daemon still says reaches nobody.
        if isUnwinding { return }
        if queue !== DaemonActor.queue {
            let label = queue.label
            if label == "noether-writer.chunk-memory" || label == "noether-writer.replaced-files" { return }
            // The writer waits for its chunks: they are written by its own thread.
            if label.hasPrefix("noether-writer.chunk.") { return work() }
        }
        let key = ObjectIdentifier(queue)
        let lane: Lane
        if let found = queueLanes[key] {
            lane = found
        } else {
            let blocks = queue !== DaemonActor.queue && queue.label != "noether-writer.closing"
            lane = Lane(queue.label, isDaemons: true, blocks: blocks)
            queueLanes[key] = lane
            // A queue that is gone leaves its address to another one.
            let kept: () -> Void = {
                withExtendedLifetime(queue) {}
                work()
            }
            return later(seconds, lane, kept)
        }
        later(seconds, lane) {
            withExtendedLifetime(queue) {}
            work()
        }
    }

    /// At this time, after what is in the lane then.
    package func later(_ seconds: Double, _ lane: Lane, _ task: @escaping () -> Void) {
        guard seconds > 0 else { return add(task, to: lane) }
        timerCount += 1
        let timer = Timer(time: now + seconds, number: timerCount, lane: lane, task: task)
        var (low, high) = (0, timers.count)
        while low < high {
            let middle = (low + high) / 2
            if timers[middle].time <= timer.time { low = middle + 1 } else { high = middle }
        }
        timers.insert(timer, at: low)
    }

    package func add(_ task: @escaping () -> Void, to lane: Lane) {
        if !lane.hasWork { lanes.append(lane) }
        lane.tasks.append(task)
    }

    // MARK: Steps

    /// One step.
    /// - Returns: false where nothing is left to do, now or later.
    package func step() -> Bool {
        var ready = lanes.filter { $0.wakeTime <= now }
        while ready.isEmpty {
            let wake = lanes.lazy.map(\.wakeTime).min()
            guard let next = [timers.first?.time, wake].compactMap({ $0 }).min() else { return false }
            now = max(now, next)
            dueTimers()
            ready = lanes.filter { $0.wakeTime <= now }
        }
        steps += 1
        now += dice.seconds(1e-6...1e-4)
        run(ready[dice.below(ready.count)])
        dueTimers()
        return true
    }

    private func dueTimers() {
        while let timer = timers.first, timer.time <= now {
            timers.removeFirst()
            add(timer.task, to: timer.lane)
        }
    }

    private func run(_ lane: Lane) {
        if lane.worker == nil {
            let task = lane.tasks.removeFirst()
            guard lane.blocks else {
                note(lane.name)
                task()
                return endIfEmpty(lane)
            }
            let worker = idle.popLast() ?? Worker()
            worker.begin(task)
            lane.worker = worker
        }
        note(lane.name)
        resume(lane)
    }

    private func resume(_ lane: Lane) {
        guard let worker = lane.worker else { return }
        lane.wakeTime = 0
        repeat {
            isCrashing = false
            current = worker
            currentLane = lane
            worker.run()
            current = nil
            currentLane = nil
            // It stopped where nothing else of the daemon may run, and goes on if the daemon lives.
            if isCrashing { crash() }
        } while isCrashing && lane.worker === worker
        guard lane.worker === worker, worker.isDone else { return }
        lane.worker = nil
        idle.append(worker)
        endIfEmpty(lane)
    }

    private var currentLane: Lane?
    private var isCrashing = false

    private func endIfEmpty(_ lane: Lane) {
        if !lane.hasWork { lanes.removeAll { $0 === lane } }
    }

    /// In a system call of disk work: others may go first, and the daemon may die.
    /// - Parameter isAlone: it holds a lock that others would wait for.
    package func pauseHere(isAlone: Bool, for seconds: Double = 0) {
        guard let current, let currentLane, !current.isDead else { return }
        if isAlone {
            guard crashesNow() else { return }
            isCrashing = true
            return current.pause()
        }
        guard seconds > 0 || dice.chance(pauseShare) else { return }
        currentLane.wakeTime = seconds > 0 ? now + seconds : 0
        current.pause()
    }

    /// Whose system call it is has been killed.
    package var callerIsDead: Bool { current?.isDead ?? isUnwinding }

    /// Everything of the daemon's ends, in the middle of whatever it does.
    package func killDaemon() {
        isUnwinding = true
        let dead = lanes.filter(\.isDaemons)
        lanes.removeAll(where: \.isDaemons)
        timers.removeAll { $0.lane.isDaemons }
        queueLanes = [:]
        for lane in dead {
            lane.tasks = []
            guard let worker = lane.worker else { continue }
            worker.isDead = true
            current = worker
            while !worker.isDone { worker.run() }
            current = nil
            lane.worker = nil
            idle.append(worker)
        }
        isUnwinding = false
    }

    /// For the next world. Nothing of this one runs any more.
    package func end() -> [Worker] {
        killDaemon()
        lanes = []
        timers = []
        crash = {}
        crashesNow = { false }
        return idle
    }

    /// Runs what must not be seen by anybody: of a daemon that is dead.
    package func silently(_ work: () -> Void) {
        isUnwinding = true
        work()
        isUnwinding = false
    }
}
