// SPDX-License-Identifier: Apache-2.0
/// What one connection follows: a run's rows and checkpoints, or the daemon as a whole. Owned by the daemon's queue.
///
/// No row is kept for a reader: its place in the log is a number, and pages are made from the run's columns when it has
/// read what it got. So a slow one slows nobody and misses no row. Events wait in a bounded queue; when that is full
/// the oldest go, and the reader is told how many, and what holds now. An ended run's columns, which would go, wait for
/// a reader that reads, and not for one that does not: that one is told where the rows are.
import Posix
import Wire
import Writer

@DaemonActor
final class Subscription: RunObserver {
    struct Sink {
        /// Bytes that the reader has not read.
        var unread: @DaemonActor () -> Int
        var send: @DaemonActor (FrameType, [UInt8]) -> Void
        /// Nothing more is sent.
        var over: @DaemonActor () -> Void
    }

    /// Rows that come within this time go together.
    private static let groupSeconds = 0.05
    /// Between two pages for a reader that has much to catch up with, so that trainers get their turns.
    private static let pageSeconds = 0.005
    private static let progressSeconds = 0.2
    private static let pageBytes = 128 << 10
    /// One page is made in one go on the daemon's queue.
    private static let pageRows = 1000
    private static let pageValues = pageBytes / 8

    private let run: Run?
    private let sink: Sink
    private let report: @DaemonActor () throws(WireError) -> StatusReport
    private let interval: Double
    /// The next row.
    private var position: Int
    private var events: [StreamEvent] = []
    private var missed = 0
    private var isScheduled = false
    private var isWaitingForReader = false
    /// How often it has waited.
    private var waits = 0
    private var isFollowingProgress = false
    private var isWaitingForIdle = false
    private var hasToldEnd = false
    private var isOver = false

    init(
        run: Run?, _ message: Subscribe, sink: Sink,
        report: @escaping @DaemonActor () throws(WireError) -> StatusReport
    ) {
        self.run = run
        self.sink = sink
        self.report = report
        interval = min(60, max(0.1, message.intervalS ?? 1))
        // Of a log that is in its file only, none can be had.
        let count = run.map { $0.log.columns.count > 0 ? $0.log.columns.count : $0.log.rowCount } ?? 0
        position = run?.log.columns.count == 0 ? count : min(max(0, message.from ?? count), count)
    }

    var answer: Subscribed {
        Subscribed(run: run?.status, from: run == nil ? nil : position, checkpoints: run?.checkpoints)
    }

    func start() {
        guard let run else { return sendStatus() }
        run.add(self)
        schedule(after: 0)
        followProgress()
    }

    func end() {
        isOver = true
        run?.remove(self)
    }

    /// The reader has read all it got.
    func wasRead() {
        guard isWaitingForReader else { return }
        isWaitingForReader = false
        schedule(after: 0)
    }

    var wantsRows: Bool { run.map { !isOver && position < $0.log.columns.count } ?? false }

    private func waitForReader() {
        isWaitingForReader = true
        waits += 1
        lookAfterReader(waits)
    }

    private func lookAfterReader(_ wait: Int) {
        DaemonActor.enter(after: Double(Limits.subscriptionPatienceSeconds)) { [weak self] in
            guard let self, let run = self.run, self.isWaitingForReader, self.waits == wait else { return }
            guard self.wantsRows, !run.isLive, !run.log.hasUnwrittenRows else {
                return self.lookAfterReader(wait)
            }
            self.giveUp(run)
        }
    }

    private func giveUp(_ run: Run) {
        let error = WireError(
            .tooSlow,
            "run \(run.name.runID) has ended, and nothing was read for \(Limits.subscriptionPatienceSeconds) s: rows from "
                + "\(position) on are in \(run.name.directory)/tracker/entries.th")
        if let payload = try? JSONPayload.encode(ErrorMessage(error)) { sink.send(.error, payload) }
        sink.over()
    }

    // MARK: What changes

    func changed(_ run: Run, _ change: RunChange) {
        switch change {
        case .rows: return schedule(after: Self.groupSeconds)
        // A reader that has the row gets it again, whole.
        case .added(_, let row): goBack(to: row)
        case .restarted(let rows): goBack(to: rows)
        case .checkpoint(let info):
            var event = StreamEvent(.checkpoint)
            event.checkpoint = info
            add(event)
            followProgress()
        case .state:
            guard run.state == .running else { break }
            hasToldEnd = false
            var event = StreamEvent(.opened)
            event.run = run.status
            add(event)
        }
        schedule(after: 0)
    }

    /// What lies before is as it was; a reader that is behind has nothing to forget.
    private func goBack(to row: Int) {
        guard position > row else { return }
        position = row
        var event = StreamEvent(.restarted)
        event.rows = row
        // One says it: the position only goes down until it is sent.
        events.removeAll { $0.event == .restarted }
        add(event)
    }

    private func add(_ event: StreamEvent) {
        events.append(event)
        guard events.count > Limits.subscriptionEvents else { return }
        // A cut is never left out: which rows the reader has depends on it.
        let oldest = events.firstIndex { $0.event != .restarted } ?? 0
        events.remove(at: oldest)
        missed += 1
    }

    private func followProgress() {
        guard !isFollowingProgress, run?.checkpointInProgress?.state == .writing else { return }
        isFollowingProgress = true
        DaemonActor.enter(after: Self.progressSeconds) { [weak self] in
            guard let self, !self.isOver else { return }
            self.isFollowingProgress = false
            // Only where nothing waits: the next one says the same better.
            if let info = self.run?.checkpointInProgress, info.state == .writing, self.events.isEmpty,
                self.hasRoom
            {
                var event = StreamEvent(.checkpoint)
                event.checkpoint = info
                self.send(event)
            }
            self.followProgress()
        }
    }

    // MARK: What goes out

    // guard: rows-for-a-slow-reader (always: sink.unread() < Limits.subscriptionBytes)
    private var hasRoom: Bool { sink.unread() < Limits.subscriptionBytes }

    private func schedule(after seconds: Double) {
        guard !isOver, !isScheduled, !isWaitingForReader else { return }
        isScheduled = true
        DaemonActor.enter(after: seconds) { [weak self] in
            self?.isScheduled = false
            self?.pump()
        }
    }

    private func pump() {
        guard !isOver, let run else { return }
        while !events.isEmpty || missed > 0 {
            guard hasRoom else { return waitForReader() }
            if missed > 0 {
                var event = StreamEvent(.missed)
                (event.missed, event.checkpoints) = (missed, run.checkpoints)
                missed = 0
                send(event)
            } else {
                send(events.removeFirst())
            }
        }
        let log = run.log.columns
        if position < log.count {
            guard hasRoom else { return waitForReader() }
            var page = EntriesPage(total: log.count, byteLimit: Self.pageBytes)
            let range = log.rows(from: position, holding: Self.pageValues, atMost: Self.pageRows)
            for row in log.payloads(rows: range, sequence: 0) {
                guard page.append(row, name: { log.keys[Int($0)] }) else { break }
            }
            position += page.rows.count
            sink.send(.rows, page.encoded())
            schedule(after: Self.pageSeconds)
            if position == log.count { run.hasRead() }
            return
        }
        guard run.state != .running, !hasToldEnd else { return }
        if !run.isIdle {
            guard !isWaitingForIdle else { return }
            isWaitingForIdle = true
            run.whenEnded { [weak self] in
                self?.isWaitingForIdle = false
                self?.schedule(after: 0)
            }
        } else {
            hasToldEnd = true
            var event = StreamEvent(.ended)
            event.run = run.status
            send(event)
        }
    }

    private func send(_ event: StreamEvent) {
        do throws(WireError) { sink.send(.streamEvent, try JSONPayload.encode(event)) } catch {
            Log.writeLimited(.error, "an event was not sent: \(error.message)")
        }
    }

    private func sendStatus() {
        guard !isOver else { return }
        if hasRoom {
            var event = StreamEvent(.status)
            do throws(WireError) {
                event.report = try report()
                send(event)
            } catch { Log.writeLimited(.error, "a report was not sent: \(error.message)") }
        }
        DaemonActor.enter(after: interval) { [weak self] in self?.sendStatus() }
    }
}
