// SPDX-License-Identifier: Apache-2.0
/// What happens to runs and files, as lines of the operator's log.
import Wire
import Writer

enum Report {
    static func write(_ event: RunEvent) {
        switch event.what {
        case .opened(let pid):
            Log.writeLimited(
                .info, "run \(event.runID): opened by process \(pid)", fields(event), topic: .runs)
        case .recovered(let rows):
            Log.write(.notice, "run \(event.runID): \(rows) log entries recovered", fields(event))
        case .ended(let state):
            Log.writeLimited(.info, "run \(event.runID): \(state.rawValue)", fields(event), topic: .runs)
        case .durable(let path, let bytes, let microseconds):
            Log.writeLimited(
                .info, "run \(event.runID): durable: \(path), \(bytes) bytes in \(microseconds / 1000) ms",
                fields(event, ["CHECKPOINT": path, "BYTES": "\(bytes)", "DURATION_USEC": "\(microseconds)"]),
                topic: .runs)
        case .warning(let words):
            Log.writeLimited(.warning, "run \(event.runID): \(words)", fields(event), topic: .storage)
        case .removed(let path, let successor):
            Log.write(
                .info,
                "run \(event.runID): removed \(path), by keep_last: \(successor) is durable and verified",
                fields(event, ["CHECKPOINT": path]))
        case .stalled(let path, let reason):
            Log.writeLimited(
                .warning,
                "run \(event.runID): storage refuses \(path): \(reason); kept in memory, tried again",
                fields(event, ["CHECKPOINT": path]), topic: .storage)
        case .failed(let path, let reason):
            Log.writeLimited(
                .error, "run \(event.runID): given up: \(path): \(reason)",
                fields(event, ["CHECKPOINT": path]), topic: .storage)
        }
    }

    private static func fields(_ event: RunEvent, _ more: [String: String] = [:]) -> [String: String] {
        more.merging(["RUN_ID": event.runID]) { own, _ in own }
    }
}
