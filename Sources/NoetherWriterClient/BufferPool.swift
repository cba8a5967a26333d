// SPDX-License-Identifier: Apache-2.0
/// Shared buffers, kept mapped and used again: fresh shared memory costs several times a warm copy. A buffer is out
/// from `take` until the daemon releases it.
import Dispatch
internal import Posix
internal import Synchronization

final class BufferPool: Sendable {
    struct Buffer: Sendable {
        var number: UInt64
        var memory: SharedMemory
        /// Nothing was ever written to it.
        var isFresh = true
        /// When it came back, in monotonic seconds.
        var freeSince = 0.0
        var capacity: Int { memory.bytes.count }
    }

    private struct State {
        var free: [Buffer] = []
        var out: [UInt64: Buffer] = [:]
        var next: UInt64 = 1
        var waiters = 0

        var outByteCount: Int { out.values.reduce(0) { $0 + $1.capacity } }
        var freeByteCount: Int { free.reduce(0) { $0 + $1.capacity } }
    }

    /// Of this process.
    /// - Throws: on `get`, `NoetherWriterError.invalidVariable`.
    static let shared = Result { () throws(NoetherWriterError) in BufferPool(try Variables()) }

    private static let roundByteCount = 2 << 20
    /// What the pool leaves of the job's memory, unless a sixteenth is more.
    private static let spareByteCount = 16 << 20
    private static let queue = DispatchQueue(label: "noether-writer.pool")
    /// The most bytes that the pool takes. It never takes more than the memory limit of the job leaves free.
    private let most: Int
    /// nil: whoever runs this program has set a limit, and the job's is not looked at.
    private let job: JobMemory?
    private let mostCount: Int
    private let idleSeconds: Double
    /// How long a save waits: for a buffer, and for a daemon that has no room.
    let timeoutSeconds: Double
    private let state = Mutex(State())
    private let changed = DispatchSemaphore(value: 0)

    /// One buffer is always allowed, however little the variables allow.
    /// - Parameters:
    ///   - job: whose memory the buffers take.
    ///   - mostCount: each buffer is a descriptor, and this process needs others.
    init(
        _ variables: Variables, job: JobMemory = JobMemory(), mostCount: Int = ThisProcess.descriptorLimit / 4
    ) {
        self.mostCount = max(1, mostCount)
        most = variables.poolByteCount ?? ThisProcess.physicalMemoryByteCount / 2
        self.job = variables.poolByteCount == nil ? job : nil
        timeoutSeconds = variables.poolTimeoutSeconds
        idleSeconds = variables.poolIdleSeconds
    }

    /// - Throws: `NoetherWriterError.poolExhausted` if none came back in time, `NoetherWriterError.storage` if there is
    ///   no memory.
    func reserve(_ needed: Int) throws(NoetherWriterError) -> Buffer {
        let deadline = DispatchTime.after(.seconds(timeoutSeconds))
        let limit = try limit(for: needed)
        while true {
            let result: Result<Buffer?, PosixError> = state.withLock { state in
                do throws(PosixError) {
                    let buffer = try reserve(needed, limit, from: &state)
                    if buffer == nil { state.waiters += 1 }
                    return .success(buffer)
                } catch { return .failure(error) }
            }
            switch result {
            case .success(let buffer?): return buffer
            case .failure(let error):
                throw .storage(
                    path: "a buffer of \(needed) bytes", message: error.description, errno: error.errno)
            case .success(nil):
                guard changed.wait(timeout: deadline) == .success else {
                    let (held, count) = state.withLock { state in
                        state.waiters = max(0, state.waiters - 1)
                        return (state.outByteCount, state.out.count)
                    }
                    if held + needed <= limit { throw .tooManySaves(count: count) }
                    throw .poolExhausted(held: held, needed: needed, limit: limit)
                }
            }
        }
    }

    /// It is better to wait than to be killed: a job that passes its limit is.
    /// - Throws: `NoetherWriterError.jobMemory`: even an empty pool would have no room.
    private func limit(for needed: Int) throws(NoetherWriterError) -> Int {
        guard let room = job?.room else { return most }
        let held = byteCount
        guard needed <= held + room else { throw .jobMemory(needed: needed, room: held + room) }
        // A little is left for the trainer itself.
        return min(most, held + room - min(room, max(room / 16, Self.spareByteCount)))
    }

    private func reserve(_ needed: Int, _ limit: Int, from state: inout State) throws(PosixError) -> Buffer? {
        let fitting = state.free.indices.filter {
            (needed...2 * needed + Self.roundByteCount).contains(state.free[$0].capacity)
        }
        if let best = fitting.min(by: { state.free[$0].capacity < state.free[$1].capacity }) {
            let buffer = state.free.remove(at: best)
            state.out[buffer.number] = buffer
            return buffer
        }
        let held = state.outByteCount
        while !state.free.isEmpty,
            held + state.freeByteCount + needed > limit || state.out.count + state.free.count >= mostCount
        {
            state.free.removeFirst()
        }
        guard state.out.isEmpty || held + needed <= limit && state.out.count < mostCount else { return nil }
        let rounded = (needed + Self.roundByteCount - 1) / Self.roundByteCount * Self.roundByteCount
        let buffer = Buffer(number: state.next, memory: try SharedMemory(capacity: rounded))
        state.next += 1
        state.out[buffer.number] = buffer
        return buffer
    }

    /// - Parameter reuses: false: it is let go of, and a new one takes its place.
    func release(_ number: UInt64, reuses: Bool = true) {
        let waiters = state.withLock { state in
            guard var buffer = state.out.removeValue(forKey: number) else { return 0 }
            buffer.isFresh = false
            buffer.freeSince = Clock.monotonicSeconds
            if reuses {
                state.free.append(buffer)
                shrinkLater()
            }
            defer { state.waiters = 0 }
            return state.waiters
        }
        for _ in 0..<waiters { changed.signal() }
    }

    private func shrinkLater() {
        Self.queue.asyncAfter(deadline: .now() + idleSeconds) { [weak self, idleSeconds] in
            self?.state.withLock { state in
                state.free.removeAll { Clock.monotonicSeconds - $0.freeSince >= idleSeconds }
            }
        }
    }

    /// Bytes of all its buffers.
    var byteCount: Int { state.withLock { $0.outByteCount + $0.freeByteCount } }
}
