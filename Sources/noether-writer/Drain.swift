// SPDX-License-Identifier: Apache-2.0
/// `noether-writer drain`: for the hooks that run before a node is taken away.
import ArgumentParser
import Dispatch
import NoetherWriterClient
import Posix
import Wire

struct Drain: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Waits until everything that the daemon has accepted is durable, including the logs.",
        discussion: """
            For preemption hooks (Slurm, Kubernetes), with a progress bar on a terminal. The daemon continues to serve.
            Exit status: 0 everything is durable, 1 something failed, 2 not done within the time.

            """ + examples("noether-writer drain --timeout 300"))
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption
    @OptionGroup var limit: TimeoutOption

    func run() throws {
        let connection = try socket.connect(within: limit.duration)
        let answered = DispatchSemaphore(value: 0)
        let answer = Answer()
        let request = WaitRequest(runID: nil, timeoutSeconds: limit.seconds)
        let patience = limit.withGrace
        DispatchQueue.global().async {
            answer.result = Result { try connection.ask(.wait, request, Waited.self, timeout: patience) }
            answered.signal()
        }
        let showsBar = Terminal.isTerminal && !output.json
        var bar = ProgressBar()
        while answered.wait(timeout: .now() + 0.1) == .timedOut {
            // Of a daemon that does not answer the bar stays as it is.
            guard showsBar,
                let report = try? connection.ask(
                    .status, Empty(), StatusReport.self, timeout: .milliseconds(500))
            else { continue }
            bar.show(report)
        }
        if showsBar { bar.clear() }
        guard let result = try answer.result?.get() else { throw ExitCode.failure }
        try result.tell(output)
    }

    /// Unchecked: written before the semaphore is signalled, read after it was waited for.
    private final class Answer: @unchecked Sendable {
        var result: Result<Waited, any Error>?
    }
}

extension StatusReport {
    /// Of the runs, and of the files of no run.
    var allCheckpoints: [RunStatus.Checkpoints] { runs.map(\.checkpoints) + [files?.checkpoints].compactMap { $0 } }
}

/// One line that is drawn over: what is done since the first report, of that and of what is in flight.
struct ProgressBar {
    private var durableBefore: UInt64?

    mutating func show(_ report: StatusReport) {
        let checkpoints = report.allCheckpoints
        func sum(_ part: (RunStatus.Checkpoints) -> UInt64) -> UInt64 {
            checkpoints.reduce(0) { $0 + part($1) }
        }
        let durable = sum { $0.bytesDurable ?? 0 }
        let before = durableBefore ?? durable
        durableBefore = before
        // A run that is forgotten meanwhile takes its count with it.
        let ended = durable > before ? durable - before : 0
        let done = ended + sum { $0.bytesWritten ?? 0 }
        let total = ended + sum(\.bytesInFlight)
        let count = checkpoints.reduce(0) { $0 + $1.inFlight }
        let share = total == 0 ? 1 : Double(done) / Double(total)
        let bar = Text.bar(share, max(10, min(40, Terminal.width - 44)))
        Terminal.write(
            "\r\u{1B}[K\(bar) \(Text.bytes(done, of: total)), \(Text.count(count, "checkpoint"))")
    }

    func clear() { Terminal.write("\r\u{1B}[K") }
}
