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

        /// `<name>[_<info>]_cp=<tag>_<kind>.th`; info counts for models only, as in Noether.
        public var fileName: String { beginning + tag + end }
        /// Of the file's name, before its tag.
        public var beginning: String {
            let suffix = kind == .model ? info.flatMap { $0.isEmpty ? nil : "_\($0)" } ?? "" : ""
            return "\(name)\(suffix)_cp="
        }
        /// Of the file's name, after its tag.
        public var end: String { "_\(kind.rawValue).th" }
    }

    struct Manifest: Codable {
        var storagesLength: UInt64
        var buffer: UInt64
        var logUpdate: Int64?
        var targets: [Target]
    }

    /// The extended attribute in which a file has `logUpdate`, as decimal digits: its bytes are torch.save's.
    public static let logUpdateAttribute = "user.noether_writer.log_update"

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
        let manifest = try JSONPayload.decode(Manifest.self, from: Array(try reader.take(jsonLength)))
        try reader.expectEnd("save")
        guard (1...Limits.targets).contains(manifest.targets.count) else {
            throw WireError(
                .badLayout, "\(manifest.targets.count) targets; 1 to \(Limits.targets) are served")
        }
        storagesLength = manifest.storagesLength
        buffer = manifest.buffer
        logUpdate = manifest.logUpdate
        targets = manifest.targets
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
