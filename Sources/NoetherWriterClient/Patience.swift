// SPDX-License-Identifier: Apache-2.0
/// When a wait has no use any more: one policy, and one deadline, for threads that block and for tasks that are
/// suspended. As noether_writer/saves.py, `_check` and `look`.
import Dispatch
internal import Posix
internal import Wire

struct Patience {
    /// For how long storage may refuse before a wait without a timeout gives up.
    static let stallSeconds = 30.0
    /// For how long the daemon may be away before it does.
    static let awaySeconds = 60.0
    /// After so long without news it asks the daemon whether there is any use in waiting, and how long that may take.
    static let lookSeconds = 30.0
    private static let sliceSeconds = 1.0

    private let session: Session
    private let timeout: Duration?
    private let start = Clock.monotonicSeconds
    private var lookedAt = Clock.monotonicSeconds
    private var question: Completion<Session.Answer>?

    /// - Parameter timeout: nil waits as long as storage accepts data and the daemon is there.
    init(_ session: Session, _ timeout: Duration?) {
        self.session = session
        self.timeout = timeout
    }

    /// When to look next.
    var next: DispatchTime {
        .now() + min(Self.sliceSeconds, max(0, left ?? Self.sliceSeconds))
    }

    private var left: Double? { timeout.map { $0.seconds - (Clock.monotonicSeconds - start) } }

    /// Why the wait is over, or nil.
    /// - Parameters:
    ///   - ticket: what is waited for; nil: the run's end.
    mutating func problem(_ ticket: Ticket?) -> NoetherWriterError? {
        let what = ticket?.name ?? session.title
        let away = session.awaySeconds
        let stalls = ticket.map { $0.stall.map { [$0] } ?? [] } ?? session.tickets.compactMap(\.stall)
        let now = Clock.monotonicSeconds
        guard let left else {
            if let stall = stalls.first(where: { now - $0.since >= Self.stallSeconds }) {
                return .timeout(waitingFor: what, stalled: stall.reason)
            }
            if away > Self.awaySeconds {
                let kept =
                    ticket == nil
                    ? Session.keptWords : "the save is kept in this process and sent when it is back"
                return .unavailable("the daemon has been away for \(Int(away)) s; \(kept)")
            }
            return look(what, now)
        }
        guard left <= 0, let timeout else { return nil }
        if let stall = stalls.first { return .timeout(waitingFor: what, stalled: stall.reason) }
        let limit = Self.words(timeout)
        guard ticket != nil else {
            return .timeout(
                waitingFor: away > 0
                    ? "the daemon has been away for \(Int(away)) s, and the time is over; \(Session.keptWords)"
                    : "the daemon has not answered within \(limit) s; it still works", stalled: nil)
        }
        if away > 0 {
            return .timeout(
                waitingFor: "\(what) is not durable after \(limit) s: the daemon has been away for \(Int(away)) s; "
                    + Session.keptWords, stalled: nil)
        }
        return .timeout(waitingFor: "\(what) is not durable after \(limit) s; the daemon continues", stalled: nil)
    }

    /// Asks the daemon now and then, without waiting for its answer.
    private mutating func look(_ what: String, _ now: Double) -> NoetherWriterError? {
        guard let asked = question else {
            if now - lookedAt > Self.lookSeconds {
                lookedAt = now
                question = session.ask(.status, Array("{}".utf8))
            }
            return nil
        }
        guard let answer = asked.value else {
            guard now - lookedAt > Self.lookSeconds else { return nil }
            return .unavailable(
                "the daemon has not answered for \(Int(Self.lookSeconds)) s; what is not durable is kept and sent again"
            )
        }
        lookedAt = now
        question = nil
        guard case .success(let frame) = answer,
            let report = try? JSONPayload.decode(StatusReport.self, from: frame.payload),
            let stalled = report.runs.first(where: { $0.runDirectory == session.opened.runDirectory })?.stalled
        else { return nil }
        return .timeout(waitingFor: session.title, stalled: stalled)
    }

    static func words(_ timeout: Duration) -> String {
        let seconds = timeout.seconds
        return seconds == seconds.rounded() && abs(seconds) < 1e15 ? "\(Int(seconds))" : "\(seconds)"
    }
}

extension Completion {
    /// Blocks until the value is there.
    func wait(_ patience: inout Patience, _ ticket: Ticket?) throws(NoetherWriterError) -> Value {
        while true {
            if let value = wait(until: patience.next) { return value }
            if let problem = patience.problem(ticket) { throw problem }
        }
    }

    /// Suspends until the value is there.
    /// - Throws: `NoetherWriterError`, or `CancellationError` if this task is cancelled.
    func arrived(_ patience: inout Patience, _ ticket: Ticket?) async throws -> Value {
        while true {
            if let value = await arrived(until: patience.next) { return value }
            try Task.checkCancellation()
            if let problem = patience.problem(ticket) { throw problem }
        }
    }
}
