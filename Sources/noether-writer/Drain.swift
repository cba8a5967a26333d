/// `noether-writer drain`: for the hooks that run before a node is taken away.
import ArgumentParser
import Dispatch
import NoetherWriterClient
import Posix
import Wire

struct Drain: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Waits until all that the daemon has accepted, logs too, is durable.",
        discussion: """
            For preemption hooks (Slurm, Kubernetes), with a progress bar on a terminal. The daemon goes on serving.
            Exit status: 0 all durable, 1 something failed, 2 not done within the time.
            """)
    @OptionGroup var socket: SocketOption
    @Option(help: ArgumentHelp("At most so long.", valueName: "seconds")) var timeout: Double?

    func run() throws {
        let connection = try socket.connect()
        let answered = DispatchSemaphore(value: 0)
        let answer = Answer()
        let request = WaitRequest(runID: nil, timeoutSeconds: timeout)
        DispatchQueue.global().async {
            answer.result = Result { try connection.ask(.wait, request, Waited.self, timeout: nil) }
            answered.signal()
        }
        let showsBar = Terminal.isTerminal
        var bar = ProgressBar()
        while answered.wait(timeout: .now() + 0.1) == .timedOut {
            if showsBar { bar.show(try connection.ask(.status, Empty(), StatusReport.self)) }
        }
        if showsBar { bar.clear() }
        guard let result = try answer.result?.get() else { throw ExitCode(1) }
        try result.tell()
        print("all durable")
    }

    /// Unchecked: written before the semaphore is signalled, read after it was waited for.
    private final class Answer: @unchecked Sendable {
        var result: Result<Waited, any Error>?
    }
}

/// One line that is drawn over: what is done of what was found in flight.
struct ProgressBar {
    private var total: UInt64 = 0

    mutating func show(_ report: StatusReport) {
        let checkpoints = report.runs.map(\.checkpoints)
        let left = checkpoints.reduce(0) {
            $0 + $1.bytesInFlight - min($1.bytesInFlight, $1.bytesWritten ?? 0)
        }
        let count = checkpoints.reduce(0) { $0 + $1.inFlight }
        total = max(total, left)
        let share = total == 0 ? 1 : Double(total - left) / Double(total)
        let width = max(10, min(40, Terminal.width - 40))
        let full = Int(share * Double(width))
        let bar = String(repeating: "█", count: full) + String(repeating: "░", count: width - full)
        let mebibytes = { (bytes: UInt64) in bytes >> 20 }
        Terminal.write(
            "\r\u{1B}[K\(bar) \(mebibytes(total - left)) of \(mebibytes(total)) MiB, \(count) checkpoint\(count == 1 ? "" : "s")"
        )
    }

    func clear() { Terminal.write("\r\u{1B}[K") }
}
