// SPDX-License-Identifier: Apache-2.0
/// Lines for the operator: with fields in systemd's journal where standard error is connected to it, plain lines on a
/// terminal or in a file. What a client can provoke is rate-limited.
import CSystemd
import Posix
import Synchronization

enum Log {
    /// As in syslog(3).
    enum Priority: Int, Sendable {
        case error = 3
        case warning = 4
        case notice = 5
        case info = 6
    }

    /// What a line is about. Each has a budget of its own, so that clients that talk nonsense don't hide a full disk.
    enum Topic: String, Sendable {
        case clients, runs, storage
    }

    /// Lines that clients provoke: so many on a topic in so long a time; then one that says how many were left out.
    private static let burst = 20
    private static let intervalSeconds = 10.0

    private struct Budget {
        var since = 0.0
        var written = 0
        var suppressed = 0
    }

    private static let isJournal = ThisProcess.standardErrorIsJournal
    private static let budgets = Mutex<[Topic: Budget]>([:])

    /// - Parameter fields: journal fields, upper case.
    static func write(_ priority: Priority, _ message: String, _ fields: [String: String] = [:]) {
        guard isJournal else { return ThisProcess.writeToStandardError("noether-writerd: \(printable(message))") }
        var texts = [
            "MESSAGE=\(message)", "PRIORITY=\(priority.rawValue)", "SYSLOG_IDENTIFIER=noether-writerd",
        ]
        texts += fields.sorted { $0.key < $1.key }.map { "\($0.key)=\($0.value)" }
        let bytes = texts.prefix(Int(NW_JOURNAL_FIELDS)).map { Array($0.utf8CString) }
        let lengths = bytes.map { $0.count - 1 }
        var pointers: [UnsafePointer<CChar>?] = []
        func send(_ rest: ArraySlice<[CChar]>) {
            guard let first = rest.first else {
                _ = nw_sd_journal_send(pointers, lengths, Int32(pointers.count))
                return
            }
            first.withUnsafeBufferPointer {
                pointers.append($0.baseAddress)
                send(rest.dropFirst())
            }
        }
        send(bytes[...])
    }

    /// For what a client can provoke as often as it likes.
    static func writeLimited(
        _ priority: Priority, _ message: String, _ fields: [String: String] = [:], topic: Topic = .clients
    ) {
        let now = Clock.monotonicSeconds
        let (isAllowed, suppressed) = budgets.withLock { budgets in
            var budget = budgets[topic] ?? Budget()
            defer { budgets[topic] = budget }
            var suppressed = 0
            if now - budget.since > intervalSeconds {
                suppressed = budget.suppressed
                budget = Budget(since: now)
            }
            budget.written += 1
            if budget.written > burst { budget.suppressed += 1 }
            return (budget.written <= burst, suppressed)  // guard: log-lines-limited (always: budget.written <= burst)
        }
        if suppressed > 0 { write(.warning, "\(suppressed) messages about \(topic) were left out") }
        if isAllowed { write(priority, message, fields) }
    }

    /// A client's words must not move the terminal's cursor, nor make lines of their own.
    static func printable(_ message: String) -> String {
        String(
            String.UnicodeScalarView(
                // guard: log-lines-printable (never: $0.properties.generalCategory == .control)
                message.unicodeScalars.map { $0.properties.generalCategory == .control ? "\u{FFFD}" : $0 }))
    }
}
