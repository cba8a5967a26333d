// SPDX-License-Identifier: Apache-2.0
/// Faults on demand, for the crash tests: the environment variable NOETHER_WRITER_FAULTS names points of the write
/// path and what happens there, as `point=action[@n]`, comma-separated; `@n` takes the n-th time only. Without the
/// variable a point costs one comparison.
///
/// Actions: `kill` (SIGKILL of this process), `hang` (this queue never continues), `slow` (a second passes), or the
/// name of an errno (`ENOSPC`, `EIO`, `EDQUOT`).
import Glibc

public enum Faults {
    public static let variable = "NOETHER_WRITER_FAULTS"
    /// Its name before the first release.
    private static let deprecatedVariable = "NOETHER_WRITERD_FAULTS"

    private static let errnos: [String: Int32] = [
        "ENOSPC": ENOSPC, "EIO": EIO, "EDQUOT": EDQUOT, "EROFS": EROFS, "ENOMEM": ENOMEM, "ENFILE": ENFILE,
    ]

    private final class Point: @unchecked Sendable {
        // Unchecked: the count is under the lock of `pthread_mutex_t`, which has no Sendable form of its own.
        let action: String
        let turn: Int?
        private var count = 0
        private var mutex = pthread_mutex_t()

        init(action: String, turn: Int?) {
            self.action = action
            self.turn = turn
            pthread_mutex_init(&mutex, nil)
        }

        func isTurn() -> Bool {
            pthread_mutex_lock(&mutex)
            defer { pthread_mutex_unlock(&mutex) }
            count += 1
            return turn == nil || turn == count
        }
    }

    private static let points: [String: Point] = {
        let text = ThisProcess.environment(variable) ?? ThisProcess.environment(deprecatedVariable)
        guard let text else { return [:] }
        var points: [String: Point] = [:]
        for part in text.split(separator: ",") {
            let pair = part.split(separator: "=", maxSplits: 1)
            guard pair.count == 2 else { continue }
            let action = pair[1].split(separator: "@")
            points[String(pair[0])] = Point(
                action: String(action[0]), turn: action.count > 1 ? Int(action[1]) : nil)
        }
        return points
    }()
    private static let isOn = !points.isEmpty

    public static func reach(_ name: String) throws(PosixError) {
        guard isOn, let point = points[name], point.isTurn() else { return }
        switch point.action {
        case "kill": kill(getpid(), SIGKILL)
        case "hang": while true { pause() }
        case "slow": Clock.sleep(1)
        default: throw PosixError(errnos[point.action] ?? EIO, "fault at \(name)")
        }
    }

    /// For a point where nothing can fail: `kill`, `hang` and `slow` have their effect, and an error has none.
    public static func interrupt(at name: String) { try? reach(name) }
}
