// SPDX-License-Identifier: Apache-2.0
/// What `subscribe` and its stream carry: a run's rows as they come, what becomes of its checkpoints, and its end; or,
/// of the daemon as a whole, a report each interval. docs/PROTOCOL.md section 6.

public struct Subscribe: Codable, Sendable, Equatable {
    /// nil: the daemon as a whole.
    public var runId: String?
    /// Tells runs apart that have one id.
    public var runDirectory: String?
    /// The first row wanted; nil: only rows that come from now on.
    public var from: Int?
    /// Between two reports, in seconds, if no run is named.
    public var intervalS: Double?

    public init(runID: String?, runDirectory: String? = nil, from: Int? = nil, intervalSeconds: Double? = nil) {
        self.runId = runID
        self.runDirectory = runDirectory
        self.from = from
        self.intervalS = intervalSeconds
    }
}

public struct Subscribed: Codable, Sendable, Equatable {
    public var run: RunStatus?
    /// The row with which the stream starts.
    public var from: Int?
    /// The last ones, oldest first.
    public var checkpoints: [CheckpointInfo]?

    public init(run: RunStatus?, from: Int?, checkpoints: [CheckpointInfo]?) {
        self.run = run
        self.from = from
        self.checkpoints = checkpoints
    }
}

/// One file of a save, and how far it is.
public struct CheckpointInfo: Codable, Sendable, Equatable {
    public enum State: String, Codable, Sendable {
        case accepted, writing, written, durable, stalled, failed
    }

    public var sequence: UInt64
    /// Its name in `checkpoints/`.
    public var file: String
    public var state: State
    public var bytes: UInt64
    /// Handed to the file system, of `bytes`.
    public var bytesDone: UInt64
    /// The last update of the log that it belongs with.
    public var logUpdate: Int64?
    /// Seconds since 1970.
    public var acceptedAt: Double?
    /// When it became durable or failed.
    public var endedAt: Double?
    /// From accepted to durable.
    public var seconds: Double?
    public var error: String?

    public init(sequence: UInt64, file: String, state: State, bytes: UInt64) {
        self.sequence = sequence
        self.file = file
        self.state = state
        self.bytes = bytes
        bytesDone = 0
    }
}

public struct StreamEvent: Codable, Sendable, Equatable {
    public enum Kind: String, Codable, Sendable {
        /// A trainer has (again) opened the run.
        case opened
        /// The log was cut or begun anew, or its last row has got more values: `rows` of it are as they were, and the
        /// stream continues after those.
        case restarted
        /// A checkpoint's state or progress.
        case checkpoint
        /// `missed` events were left out, since the reader is slow; `checkpoints` is what holds now.
        case missed
        /// The run is finished or interrupted, and every row was sent.
        case ended
        /// The daemon's `report`.
        case status
    }

    public var event: Kind
    public var run: RunStatus?
    public var rows: Int?
    public var checkpoint: CheckpointInfo?
    public var missed: Int?
    public var checkpoints: [CheckpointInfo]?
    public var report: StatusReport?

    public init(_ event: Kind) { self.event = event }
}
