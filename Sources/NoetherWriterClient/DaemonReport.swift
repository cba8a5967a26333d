// SPDX-License-Identifier: Apache-2.0
/// What the daemon says of itself and its runs, each interval of a subscription or when it is asked.
package import Wire

/// What the daemon says of itself.
public struct DaemonReport: Sendable {
    /// The daemon's version.
    public var version: String
    /// The number of the daemon's process.
    public var pid: Int32
    /// How long the daemon has been running, in seconds.
    public var uptimeSeconds: Double
    /// The path of the socket on which the daemon listens.
    public var socket: String
    /// Whether the daemon is leaving: it finishes what it has, and takes nothing new.
    public var isDraining: Bool
    /// How many connections are open: those of trainers and of other programs, and the one that asks.
    public var connectionCount: Int
    /// Memory of its process without what it shares with trainers; nil if the daemon does not tell.
    public var memoryByteCount: UInt64?
    /// Those that live first.
    public var runs: [RunReport]
    /// How many more there are than one report holds.
    public var runsLeftOut: Int

    package var message: StatusReport

    package init(_ message: StatusReport) {
        self.message = message
        version = message.version
        pid = message.pid
        uptimeSeconds = message.uptimeS
        socket = message.socket
        isDraining = message.state == "draining"
        connectionCount = message.connections
        memoryByteCount = message.memoryBytes
        runs = message.runs.map(RunReport.init)
        runsLeftOut = message.runsLeftOut ?? 0
    }
}

/// A run that the daemon has, or has had recently.
public struct RunReport: Sendable, Equatable {
    /// As it was opened with.
    public var runID: String
    /// `<output_root>[/debug]/<run_id>[/<stage_name>]`.
    public var directory: String
    /// What has become of it.
    public var state: RunState
    /// The number of the trainer's process.
    public var pid: Int32
    /// The trainer's host.
    public var node: String
    /// Rows of its log.
    public var rowCount: Int
    /// The last update of its log.
    public var lastUpdate: Int64?
    /// When the trainer logged that, in seconds since 1970.
    public var lastUpdateAt: Double?
    /// The last update that survives the daemon.
    public var logWrittenUpdate: Int64?
    /// The last update that survives power loss.
    public var logDurableUpdate: Int64?
    /// Files of its saves.
    public var checkpoints: CheckpointCounts
    /// The file that is on its way to the disk.
    public var writing: Checkpoint?
    /// Why storage refuses for now.
    public var stalled: String?
}

/// What has become of a run.
public enum RunState: String, Sendable {
    /// A trainer has it open.
    case running
    /// Its trainer has finished it.
    case finished
    /// Its trainer is gone without a word; its log was written all the same.
    case interrupted
}

/// Files of the run's saves.
public struct CheckpointCounts: Sendable, Equatable {
    /// How many were accepted and are not durable yet.
    public var inFlight: Int
    /// How many bytes the files in flight have.
    public var bytesInFlight: UInt64
    /// How many bytes of the files in flight the file system has.
    public var bytesWritten: UInt64
    /// How many became durable.
    public var durable: Int
    /// How many bytes of files have become durable.
    public var bytesDurable: UInt64
    /// How many were given up.
    public var failed: Int
}

extension Subscription {
    /// As ``DaemonReport``.
    @available(*, deprecated, renamed: "DaemonReport")
    public typealias Report = DaemonReport
}

extension DaemonReport {
    /// As ``RunReport``.
    @available(*, deprecated, renamed: "RunReport")
    public typealias Run = RunReport
}

extension RunReport {
    /// As ``RunState``.
    @available(*, deprecated, renamed: "RunState")
    public typealias State = RunState
    /// As ``CheckpointCounts``.
    @available(*, deprecated, renamed: "CheckpointCounts")
    public typealias Checkpoints = CheckpointCounts
}

extension RunReport {
    package init(_ status: RunStatus) {
        runID = status.runId
        directory = status.runDirectory
        state =
            switch status.state {
            case .running: .running
            case .finished: .finished
            case .interrupted: .interrupted
            }
        pid = status.pid
        node = status.node
        rowCount = status.entries
        lastUpdate = status.lastUpdate
        lastUpdateAt = status.lastUpdateAt
        logWrittenUpdate = status.logWrittenUpdate
        logDurableUpdate = status.logDurableUpdate
        checkpoints = CheckpointCounts(
            inFlight: status.checkpoints.inFlight, bytesInFlight: status.checkpoints.bytesInFlight,
            bytesWritten: status.checkpoints.bytesWritten ?? 0, durable: status.checkpoints.durable,
            bytesDurable: status.checkpoints.bytesDurable ?? 0, failed: status.checkpoints.failed)
        writing = status.writing.map(Checkpoint.init)
        stalled = status.stalled
    }
}

extension DaemonConnection {
    /// What the daemon says of itself and its runs.
    /// - Throws: ``NoetherWriterError``, or `CancellationError`.
    public func status() async throws -> DaemonReport {
        // Its payload is an empty object.
        let frame = try await answer(.status, Array("{}".utf8), timeout: Self.answerTime)
        return DaemonReport(try Self.decode(frame))
    }

    /// As `status()`, and blocks this thread.
    /// - Throws: ``NoetherWriterError``.
    @available(*, noasync, message: "it blocks a thread of the tasks: await status()")
    public func statusBlocking() throws(NoetherWriterError) -> DaemonReport {
        DaemonReport(try ask(.status, [String: Int](), StatusReport.self))
    }
}
