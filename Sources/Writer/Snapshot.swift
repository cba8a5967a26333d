// SPDX-License-Identifier: Apache-2.0
/// A checkpoint as it lies in a client's memfd, and its way into files. Checked once on the daemon's queue, then only
/// read, on a disk queue. Bytes are copied out before they are summed, so a client that writes into its buffer too
/// early spoils its own file's content and nothing else.
public import Posix
import Synchronization
public import TorchFile
public import Wire

public struct Snapshot: Sendable {
    public let sequence: UInt64
    public let buffer: UInt64
    /// Tells a save that is sent again from another one under the same number.
    let fingerprint: Int
    /// The last update of the log that it belongs with.
    public let logUpdate: Int64?
    public let targets: [Target]
    /// When a daemon before this one accepted it, in seconds since 1970; nil if this one has got it, or it is not known.
    public var acceptedAt: Double?
    let memory: ReceivedMemory
    /// Of the client's buffer, with what is padding.
    let memoryByteCount: UInt64
    /// Where each storage lies in the memfd, and its length, in bytes.
    let storages: [Range<Int>]
    private let progress = Progress()

    /// Counted on a disk queue, read on the daemon's queue.
    private final class Progress: Sendable {
        let bytes = Atomic<UInt64>(0)
        /// The file that was written last, for the next one of the same storages.
        let written = Mutex<Written?>(nil)
        /// Of files that came out longer or shorter than `Target.byteCount`, by target.
        let lengths = Mutex<[Int: UInt64]>([:])
    }

    private struct Written {
        let file: OwnedFD
        let layout: ArchiveLayout
        let storageSums: [UInt32]
    }

    public struct Target: Sendable {
        public let fileName: String
        /// The file's name is `<beginning><tag><end>`.
        let tag: String
        let beginning: String
        let end: String
        /// Tags of older files that stay.
        let kept: [String]
        /// The part of `beginning` that is the model's info, or nil.
        fileprivate let info: String?
        fileprivate let archiveName: String
        /// nil: a file that has the bytes of the buffer as they are.
        public let layout: ArchiveLayout?
        /// Where the pickle, or the content of a file without a layout, lies in the memfd.
        let pickle: Range<Int>
        /// The file, if it is at any path and of no run.
        let file: SavePayload.File?
        public var byteCount: UInt64 { layout?.imageLength ?? UInt64(pickle.count) }
    }

    /// What is known of a target before the buffer was looked at.
    private struct Named {
        var fileName: String
        var archiveName: String
        var layout: ArchiveLayout?
        var pickle: Range<UInt64>
    }

    /// Checks everything the client said before anything is read.
    ///
    /// - Parameter directory: the path of the files' directory, which the names of their records depend on.
    public init(_ payload: SavePayload, in directory: String, fd: OwnedFD) throws(WireError) {
        sequence = payload.sequence
        buffer = payload.buffer
        fingerprint = payload.fingerprint
        logUpdate = payload.logUpdate
        var targets: [Named] = []
        for target in payload.targets {
            try RunName.component(target.name, "the model name")  // guard: model-name (skip)
            try RunName.component(target.tag, "the checkpoint tag")  // guard: tag (skip)
            // guard: info (never)
            if let info = target.info, !info.isEmpty { try RunName.component(info, "the model info") }
            // guard: file-name (= target.fileName)
            let fileName = try RunName.component(target.fileName, "the file name")
            targets.append(
                try Self.archive(
                    fileName, ArchiveLayout.archiveName(path: "\(directory)/\(fileName)"), at: target.pickleOffset,
                    target.pickleLength, payload))
        }
        for file in payload.files { targets.append(try Self.named(file, payload)) }
        guard let places = SavePayload.storagePlaces(payload.storageLengths),
            places.end == payload.storagesLength  // guard: sum-of-sizes (always)
        else {
            throw WireError(
                .badLayout,
                "storages_length \(payload.storagesLength); the sizes say "
                    + (SavePayload.storagePlaces(payload.storageLengths).map { "\($0.end)" }
                        ?? "more than can be"))
        }
        var needed = places.end
        for (index, target) in targets.enumerated() {
            // Files that hold the buffer's bytes as they are may hold the same ones.
            let others = targets[..<index].filter { $0.layout != nil || target.layout != nil }
            // guard: pickle-behind-storages (always: target.pickle.lowerBound >= places.end)
            guard target.pickle.lowerBound >= places.end,
                // guard: pickles-apart (always: !others.contains(where: { $0.pickle.overlaps(target.pickle) }))
                !others.contains(where: { $0.pickle.overlaps(target.pickle) })
            else { throw WireError(.badLayout, "the pickle of \(target.fileName) overlaps other data") }
            needed = max(needed, target.pickle.upperBound)
        }
        let names = payload.files.isEmpty ? targets.map(\.fileName) : payload.files.map(\.path)
        if Set(names.map(ByteName.init)).count != targets.count {  // guard: names-apart (never)
            throw WireError(.badName, "two targets of one save have the name \(names[0])")
        }
        // None of these overlap, so no sum of them is larger than what is needed.
        let pickles = targets.filter { $0.layout != nil }.reduce(0) { $0 + UInt64($1.pickle.count) }
        let longest = targets.filter { $0.layout == nil }.map { UInt64($0.pickle.count) }.max() ?? 0
        let content = payload.storageLengths.reduce(0, +) + pickles + longest
        do { memory = try ReceivedMemory(fd, atLeast: needed, content: content) } catch {
            throw switch error {
            case .notRegular: WireError(.badBuffer, "the descriptor is not a memfd")
            case .notSealed: WireError(.badBuffer, "the memfd lacks the seals F_SEAL_SHRINK and F_SEAL_GROW")
            case .tooShort(let size, let needed):
                WireError(.badBuffer, "the memfd has \(size) bytes; the checkpoint needs \(needed)")
            case .hollow(let byteCount, let content):
                WireError(
                    .badBuffer,
                    "the memfd has \(byteCount) bytes of memory, and the checkpoint \(content): a buffer must be written whole"
                )
            case .system(let error): WireError(.storage, error.description, errno: error.errno)
            }
        }
        // What lies between them may be holes.
        memoryByteCount = min(needed, memory.allocatedByteCount)
        storages = zip(places.starts, payload.storageLengths).map { Int($0)..<Int($0 + $1) }
        self.targets = targets.enumerated().map { index, target in
            let named = payload.files.isEmpty ? payload.targets[index] : nil
            return Target(
                fileName: target.fileName, tag: named?.tag ?? "", beginning: named?.beginning ?? "",
                end: named?.end ?? "", kept: named?.kept ?? [], info: named?.infoInName,
                archiveName: target.archiveName, layout: target.layout,
                pickle: Int(target.pickle.lowerBound)..<Int(target.pickle.upperBound),
                file: payload.files.isEmpty ? nil : payload.files[index])
        }
    }

    private static func archive(
        _ fileName: String, _ archiveName: String, at offset: UInt64, _ length: UInt64, _ payload: SavePayload
    ) throws(WireError) -> Named {
        let layout: ArchiveLayout
        do {
            layout = try ArchiveLayout(
                archiveName: archiveName, pickleLength: length, storageLengths: payload.storageLengths)
        } catch { throw WireError(.badLayout, "the sizes of \(fileName) do not make a file: \(error)") }
        guard layout.imageLength <= Limits.imageBytes else {  // guard: bytes-of-a-file (always)
            throw WireError(
                .tooLarge, "\(fileName) would have \(layout.imageLength) bytes; at most \(Limits.imageBytes)")
        }
        let (end, overflow) = offset.addingReportingOverflow(length)
        // guard: pickle-overflow (always)
        guard !overflow else { throw WireError(.badLayout, "the pickle of \(fileName) overflows") }
        // guard: pickle-empty (always)
        guard length > 0 else { throw WireError(.badLayout, "the pickle of \(fileName) is empty") }
        return Named(fileName: fileName, archiveName: archiveName, layout: layout, pickle: offset..<end)
    }

    private static func named(_ file: SavePayload.File, _ payload: SavePayload) throws(WireError) -> Named {
        let path = try AbsolutePath(file.path)
        guard let fileName = path.name else {
            throw WireError(.badPath, "\(AbsolutePath.quoted(file.path)) names a directory, and no file")
        }
        if file.form == .torch {
            guard let archive = file.archive, !archive.isEmpty, !archive.utf8.contains(0),
                !archive.utf8.contains(UInt8(ascii: "/"))
            else {
                throw WireError(.badName, "the archive of \(fileName) has no name, or one with a slash or a NUL")
            }
            return try self.archive(fileName, archive, at: file.offset, file.length, payload)
        }
        let (end, overflow) = file.offset.addingReportingOverflow(file.length)
        guard !overflow, payload.storageLengths.isEmpty else {
            throw WireError(.badLayout, "the content of \(fileName) overflows, or comes with storages")
        }
        guard file.length <= Limits.imageBytes else {
            throw WireError(.tooLarge, "\(fileName) would have \(file.length) bytes; at most \(Limits.imageBytes)")
        }
        return Named(fileName: fileName, archiveName: "", layout: nil, pickle: file.offset..<end)
    }

    /// Of all its files.
    public var byteCount: UInt64 { targets.reduce(0) { $0 + $1.byteCount } }
    /// Of these, what has been handed to the file system.
    public var bytesWritten: UInt64 { min(byteCount, progress.bytes.load(ordering: .relaxed)) }
    public var descriptor: OwnedFD { memory.fd }
    private func byteCount(before index: Int) -> UInt64 {
        targets[..<index].reduce(0) { $0 + $1.byteCount }
    }

    /// Of one file, what has been handed to the file system.
    func bytesWritten(of index: Int) -> UInt64 {
        bytesWritten - min(bytesWritten, byteCount(before: index))
    }

    /// Of one file, as it was written.
    func byteCount(of index: Int) -> UInt64 {
        progress.lengths.withLock { $0[index] } ?? targets[index].byteCount
    }

    /// - Parameter image: gets the bytes of the file too.
    /// - Returns: the file.
    func write(
        _ index: Int, in directory: Directory, mark: SaveMark, image: MemoryImage? = nil, written: () -> Void
    ) throws(PosixError) -> OwnedFD {
        guard let own = targets[index].layout else {
            return try writeAsItIs(index, in: directory, mark: mark, image: image, written: written)
        }
        if let first = progress.written.withLock({ $0.take() }),
            storages.contains(where: { $0.count >= ArchiveLayout.sharedByteCount }),
            let layout = targets[index].layout(
                sharingWith: first.layout, storageLengths: storages.map(\.count)),
            case let ranges = layout.blocks(sharedWith: first.layout), !ranges.isEmpty,
            // Whatever the reason is: from memory then, which says what is wrong if it still is.
            let file = try? write(
                index, layout, in: directory,
                sharing: (.init(of: first.file, ranges), first.storageSums), mark: mark, image: image, written: written)
        {
            return file
        }
        return try write(index, own, in: directory, mark: mark, image: image, written: written)
    }

    private func writeAsItIs(
        _ index: Int, in directory: Directory, mark: SaveMark, image: MemoryImage?, written: () -> Void
    ) throws(PosixError) -> OwnedFD {
        let target = targets[index]
        progress.bytes.store(byteCount(before: index), ordering: .relaxed)
        var position = target.pickle.lowerBound
        return try DurableFile.write(
            target.fileName, in: directory, length: target.byteCount, attributes: mark.attributes,
            produce: { buffer throws(PosixError) in
                let count = min(buffer.count, target.pickle.upperBound - position)
                try memory.copy(from: position, to: UnsafeMutableRawBufferPointer(rebasing: buffer[..<count]))
                position += count
                Faults.interrupt(at: "checkpoint.chunk")
                progress.bytes.wrappingAdd(UInt64(count), ordering: .relaxed)
                return count
            }, written: written, keepsMode: target.file != nil, image: image, faults: "checkpoint")
    }

    private func write(
        _ index: Int, _ layout: ArchiveLayout, in directory: Directory,
        sharing: (blocks: DurableFile.SharedBlocks, sums: [UInt32])? = nil, mark: SaveMark, image: MemoryImage?,
        written: () -> Void
    ) throws(PosixError) -> OwnedFD {
        let target = targets[index]
        // A second try counts from where this target starts.
        progress.bytes.store(byteCount(before: index), ordering: .relaxed)
        var failure: PosixError?
        var position: UInt64 = 0
        var stream = ArchiveStream(layout: layout, knownSums: sharing?.sums) { part, position, buffer in
            let start =
                switch part {
                case .pickle: target.pickle.lowerBound
                case .storage(let index): storages[index].lowerBound
                }
            do throws(PosixError) { try memory.copy(from: start + position, to: buffer) } catch {
                failure = error
            }
        }
        let file = try DurableFile.write(
            target.fileName, in: directory, length: layout.imageLength,
            // guard: checkpoint-says-its-update (= [:] for attributes(of: target))
            attributes: attributes(of: target).merging(mark.attributes) { own, _ in own },
            shared: sharing?.blocks,
            produce: { buffer throws(PosixError) in
                let count = stream.read(into: buffer)
                if let failure { throw failure }
                position += UInt64(count)
                Faults.interrupt(at: "checkpoint.chunk")
                progress.bytes.wrappingAdd(UInt64(count), ordering: .relaxed)
                return count
            },
            skip: { count in
                if let image {
                    Self.copy(count, of: &stream, to: image, at: position)
                    // An image that is not what the file is.
                    if failure != nil { image.giveUp() }
                } else {
                    stream.skip(count)
                }
                position += UInt64(count)
                progress.bytes.wrappingAdd(UInt64(count), ordering: .relaxed)
            }, written: written, keepsMode: target.file != nil, image: image, faults: "checkpoint")
        progress.lengths.withLock { $0[index] = layout.imageLength }
        guard index + 1 < targets.count else { return file }
        progress.written.withLock {
            $0 = Written(file: file, layout: layout, storageSums: stream.storageSums)
        }
        return file
    }

    /// Copies bytes that the file shares with another file into its image, which shares nothing.
    private static func copy(_ count: Int, of stream: inout ArchiveStream, to image: MemoryImage, at position: UInt64) {
        let buffer = UnsafeMutableRawBufferPointer.allocate(
            byteCount: min(count, DurableFile.chunkByteCount), alignment: 64)
        defer { buffer.deallocate() }
        var done = 0
        while done < count {
            let piece = UnsafeMutableRawBufferPointer(rebasing: buffer[..<min(buffer.count, count - done)])
            precondition(stream.read(into: piece) == piece.count)
            image.write(UnsafeRawBufferPointer(piece), at: position + UInt64(done))
            done += piece.count
        }
    }
}

extension Snapshot {
    /// What the file's bytes and its name do not say: its bytes are torch.save's.
    private func attributes(of target: Target) -> [String: String] {
        var attributes: [String: String] = [:]
        attributes[SavePayload.logUpdateAttribute] = logUpdate.map { "\($0)" }
        attributes[SavePayload.infoAttribute] = target.info
        return attributes
    }
}

extension Snapshot.Target {
    /// Nil where the other layout leaves no room for the paddings.
    fileprivate func layout(sharingWith other: ArchiveLayout, storageLengths: [Int]) -> ArchiveLayout? {
        try? ArchiveLayout(
            archiveName: archiveName, pickleLength: UInt64(pickle.count),
            storageLengths: storageLengths.map { UInt64($0) }, sharingWith: other)
    }
}
