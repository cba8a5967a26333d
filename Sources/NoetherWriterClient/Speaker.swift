// SPDX-License-Identifier: Apache-2.0
/// What this library says by itself, while no call can throw it: to the program's logger, or else to standard error.
internal import Logging
internal import Posix

struct Speaker: Sendable {
    /// nil: standard error.
    var logger: Logger?

    /// What the program should know, and continues with.
    func warn(_ words: String) { say(.warning, words) }

    /// What is lost.
    func fail(_ words: String) { say(.error, words) }

    private func say(_ level: Logger.Level, _ words: String) {
        if let logger {
            logger.log(level: level, "\(words)")
        } else {
            ThisProcess.writeToStandardError("noether-writer: \(words)")
        }
    }
}
