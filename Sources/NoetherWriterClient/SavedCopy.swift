// SPDX-License-Identifier: Apache-2.0
/// A state in a buffer that the daemon can read: its storages, then its pickle, once for each file.
internal import Posix
internal import Wire

struct SavedCopy {
    /// What is known before anything is copied.
    struct Layout {
        var lengths: [UInt64]
        var pickleLength: UInt64
        /// The offset at which each pickle will lie, in bytes.
        var pickleStarts: [UInt64]
    }

    let lengths: [UInt64]
    let storagesEnd: UInt64
    let pickleLength: UInt64
    let pickleStarts: [UInt64]
    let buffer: BufferPool.Buffer

    /// Copies once, at the memory's speed.
    /// - Parameters:
    ///   - files: their names, in messages.
    ///   - check: throws if one of them can't be; nothing was copied then.
    /// - Throws: `NoetherWriterError`: also if the state can't be saved, or no buffer came back in time.
    init(
        _ value: StateValue, _ pool: BufferPool, files: [String], check: (Layout) throws(NoetherWriterError) -> Void
    ) throws(NoetherWriterError) {
        let pickle = try StatePickle(value)
        let lengths = pickle.storages.map { UInt64($0.byteCount) }
        guard lengths.count <= Limits.storages else {
            throw .unsupportedValue(
                "\(files[0]) has \(lengths.count) storages; at most \(Limits.storages) fit into one save: save it in parts"
            )
        }
        guard let places = SavePayload.storagePlaces(lengths) else {
            throw .unsupportedValue("the tensors have more bytes than can be counted")
        }
        // Each file has a pickle of its own, though all are equal here.
        let pickleLength = UInt64(pickle.bytes.count)
        let starts = files.indices.map { places.end + UInt64($0) * pickleLength }
        try check(Layout(lengths: lengths, pickleLength: pickleLength, pickleStarts: starts))
        let buffer = try pool.reserve(Int(places.end + UInt64(files.count) * pickleLength))
        let memory = buffer.memory.bytes
        for start in starts {
            UnsafeMutableRawBufferPointer(rebasing: memory[Int(start)...]).copyBytes(from: pickle.bytes)
        }
        var pieces: [UnsafeRawBufferPointer] = []
        defer { for storage in pickle.storages.prefix(pieces.count) { storage.endReading() } }
        do throws(NoetherWriterError) {
            for storage in pickle.storages { pieces.append(try storage.beginReading()) }
        } catch {
            pool.release(buffer.number, reuses: true)
            throw error
        }
        MemoryCopy.copy(pieces, to: memory, places.starts, isFresh: buffer.isFresh)
        self.lengths = lengths
        storagesEnd = places.end
        self.pickleLength = pickleLength
        pickleStarts = starts
        self.buffer = buffer
    }
}
