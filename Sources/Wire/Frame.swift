// SPDX-License-Identifier: Apache-2.0
/// The 16-byte frame header, and frames as they are cut out of a byte stream.
/// Pure: no descriptors, no sockets. docs/PROTOCOL.md section 2.

public enum FrameType: UInt8, Sendable, CaseIterable {
    case hello = 1
    case openRun = 2
    case defineKeys = 3
    case log = 4
    case save = 5
    case finish = 6
    case values = 7
    case entries = 8
    case status = 9
    case wait = 10
    case close = 11
    case subscribe = 12
    case metrics = 13
    case leave = 14
    case remove = 15
    case commit = 16
    case waitPath = 17
    case restore = 18
    case welcome = 64
    case error = 65
    case runOpened = 66
    case logAck = 67
    case checkpointEvent = 68
    case finished = 69
    case valuesPage = 70
    case entriesPage = 71
    case statusReport = 72
    case waited = 73
    case subscribed = 74
    case streamEvent = 75
    case rows = 76
    case metricsText = 77
    case restored = 78

    /// What the daemon serves, as `welcome` lists it: frames by their names; `log_merge`, that the same update again
    /// adds to its row; `run_settings`, that an `open_run` brings its umask and what is kept; `kept_tags`, that a
    /// `save` names older checkpoints that stay; `files`, that an `open_run` may have the layout of that name.
    public static let capabilities = [
        "open_run", "define_keys", "log", "save", "finish", "values", "entries", "status", "wait", "close",
        "subscribe", "metrics", "leave", "log_merge", "run_settings", "kept_tags", "output_root_descriptor",
        "files", "remove", "commit", "wait_path", "restore",
    ]
}

public struct FrameHeader: Sendable, Equatable {
    public static let byteCount = 16
    /// The bytes of the header that hold the request number.
    static let requestBytes = 4..<8
    public static let magic: UInt16 = 0x574E
    public static let version: UInt8 = 1

    /// As on the wire: a type this side does not know is a legal frame, answered with `unknown-type`.
    public var type: UInt8
    public var request: UInt32
    public var length: UInt32
    public var fdCount: UInt16

    public init(type: UInt8, request: UInt32, length: UInt32, fdCount: UInt16) {
        self.type = type
        self.request = request
        self.length = length
        self.fdCount = fdCount
    }

    /// Checks every rule before anything is allocated for the payload.
    /// - Parameter bytes: at least 16 bytes.
    public init(decoding bytes: borrowing ByteReader) throws(WireError) {
        var reader = copy bytes
        let magic = try reader.u16()
        guard magic == Self.magic else {  // guard: magic (always)
            throw WireError(
                .badFrame, "bad magic 0x\(String(magic, radix: 16)); a frame starts with the bytes 4E 57")
        }
        let version = try reader.u8()
        guard version == Self.version else {  // guard: version (always)
            throw WireError(
                .unsupportedVersion, "framing version \(version); this side speaks version \(Self.version)")
        }
        type = try reader.u8()
        request = try reader.u32()
        length = try reader.u32()
        fdCount = try reader.u16()
        let reserved = try reader.u16()
        guard length <= UInt32(Limits.payloadBytes) else {  // guard: payload-length (always)
            throw WireError(
                .tooLarge,
                "a payload of \(length) bytes; at most \(Limits.payloadBytes) (bulk data goes by memfd)")
        }
        guard Int(fdCount) <= Limits.fdsPerFrame else {  // guard: fds-declared (always)
            throw WireError(.badFrame, "\(fdCount) descriptors in one frame; at most \(Limits.fdsPerFrame)")
        }
        guard reserved == 0 else {  // guard: reserved (always)
            throw WireError(.badFrame, "the reserved header field is \(reserved), not 0")
        }
        // A type that this side does not know may carry one: it is refused as a type.
        // guard: fd-on-save-only (never)
        if fdCount > 0, let known = FrameType(rawValue: type), ![.save, .openRun, .restored].contains(known) {
            throw WireError(
                .badFrame, "a descriptor on frame type \(type); only save, open_run and restored carry one")
        }
    }

    public func encode(into writer: inout ByteWriter) {
        writer.u16(Self.magic)
        writer.u8(Self.version)
        writer.u8(type)
        writer.u32(request)
        writer.u32(length)
        writer.u16(fdCount)
        writer.u16(0)
    }
}

public struct Frame: Sendable, Equatable {
    public var header: FrameHeader
    public var payload: [UInt8]

    public init(_ type: FrameType, request: UInt32 = 0, payload: [UInt8] = [], fdCount: UInt16 = 0) {
        header = FrameHeader(
            type: type.rawValue, request: request, length: UInt32(payload.count), fdCount: fdCount)
        self.payload = payload
    }

    init(header: FrameHeader, payload: [UInt8]) {
        self.header = header
        self.payload = payload
    }

    public func encoded() -> [UInt8] {
        var writer = ByteWriter(capacity: FrameHeader.byteCount + payload.count)
        header.encode(into: &writer)
        writer.bytes(payload)
        return writer.bytes
    }
}
