// SPDX-License-Identifier: Apache-2.0
/// `noether-writer top`: the daemon's runs, live. What a frame looks like is `TopFrame`'s; here is the terminal, its
/// keys and signals.
///
/// Concurrency model: the main thread draws and reads keys; reports come in on `reports`, signals on `signals`; both
/// leave what they have in `news` and wake the main thread.
import ArgumentParser
import Dispatch
import NoetherWriterClient
import Posix
import Synchronization
import Wire

struct Top: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Shows live what the daemon does: each run's rates, checkpoints in flight, disks, warnings.",
        discussion: "q quits. If standard output is not a terminal, one frame is printed.\n\n"
            + examples("noether-writer top", "noether-writer top --interval 0.5", "noether-writer top --once")
    )
    @OptionGroup var socket: SocketOption
    @Option(help: ArgumentHelp("Time between two frames.", valueName: "seconds")) var interval = 1.0
    @Flag(help: "Print one frame and exit.") var once = false
    @OptionGroup var output: JSONOption

    func validate() throws {
        guard (0.1...60).contains(interval) else {
            throw ValidationError("--interval must be 0.1 to 60 seconds")
        }
    }

    private struct News {
        var reports: [StatusReport] = []
        /// Why there are no reports now.
        var problem: String?
        var signals: [Int32] = []
    }

    private final class Feed: Sendable {
        let news = Mutex(News())
        let wake: WakeEvent

        init() throws(PosixError) { wake = try WakeEvent() }

        func add(_ change: (inout News) -> Void) {
            news.withLock { change(&$0) }
            wake.signal()
        }

        func removeAll() -> News {
            news.withLock { news in
                defer { news = News() }
                return news
            }
        }
    }

    func run() throws {
        // One that can't be reached at all is said at once.
        let first = try Subscription.openBlocking(reportsEach: .seconds(interval), socket: socket.path)
        if output.json { return try printReports(first) }
        guard !once, let screen = FullScreen() else { return try printOnce(first) }
        let feed = try Feed()
        let sources = watchSignals(feed)
        follow(first, feed)
        screen.enter()
        defer { screen.leave() }
        try withExtendedLifetime(sources) { try draw(on: screen, feed) }
    }

    /// A line each.
    private func printReports(_ subscription: Subscription) throws {
        while let event = try subscription.nextBlocking() {
            guard case .report(let report) = event else { continue }
            _ = try output.print(report.message)
            NoetherWriter.flush()
            if once { return }
        }
    }

    private func printOnce(_ subscription: Subscription) throws {
        var frame = TopFrame(interval: interval)
        var reports = 0
        // Two, for what is counted a second.
        while reports < 2, let event = try subscription.nextBlocking() {
            guard case .report(let report) = event else { continue }
            frame.update(with: report.message)
            reports += 1
        }
        for line in frame.lines(columns: Terminal.isTerminal ? Terminal.width : 100, rows: nil) {
            print(line)
        }
    }

    // MARK: What comes in

    /// Connects again if the daemon goes away.
    private func follow(_ first: Subscription, _ feed: Feed) {
        let (path, interval) = (socket.path, interval)
        DispatchQueue(label: "noether-writer.top.reports").async {
            var subscription: Subscription? = first
            while true {
                do {
                    let current =
                        try subscription ?? Subscription.openBlocking(reportsEach: .seconds(interval), socket: path)
                    subscription = current
                    while let event = try current.nextBlocking() {
                        if case .report(let report) = event { feed.add { $0.reports.append(report.message) } }
                    }
                } catch {
                    subscription = nil
                    feed.add { $0.problem = "\(error)" }
                    Clock.sleep(1)
                }
            }
        }
    }

    private func watchSignals(_ feed: Feed) -> [any DispatchSourceSignal] {
        let queue = DispatchQueue(label: "noether-writer.top.signals")
        let numbers = [
            ThisProcess.windowChange, ThisProcess.terminalStop, ThisProcess.interrupt, ThisProcess.terminate,
            ThisProcess.hangUp,
            ThisProcess.quit,
        ]
        return numbers.map { number in
            ThisProcess.ignoreSignal(number)
            let source = DispatchSource.makeSignalSource(signal: number, queue: queue)
            source.setEventHandler { feed.add { $0.signals.append(number) } }
            source.activate()
            return source
        }
    }

    // MARK: What goes out

    private func draw(on screen: FullScreen, _ feed: Feed) throws {
        let keyboard = try FullScreen.keyboard()
        var frame = TopFrame(interval: interval)
        while true {
            let size = Terminal.size ?? (80, 24)
            let lines = frame.lines(columns: size.columns, rows: size.rows)
            // In one write, each line cut at the width and cleared after it: no flicker.
            Terminal.write("\u{1B}[H" + lines.map { "\($0)\u{1B}[K" }.joined(separator: "\r\n") + "\u{1B}[J")
            try feed.wake.wait(for: keyboard, orWriting: false)
            // Ctrl-D ends it too; and a terminal that is gone.
            guard let keys = screen.keys(), !keys.contains(where: { [0x71, 0x51, 0x04].contains($0) }) else {
                return
            }
            let news = feed.removeAll()
            for report in news.reports { frame.update(with: report) }
            if let problem = news.problem { frame.problem = problem }
            for number in news.signals {
                switch number {
                case ThisProcess.windowChange: break
                case ThisProcess.terminalStop: screen.suspend()
                default: return
                }
            }
        }
    }
}
