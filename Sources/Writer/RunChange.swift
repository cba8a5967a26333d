// SPDX-License-Identifier: Apache-2.0
/// What changes in a run, for whoever follows it: subscribers, and the files that are made of its log as it comes.
public import Wire

public enum RunChange: Sendable {
    /// Rows were added behind the others.
    case rows
    /// Values were added to the last row, or took the place of some of it: the payload has only these, with columns for key ids.
    case added(LogPayload, row: Int)
    /// The log was cut or begun anew; the first `rows` are as they were.
    case restarted(rows: Int)
    /// A checkpoint's state.
    case checkpoint(CheckpointInfo)
    /// The run was opened, or has ended.
    case state
}

/// Called on the daemon's queue, in the middle of the change: it must not change the run.
@DaemonActor
public protocol RunObserver: AnyObject, Sendable {
    func changed(_ run: Run, _ change: RunChange)

    /// It has not had every row: an ended run keeps its log for it.
    var wantsRows: Bool { get }
}
