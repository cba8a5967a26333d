// SPDX-License-Identifier: Apache-2.0
/// Large files that others have taken the place of, held open until their file system rests: to give their blocks back
/// (and to discard them, if it is mounted so) holds up the writes of whoever still writes there. Eight trainers that
/// replace 256 MiB each at one moment took 1.1 to 4.2 times one O_DIRECT write of all while each gave its blocks back
/// at once.
import Dispatch
import Glibc
import Synchronization

enum ReplacedFiles {
    private struct FileSystem {
        var writerCount = 0
        var held: [OwnedFD] = []
        /// Counts the times that all were let go.
        var turn = 0
    }
    /// They take space as long as they are held.
    static let holdSeconds = 5.0

    private static let fileSystems = Mutex<[UInt64: FileSystem]>([:])
    private static let queue = DispatchQueue(label: "noether-writer.replaced-files")

    /// From here to `leave` there is a writer, and those of its file system are held.
    static func enter(_ device: UInt64) {
        fileSystems.withLock { $0[device, default: FileSystem()].writerCount += 1 }
    }

    static func leave(_ device: UInt64) {
        let released = fileSystems.withLock { fileSystems -> [OwnedFD] in
            fileSystems[device]?.writerCount -= 1
            guard let found = fileSystems[device], found.writerCount == 0 else { return [] }
            fileSystems[device] = nil
            return found.held
        }
        withExtendedLifetime(released) {}
    }

    /// Between `enter` and `leave`.
    static func add(_ file: OwnedFD, on device: UInt64) {
        let turn = fileSystems.withLock { fileSystems -> Int? in
            guard var found = fileSystems[device] else { return nil }
            defer { fileSystems[device] = found }
            found.held.append(file)
            return found.held.count == 1 ? found.turn : nil
        }
        guard let turn else { return }
        Machine.scheduler.async(on: queue, after: holdSeconds) { release(on: device, turn: turn) }
    }

    /// Their space is needed, or the file system is to be left alone. They are closed by their device's queue
    /// (`OwnedFD`).
    /// - Parameter turn: given, only those that were held in it.
    static func release(on device: UInt64, turn: Int? = nil) {
        let released = fileSystems.withLock { fileSystems -> [OwnedFD] in
            guard let found = fileSystems[device], turn == nil || turn == found.turn else { return [] }
            defer { fileSystems[device] = FileSystem(writerCount: found.writerCount, turn: found.turn + 1) }
            return found.held
        }
        withExtendedLifetime(released) {}
    }
}
