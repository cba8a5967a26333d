// SPDX-License-Identifier: Apache-2.0
/// Fuzz target: what a client may send. The bytes go through the frame decoder whole and in pieces, and each frame's
/// payload through the decoder of its type, those of the daemon's own frames too (clients read them). What decodes must
/// survive being encoded and decoded again.
import Wire

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzFrames(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
    let bytes = Array(UnsafeBufferPointer(start: data, count: size))
    let whole = frames(bytes, pieceByteCount: max(1, bytes.count))
    let pieces = frames(bytes, pieceByteCount: Int(bytes.first ?? 0) % 19 + 1)
    precondition(whole.found == pieces.found, "pieces give other frames")
    precondition(whole.isBroken == pieces.isBroken, "pieces give another error")
    for frame in whole.found { decode(frame) }
    return 0
}

private func frames(_ bytes: [UInt8], pieceByteCount: Int) -> (found: [Frame], isBroken: Bool) {
    var decoder = FrameDecoder()
    var found: [Frame] = []
    for start in stride(from: 0, to: bytes.count, by: pieceByteCount) {
        decoder.feed(Array(bytes[start..<min(start + pieceByteCount, bytes.count)]))
        do { while let frame = try decoder.next() { found.append(frame) } } catch { return (found, true) }
        precondition(decoder.pendingByteCount <= FrameHeader.byteCount + Limits.payloadBytes)
    }
    return (found, false)
}

private func decode(_ frame: Frame) {
    let payload = frame.payload
    guard let type = FrameType(rawValue: frame.header.type) else { return }
    switch type {
    case .hello: json(Hello.self, payload)
    case .openRun: json(OpenRun.self, payload)
    case .defineKeys:
        again(payload, { try KeyDefinitions(decoding: $0) }) { written { $0.encode(into: &$1) }($0) }
    case .log:
        again(payload, { try LogPayload(decoding: $0) }) { written { $0.encode(into: &$1) }($0) }
    case .save: again(payload, { try SavePayload(decoding: $0) }) { try $0.encoded() }
    case .finish: json(Finish.self, payload)
    case .remove: json(Remove.self, payload)
    case .commit: json(Commit.self, payload)
    case .waitPath: json(WaitPath.self, payload)
    case .values, .entries: json(PageRequest.self, payload)
    case .wait: json(WaitRequest.self, payload)
    case .welcome: json(Welcome.self, payload)
    case .error: json(ErrorMessage.self, payload)
    case .runOpened: json(RunOpened.self, payload)
    case .logAck: again(payload, { try LogAck(decoding: $0) }) { $0.encoded() }
    case .checkpointEvent: json(CheckpointEvent.self, payload)
    case .finished: json(Finished.self, payload)
    case .valuesPage: again(payload, { try ValuesPage(decoding: $0) }) { $0.encoded() }
    case .subscribe: json(Subscribe.self, payload)
    case .subscribed: json(Subscribed.self, payload)
    case .streamEvent: json(StreamEvent.self, payload)
    case .entriesPage, .rows: again(payload, { try EntriesPage(decoding: $0) }) { $0.encoded() }
    case .statusReport: json(StatusReport.self, payload)
    case .waited: json(Waited.self, payload)
    case .leave: json(Leave.self, payload)
    case .restore: json(Restore.self, payload)
    case .restored: json(Restored.self, payload)
    case .status, .close, .metrics, .metricsText: break
    }
}

private func written<T>(_ encode: @escaping (T, inout ByteWriter) -> Void) -> (T) -> [UInt8] {
    { value in
        var writer = ByteWriter()
        encode(value, &writer)
        return writer.bytes
    }
}

private func json<T: Codable & Equatable>(_ type: T.Type, _ payload: [UInt8]) {
    again(payload, { try JSONPayload.decode(type, from: $0) }) { try JSONPayload.encode($0) }
}

/// Decoded, encoded and decoded: the same; or not decodable at all.
private func again<T: Equatable>(
    _ payload: [UInt8], _ decode: ([UInt8]) throws -> T, _ encode: (T) throws -> [UInt8]
) {
    guard let value = try? decode(payload) else { return }
    do {
        let bytes = try encode(value)
        // Bit patterns, where values are not equal to themselves.
        let second = try decode(bytes)
        let isSame = try second == value || encode(second) == bytes
        precondition(isSame, "\(T.self) changes on its way")
    } catch { preconditionFailure("\(T.self) decodes, but not again: \(error)") }
}
