// SPDX-License-Identifier: Apache-2.0
/// Gives memory back that malloc keeps: logs on their way to the journal leave holes between the columns, which stay.
/// Looked for a second after something was freed, once for all runs, so that a daemon that rests is not woken.
import Posix

@DaemonActor enum Heap {
    private static let settleSeconds = 1.0
    /// Less is not worth the walk through the heap.
    private static let toleratedByteCount = 4 << 20
    private static var isLooking = false

    static func noteFreed(_ byteCount: Int) {
        guard byteCount >= 64 << 10, !isLooking else { return }
        isLooking = true
        DaemonActor.enter(after: settleSeconds) {
            isLooking = false
            if ThisProcess.freeHeapByteCount > toleratedByteCount { ThisProcess.giveBackFreeMemory() }
        }
    }
}
