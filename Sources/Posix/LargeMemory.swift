// SPDX-License-Identifier: Apache-2.0
/// Memory of megabytes that is written at once: with small pages the page faults cost several times the copy.
import Glibc

public enum LargeMemory {
    private static let pageByteCount = 2 << 20

    /// Aligned to 64 bytes, and from 2 MiB on to a huge page, which the kernel is asked for. Freed by `deallocate`.
    public static func allocate(_ byteCount: Int) -> UnsafeMutableRawBufferPointer {
        var memory: UnsafeMutableRawPointer?
        guard byteCount >= pageByteCount, posix_memalign(&memory, pageByteCount, byteCount) == 0,
            let memory
        else { return .allocate(byteCount: byteCount, alignment: 64) }
        // If the kernel has none, small ones do.
        madvise(memory, byteCount, Int32(MADV_HUGEPAGE))
        return UnsafeMutableRawBufferPointer(start: memory, count: byteCount)
    }
}
