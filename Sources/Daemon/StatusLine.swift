// SPDX-License-Identifier: Apache-2.0
/// What the daemon is doing, in words a person reads: systemd's STATUS= and the first line of `noether-writer status`.
import Posix
import Wire
import Writer

enum StatusLine {
    @DaemonActor
    static func text(_ runs: [Run], _ paths: PathStore?, isDraining: Bool, settingsProblem: String?) -> String {
        let live = runs.filter(\.isLive)
        var parts = [count(live.count, "run")]
        let statuses = runs.map(\.status.checkpoints) + [paths?.status?.checkpoints].compactMap { $0 }
        let inFlight = statuses.reduce(0) { $0 + $1.inFlight }
        if inFlight > 0 {
            let total = statuses.reduce(0) { $0 + $1.bytesInFlight }
            let written = statuses.reduce(0) { $0 + ($1.bytesWritten ?? 0) }
            parts.append("\(count(inFlight, "checkpoint")) in flight (\(bytes(written, of: total)))")
        }
        if let last = (runs.map(\.outcomes.lastDurableSeconds) + [paths?.outcomes.lastDurableSeconds]).compactMap({ $0 }
        ).max() {
            parts.append("last durable \(duration(Clock.monotonicSeconds - last)) ago")
        }
        let stalls = runs.compactMap(\.stalled) + [paths?.stalledFiles.first?.message].compactMap { $0 }
        let stalled = stalls.map { "STALLED: \($0)" }
        let text = (isDraining ? "leaving: " : "") + parts.joined(separator: ", ")
        let wrong = settingsProblem.map { ["WRONG SETTINGS: \($0)"] } ?? []
        // guard: said-in-the-status-line (= 0 for 1)
        return (wrong + stalled.prefix(1) + [text]).joined(separator: "; ")
    }

    static func count(_ number: Int, _ noun: String) -> String {
        "\(number) \(noun)\(number == 1 ? "" : "s")"
    }

    private static let units: [(name: String, size: UInt64)] = [
        ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1),
    ]

    /// `1.4 of 3.0 GiB`.
    static func bytes(_ part: UInt64, of whole: UInt64) -> String {
        let unit = units.first { whole >= $0.size } ?? units[3]
        func number(_ bytes: UInt64) -> String {
            guard unit.size > 1 else { return String(bytes) }
            let tenths = (Double(bytes) / Double(unit.size) * 10).rounded() / 10
            return "\(tenths)"
        }
        return "\(number(part)) of \(number(whole)) \(unit.name)"
    }

    /// Coarser as it gets longer, so that a quiet daemon does not tell a new status each second.
    static func duration(_ seconds: Double) -> String {
        switch seconds {
        case ..<10: "\(Int(seconds)) s"
        case ..<60: "\(Int(seconds) / 10 * 10) s"
        case ..<3600: "\(Int(seconds) / 60) min"
        default: "\(Int(seconds) / 3600) h"
        }
    }
}
