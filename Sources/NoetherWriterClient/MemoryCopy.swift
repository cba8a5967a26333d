// SPDX-License-Identifier: Apache-2.0
/// Copies on two threads: one does not reach the memory's speed, and a trainer has other use for the rest.
internal import CCopy
internal import Posix

enum MemoryCopy {
    /// - Parameters:
    ///   - pieces: must stay in place until this returns.
    ///   - memory: where they go, each to its place of `starts`.
    ///   - isFresh: whether nothing was ever written to `memory`.
    static func copy(
        _ pieces: [UnsafeRawBufferPointer], to memory: UnsafeMutableRawBufferPointer, _ starts: [UInt64],
        isFresh: Bool
    ) {
        let pieces = zip(pieces, starts).filter { !$0.0.isEmpty }
        guard let base = memory.baseAddress, !pieces.isEmpty else { return }
        let targets = pieces.map { UInt64(UInt(bitPattern: base)) + $0.1 }
        let sources = pieces.map { UInt64(UInt(bitPattern: $0.0.baseAddress)) }
        var end: UInt64 = 0
        let ends = pieces.map { piece in
            end += UInt64(piece.0.count)
            return end
        }
        targets.withUnsafeBufferPointer { targets in
            sources.withUnsafeBufferPointer { sources in
                ends.withUnsafeBufferPointer { ends in
                    var copy = nw_copy(
                        targets: targets.baseAddress, sources: sources.baseAddress, ends: ends.baseAddress,
                        count: UInt64(ends.count), fresh: isFresh ? 1 : 0, next: 0, done: 0, helpers: 0,
                        guarded: 0, failed: 0)
                    withUnsafeMutablePointer(to: &copy) {
                        nw_copy_start($0)
                        nw_copy_run($0, .max)
                        nw_copy_wait($0)
                    }
                }
            }
        }
    }

    /// A copy in memory of its own, which `deallocate` frees.
    static func copy(of bytes: UnsafeRawBufferPointer) -> UnsafeRawBufferPointer {
        let memory = LargeMemory.allocate(bytes.count)
        // On this thread: with huge pages it reaches the memory's speed.
        memory.copyMemory(from: bytes)
        return UnsafeRawBufferPointer(memory)
    }
}
