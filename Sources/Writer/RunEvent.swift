// SPDX-License-Identifier: Apache-2.0
/// What happens to a run, for whoever keeps the operator informed.
public import Wire

public struct RunEvent: Sendable {
    public enum What: Sendable {
        case opened(pid: Int32)
        case recovered(rows: Int)
        case ended(RunStatus.State)
        case durable(path: String, bytes: UInt64, microseconds: UInt64)
        case warning(String)
        /// An older checkpoint, by the rule that is set.
        case removed(path: String, successor: String)
        case stalled(path: String, reason: String)
        case failed(path: String, reason: String)
    }

    public var runID: String
    public var what: What
}
