// SPDX-License-Identifier: Apache-2.0
/// Locks that say whose a directory or a file is (flock(2)).
import Glibc

/// Locks what the descriptor has open, for as long as it is open. Whoever only looks whether it is locked has it for a
/// moment (`Directory.isLocked`), and must not be taken for its owner.
/// - Returns: false if it is held, or if its file system has no such locks: errno says which.
func takeLock(_ number: Int32) -> Bool {
    for attempt in 1... {
        if files.flock(number) == 0 { return true }
        let code = errno
        guard code == EWOULDBLOCK, attempt < triesAtOnce else {
            errno = code
            return false
        }
        Clock.sleep(pauseSeconds)
    }
    return false
}

private let triesAtOnce = 10
private let pauseSeconds = 0.001
