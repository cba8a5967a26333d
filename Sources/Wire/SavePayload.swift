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

        public init(
            kind: CheckpointKind, name: String, tag: String, info: String?, pickleOffset: UInt64,
            pickleLength: UInt64
        ) {
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

    struct Manifest: Codable {
        var storagesLength: UInt64
        var buffer: UInt64
        var logUpdate: Int64?
        var targets: [Target]

        init(storagesLength: UInt64, buffer: UInt64, logUpdate: Int64?, targets: [Target]) {
            self.storagesLength = storagesLength
            self.buffer = buffer
            self.logUpdate = logUpdate
            self.targets = targets
        }

        init(from decoder: any Decoder) throws {
            let members = try decoder.container(keyedBy: CodingKeys.self)
            storagesLength = try members.count(.storagesLength)
            buffer = try members.count(.buffer)
            logUpdate = try members.integerIfPresent(.logUpdate)
            targets = try members.decode([Target].self, forKey: .targets)
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
    public var targets: [Target]

    public init(
        sequence: UInt64, storageLengths: [UInt64], storagesLength: UInt64, buffer: UInt64, logUpdate: Int64?,
        targets: [Target]
    ) {
        self.sequence = sequence
        self.storageLengths = storageLengths
        self.storagesLength = storagesLength
        self.buffer = buffer
        self.logUpdate = logUpdate
        self.targets = targets
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
        let count = Int(try reader.u32())
        let jsonLength = Int(try reader.u32())
        guard count <= Limits.storages else {
            throw WireError(.tooLarge, "\(count) storages in one checkpoint; at most \(Limits.storages)")
        }
        storageLengths = try reader.array(of: UInt64.self, count: count)
        let json = Array(try reader.take(jsonLength))
        try reader.expectEnd("save")
        let manifest: Manifest
        do throws(WireError) { manifest = try JSONPayload.decode(Manifest.self, from: json) } catch {
            throw WireError(.badLayout, error.message)
        }
        guard !manifest.targets.isEmpty else {
            throw WireError(.badLayout, "0 targets; 1 to \(Limits.targets) are served")
        }
        guard manifest.targets.count <= Limits.targets else {
            throw WireError(.tooLarge, "\(manifest.targets.count) targets; at most \(Limits.targets)")
        }
        storagesLength = manifest.storagesLength
        buffer = manifest.buffer
        logUpdate = manifest.logUpdate
        targets = manifest.targets
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
        }
        return hasher.finalize()
    }

    /// What names a save, of one that cannot be decoded too: its refusal says which one it was.
    public struct Identity: Sendable, Equatable {
        public var sequence: UInt64
        public var buffer: UInt64?
    }

    /// - Throws: where it is too short for a sequence number.
    public static func identity(of payload: [UInt8]) throws(WireError) -> Identity {
        struct Named: Decodable { var buffer: UInt64? }
        var reader = ByteReader(payload)
        var identity = Identity(sequence: try reader.u64())
        if let count = try? reader.u32(), let jsonLength = try? reader.u32(),
            (try? reader.take(8 * Int(count))) != nil, let json = try? reader.take(Int(jsonLength)),
            let named = try? JSONPayload.decode(Named.self, from: Array(json))
        {
            identity.buffer = named.buffer
        }
        return identity
    }

    public func encoded() throws(WireError) -> [UInt8] {
        let json = try JSONPayload.encode(
            Manifest(storagesLength: storagesLength, buffer: buffer, logUpdate: logUpdate, targets: targets))
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
