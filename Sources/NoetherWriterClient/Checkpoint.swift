// SPDX-License-Identifier: Apache-2.0
package import Wire

/// One file of a save, and how far it is, as a ``Subscription`` hears of it.
public struct Checkpoint: Sendable, Equatable {
    /// How far a file is.
    public enum State: String, Sendable {
        /// The daemon holds the snapshot: the trainer may die.
        case accepted
        /// Its bytes are on their way to the file system.
        case writing
        /// The file system has all of it.
        case written
        /// It survives power loss.
        case durable
        /// Storage refuses for now; the daemon keeps it and tries again.
        case stalled
        /// It was given up.
        case failed
    }

    /// Its name in the run's `checkpoints/`.
    public var file: String
    /// How far it is.
    public var state: State
    /// Of the whole file.
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
