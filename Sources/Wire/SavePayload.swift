// SPDX-License-Identifier: Apache-2.0
/// A `save`: the sizes of a snapshot's storages and the names it goes under. The bytes themselves lie in the memfd.
public struct SavePayload: Sendable, Equatable {
    public struct Target: Sendable, Equatable, Codable {
        public var kind: CheckpointKind
        public var name: String
        public var tag: String
        public var info: String?
        /// Where this target's pickle lies in the memfd, in bytes.
        public var pickleOffset: UInt64
        public var pickleLength: UInt64
        /// Tags of older files that stay, whatever the retention of the run removes after this one.
        public var kept: [String]?

        public init(
            kind: CheckpointKind, name: String, tag: String, info: String?, pickleOffset: UInt64,
            pickleLength: UInt64, kept: [String]? = nil
        ) {
            self.kept = kept
            self.kind = kind
            self.name = name
            self.tag = tag
            self.info = info
            self.pickleOffset = pickleOffset
            self.pickleLength = pickleLength
        }

        public init(from decoder: any Decoder) throws {
            let members = try decoder.container(keyedBy: CodingKeys.self)
            let word = try members.decode(String.self, forKey: .kind)
            guard let known = CheckpointKind(rawValue: word) else {
                let served = CheckpointKind.allCases.map(\.rawValue).joined(separator: ", ")
                let found = String(word.prefix(64)).debugDescription
                throw DecodingError.dataCorruptedError(
                    forKey: .kind, in: members, debugDescription: "is \(found); these kinds are served: \(served)")
            }
            kind = known
            name = try members.decode(String.self, forKey: .name)
            tag = try members.decode(String.self, forKey: .tag)
            info = try members.decodeIfPresent(String.self, forKey: .info)
            pickleOffset = try members.count(.pickleOffset)
            pickleLength = try members.count(.pickleLength)
            kept = try members.decodeIfPresent([String].self, forKey: .kept)
        }

        /// `<name>[_<info>]_cp=<tag>_<kind>.th`; info counts for models only, as in Noether.
        public var fileName: String { beginning + tag + end }
        /// Of the file's name, before its tag.
        public var beginning: String { name + (infoInName.map { "_\($0)" } ?? "") + "_cp=" }
        /// Nil if the file's name has none.
        public var infoInName: String? {
            guard kind == .model, let info, !info.isEmpty else { return nil }
            return info
        }
        /// Of the file's name, after its tag.
        public var end: String { "_\(kind.rawValue).th" }
    }

    /// A file at any path, of a connection that was opened with the layout `files`.
    public struct File: Sendable, Equatable, Codable {
        public enum Form: String, Sendable, Codable, CaseIterable {
            /// What torch.save writes, made of a pickle and the save's storages.
            case torch
            /// The bytes of the buffer, as they are.
            case raw
        }

        /// Absolute, as the client sees its file system, without links in its directory.
        public var path: String
        public var form: Form
        /// What the names of the records begin with, if `form` is `torch`.
        public var archive: String?
        /// Where the pickle, or the content, lies in the memfd, in bytes.
        public var offset: UInt64
        public var length: UInt64
        /// What the mode of a new file lacks.
        public var umask: UInt32?
        /// The device of the directory when the save was made (stat(2), st_dev).
        public var device: UInt64?

        public init(
            path: String, form: Form, archive: String?, offset: UInt64, length: UInt64, umask: UInt32? = nil,
            device: UInt64? = nil
        ) {
            self.path = path
            self.form = form
            self.archive = archive
            self.offset = offset
            self.length = length
            self.umask = umask
            self.device = device
        }

        public init(from decoder: any Decoder) throws {
            let members = try decoder.container(keyedBy: CodingKeys.self)
            path = try members.decode(String.self, forKey: .path)
            let word = try members.decode(String.self, forKey: .form)
            guard let known = Form(rawValue: word) else {
                let served = Form.allCases.map(\.rawValue).joined(separator: ", ")
                throw DecodingError.dataCorruptedError(
                    forKey: .form, in: members,
                    debugDescription:
                        "is \(String(word.prefix(64)).debugDescription); these forms are served: \(served)")
            }
            form = known
            archive = try members.decodeIfPresent(String.self, forKey: .archive)
            offset = try members.count(.offset)
            length = try members.count(.length)
            umask = try members.decodeIfPresent(UInt32.self, forKey: .umask)
            device = try members.decodeIfPresent(UInt64.self, forKey: .device)
        }
    }

    struct Manifest: Codable {
        var storagesLength: UInt64
        var buffer: UInt64
        var logUpdate: Int64?
        var targets: [Target]?
        var files: [File]?

        init(_ payload: SavePayload) {
            storagesLength = payload.storagesLength
            buffer = payload.buffer
            logUpdate = payload.logUpdate
            targets = payload.files.isEmpty ? payload.targets : nil
            files = payload.files.isEmpty ? nil : payload.files
        }

        init(from decoder: any Decoder) throws {
            let members = try decoder.container(keyedBy: CodingKeys.self)
            storagesLength = try members.count(.storagesLength)
            buffer = try members.count(.buffer)
            logUpdate = try members.integerIfPresent(.logUpdate)
            files = try members.decodeIfPresent([File].self, forKey: .files)
            targets =
                files == nil
                ? try members.decode([Target].self, forKey: .targets)
                : try members.decodeIfPresent([Target].self, forKey: .targets)
        }
    }

    /// The extended attribute in which a file has `logUpdate`, as decimal digits: its bytes are torch.save's.
    public static let logUpdateAttribute = "user.noether_writer.log_update"
    /// The extended attribute in which a model's file has its info: its name alone does not say where the info begins.
    public static let infoAttribute = "user.noether_writer.info"

    public var sequence: UInt64
    public var storageLengths: [UInt64]
    /// Where the storages end in the memfd, in bytes; the pickles come after that.
    public var storagesLength: UInt64
    /// The client's own number for its buffer.
    public var buffer: UInt64
    /// The last update in the log that this checkpoint belongs with.
    public var logUpdate: Int64?
    /// Of a run; empty if there are `files`.
    public var targets: [Target]
    public var files: [File]

    public init(
        sequence: UInt64, storageLengths: [UInt64], storagesLength: UInt64, buffer: UInt64, logUpdate: Int64?,
        targets: [Target], files: [File] = []
    ) {
        self.sequence = sequence
        self.storageLengths = storageLengths
        self.storagesLength = storagesLength
        self.buffer = buffer
        self.logUpdate = logUpdate
        self.targets = targets
        self.files = files
    }

    /// The storages' places in a memfd: one after the other, each at a multiple of 64 bytes.
    /// - Returns: where each starts, and where the last one's last 64 bytes end; nil if the sum overflows.
    public static func storagePlaces(_ lengths: [UInt64]) -> (starts: [UInt64], end: UInt64)? {
        var starts: [UInt64] = []
        starts.reserveCapacity(lengths.count)
        var end: UInt64 = 0
        for length in lengths {
            starts.append(end)
            // Far below 2^64, so that the next sum can't wrap.
            guard length < 1 << 62, end < 1 << 62 else { return nil }
            end = (end + length + storageAlignment - 1) & ~(storageAlignment - 1)
        }
        return (starts, end)
    }

    private static let storageAlignment: UInt64 = 64

    public init(decoding payload: [UInt8]) throws(WireError) {
        var reader = ByteReader(payload)
        sequence = try reader.u64()
        let storageCount = Int(try reader.u32())
        let jsonLength = Int(try reader.u32())
        guard storageCount <= Limits.storages else {  // guard: storages-of-a-save (always)
            throw WireError(.tooLarge, "\(storageCount) storages in one checkpoint; at most \(Limits.storages)")
        }
        storageLengths = try reader.array(of: UInt64.self, count: storageCount)
        let json = Array(try reader.read(jsonLength))
        try reader.expectEnd("save")
        let manifest: Manifest
        do throws(WireError) { manifest = try JSONPayload.decode(Manifest.self, from: json) } catch {
            throw WireError(.badLayout, error.message)
        }
        targets = manifest.targets ?? []
        files = manifest.files ?? []
        let count = targets.count + files.count
        guard targets.isEmpty || files.isEmpty else {
            throw WireError(.badLayout, "a save has targets of a run, or files, and not both")
        }
        guard count > 0 else {  // guard: targets-at-all (always)
            throw WireError(.badLayout, "0 targets; 1 to \(Limits.targets) are served")
        }
        guard count <= Limits.targets else {  // guard: number-of-targets (always)
            throw WireError(.tooLarge, "\(count) targets; at most \(Limits.targets)")
        }
        storagesLength = manifest.storagesLength
        buffer = manifest.buffer
        logUpdate = manifest.logUpdate
    }

    /// Tells a save that is sent again from another one under the same number, within this process. Of the buffer's
    /// bytes it knows nothing.
    public var fingerprint: Int {
        var hasher = Hasher()
        hasher.combine(storageLengths)
        hasher.combine(storagesLength)
        hasher.combine(buffer)
        hasher.combine(logUpdate)
        for target in targets {
            hasher.combine(target.kind)
            for name in [target.name, target.tag, target.info ?? ""] { hasher.combine(ByteName(name)) }
            hasher.combine(target.pickleOffset)
            hasher.combine(target.pickleLength)
            hasher.combine(target.kept.map { $0.map(ByteName.init) })
        }
        for file in files {
            hasher.combine(file.form)
            for name in [file.path, file.archive ?? ""] { hasher.combine(ByteName(name)) }
            hasher.combine(file.offset)
            hasher.combine(file.length)
        }
        return hasher.finalize()
    }

    /// What names a save, of one that cannot be decoded too: its refusal says which one it was.
    public struct Identity: Sendable, Equatable {
        public var sequence: UInt64
        public var buffer: UInt64?

        public init(sequence: UInt64, buffer: UInt64? = nil) {
            self.sequence = sequence
            self.buffer = buffer
        }
    }

    /// - Throws: where it is too short for a sequence number.
    public static func identity(of payload: [UInt8]) throws(WireError) -> Identity {
        struct Named: Decodable { var buffer: UInt64? }
        var reader = ByteReader(payload)
        var identity = Identity(sequence: try reader.u64())
        if let count = try? reader.u32(), let jsonLength = try? reader.u32(),
            (try? reader.read(8 * Int(count))) != nil, let json = try? reader.read(Int(jsonLength)),
            let named = try? JSONPayload.decode(Named.self, from: Array(json))
        {
            identity.buffer = named.buffer
        }
        return identity
    }

    public func encoded() throws(WireError) -> [UInt8] {
        let json = try JSONPayload.encode(Manifest(self))
        var writer = ByteWriter(capacity: 16 + storageLengths.count * 8 + json.count)
        writer.u64(sequence)
        writer.u32(UInt32(storageLengths.count))
        writer.u32(UInt32(json.count))
        for length in storageLengths { writer.u64(length) }
        writer.bytes(json)
        return writer.bytes
    }
}

public enum CheckpointKind: String, Sendable, Codable, CaseIterable {
    case model, optim, trainer
}

extension KeyedDecodingContainer {
    /// A number that counts something. What is wrong with it names the member, which the decoder itself does not.
    func count(_ key: Key) throws -> UInt64 {
        do { return try decode(UInt64.self, forKey: key) } catch { throw outside(error, key, "0 to 2^64 - 1") }
    }

    func integerIfPresent(_ key: Key) throws -> Int64? {
        do { return try decodeIfPresent(Int64.self, forKey: key) } catch {
            throw outside(error, key, "-2^63 to 2^63 - 1")
        }
    }

    private func outside(_ error: any Error, _ key: Key, _ range: String) -> any Error {
        if let error = error as? DecodingError {
            if case .dataCorrupted = error {} else { return error }
        }
        return DecodingError.dataCorruptedError(
            forKey: key, in: self, debugDescription: "is not an integer of \(range)")
    }
}
