// SPDX-License-Identifier: Apache-2.0
/// One of a run's directories, held open while storage is well. After a refusal for another reason than room it is let go of and
/// opened anew by its path for the next try: a file system that failed can be unmounted, and what is mounted then is used.
import Posix
import Synchronization

final class RunDirectory: Sendable {
    let path: String
    private let reference: Directory.Reference
    private let held: Mutex<(directory: Directory?, device: UInt64)>

    init(_ directory: Directory) {
        path = directory.path
        reference = directory.reference
        held = Mutex((directory, directory.device))
    }

    /// Where its work is queued: what it was on when it was last open.
    var place: DiskQueues.Place { .device(held.withLock(\.device)) }

    /// Blocks. Nothing is created: without its mount, a path must not come into being elsewhere.
    func open() throws(PosixError) -> Directory {
        if let directory = held.withLock({ $0.directory }) { return directory }
        let directory: Directory
        do { directory = try reference.open() } catch {
            // It was there: whatever it is, it may be there again.
            throw error.passing
        }
        held.withLock { $0 = (directory, directory.device) }
        return directory
    }

    func letGo() { held.withLock { $0.directory = nil } }
}
