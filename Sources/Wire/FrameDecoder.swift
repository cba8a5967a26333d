// SPDX-License-Identifier: Apache-2.0
/// Cuts a byte stream into frames. Pure and incremental: fed one byte at a time it gives the same frames as fed
/// whole. After an error it stays broken, since nothing after a bad header can be trusted.
public struct FrameDecoder: Sendable {
    private var buffer: [UInt8] = []
    private var start = 0
    private var broken: WireError?
    /// The request number in the header that broke a rule. The error that refuses the header names it.
    public private(set) var brokenRequest: UInt32 = 0

    public init() {}

    /// Bytes of a frame that is not complete yet; 0 between frames.
    public var pendingByteCount: Int { buffer.count - start }

    /// Position in the stream, counted from the first byte ever fed, of the next frame's first byte. Descriptors
    /// arrive with the first byte of their frame, so a receiver can tell whose they are.
    public private(set) var frameStart: UInt64 = 0

    public mutating func feed(_ bytes: UnsafeRawBufferPointer) {
        if start > 0, start == buffer.count {
            buffer.removeAll(keepingCapacity: buffer.capacity <= 1 << 17)
            start = 0
        } else if start > 1 << 16 {
            buffer.removeFirst(start)
            start = 0
        }
        buffer.append(contentsOf: bytes)
    }

    /// Gives back the memory of frames that are gone: a connection may be silent for days.
    public mutating func trim() {
        guard pendingByteCount == 0, buffer.capacity > 1 << 12 else { return }
        buffer = []
        start = 0
    }

    public mutating func feed(_ bytes: [UInt8]) { bytes.withUnsafeBytes { feed($0) } }

    /// The next complete frame, or nil until more bytes come.
    public mutating func next() throws(WireError) -> Frame? {
        if let broken { throw broken }
        guard pendingByteCount >= FrameHeader.byteCount else { return nil }
        do {
            let header = try FrameHeader(
                decoding: ByteReader(buffer[start..<start + FrameHeader.byteCount]))
            let end = start + FrameHeader.byteCount + Int(header.length)
            guard buffer.count >= end else { return nil }
            let payload = Array(buffer[start + FrameHeader.byteCount..<end])
            frameStart += UInt64(end - start)
            start = end
            return Frame(header: header, payload: payload)
        } catch {
            broken = error
            brokenRequest = FrameHeader.requestBytes.reversed().reduce(0) { $0 << 8 | UInt32(buffer[start + $1]) }
            throw error
        }
    }
}
