/// One file of a save, and how far it is, as a subscription hears of it.
package import Wire

public struct Checkpoint: Sendable, Equatable {
    public enum State: String, Sendable {
        case accepted, writing, written, durable, stalled, failed
    }

    /// Its name in the run's `checkpoints/`.
    public var file: String
    public var state: State
    /// Of the file.
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
    /// Why storage refuses it.
    public var error: String?

    package init(_ info: CheckpointInfo) {
        file = info.file
        state = State(rawValue: info.state.rawValue) ?? .accepted
        bytes = info.bytes
        bytesDone = info.bytesDone
        logUpdate = info.logUpdate
        acceptedAt = info.acceptedAt
        endedAt = info.endedAt
        seconds = info.seconds
        error = info.error
    }
}
