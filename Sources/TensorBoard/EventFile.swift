// SPDX-License-Identifier: Apache-2.0
/// Event files as TensorBoard reads them: the few protobuf messages that scalars and texts need. Pure.
/// Sources: tensorboard/compat/proto/event.proto, summary.proto, tensor.proto; torch/utils/tensorboard/summary.py
/// (text).

public enum EventFile {
    public enum Value: Sendable {
        /// As TensorBoard keeps scalars: 32 bits; NaN and infinities stay.
        case scalar(Float)
        /// Markdown, for the text page.
        case text(String)
    }

    /// What a file starts with.
    public static func appendHeader(wallTime: Double, to bytes: inout [UInt8]) {
        TFRecord.append(to: &bytes) { event in
            event.double(1, wallTime)
            event.string(3, "brain.Event:2")
        }
    }

    /// SessionLog START: what files before this one hold from `step` on is not shown any more.
    public static func appendStart(at step: Int64, wallTime: Double, to bytes: inout [UInt8]) {
        TFRecord.append(to: &bytes) { event in
            event.double(1, wallTime)
            event.int(2, step)
            event.message(7) { $0.int(1, 1) }
        }
    }

    /// All values of one step, in one event.
    public static func append(
        _ values: [(tag: String, value: Value)], step: Int64, wallTime: Double, to bytes: inout [UInt8]
    ) {
        // What lies in a message follows on its length: texts are made first, scalars are counted.
        var texts: [[UInt8]] = []
        var byteCount = 0
        for (tag, value) in values {
            var size = scalarByteCount(tag)
            if case .text(let text) = value {
                texts.append(textValue(tag, text))
                size = texts[texts.count - 1].count
            }
            byteCount += 1 + ProtobufWriter.varintByteCount(UInt64(size)) + size
        }
        TFRecord.append(to: &bytes, reserving: byteCount + 32) { event in
            event.double(1, wallTime)
            event.int(2, step)
            event.length(5, byteCount)
            var text = 0
            for (tag, value) in values {
                switch value {
                case .scalar(let number):
                    event.length(1, scalarByteCount(tag))
                    event.string(1, tag)
                    event.float(2, number)
                case .text:
                    event.length(1, texts[text].count)
                    event.bytes += texts[text]
                    text += 1
                }
            }
        }
    }

    public enum Hyperparameter: Sendable {
        case number(Double)
        case truth(Bool)
        case text(String)
    }

    /// What the page HPARAMS shows of a run: SessionStartInfo of its plug-in, which finds the metrics by itself.
    /// Source: tensorboard/plugins/hparams/plugin_data.proto, metadata.py; google/protobuf/struct.proto.
    public static func append(
        hyperparameters values: [(name: String, value: Hyperparameter)], step: Int64, wallTime: Double,
        to bytes: inout [UInt8]
    ) {
        var info = ProtobufWriter()
        for (name, value) in values {
            info.message(1) { entry in
                entry.string(1, name)
                entry.message(2) { written in
                    switch value {
                    case .number(let number): written.double(2, number)
                    case .text(let text): written.string(3, text)
                    case .truth(let truth): written.int(4, truth ? 1 : 0)
                    }
                }
            }
        }
        info.double(5, wallTime)
        var content = ProtobufWriter()
        content.length(3, info.bytes.count)
        content.bytes += info.bytes
        var shown = ProtobufWriter()
        shown.string(1, "_hparams_/session_start_info")
        // DT_FLOAT, none of them: only the metadata counts.
        shown.message(8) { tensor in
            tensor.int(1, 1)
            tensor.message(2) { shape in shape.message(2) { _ in } }
        }
        shown.message(9) { metadata in
            metadata.message(1) { plugin in
                plugin.string(1, "hparams")
                plugin.length(2, content.bytes.count)
                plugin.bytes += content.bytes
            }
        }
        TFRecord.append(to: &bytes, reserving: shown.bytes.count + 32) { event in
            event.double(1, wallTime)
            event.int(2, step)
            event.message(5) { summary in
                summary.length(1, shown.bytes.count)
                summary.bytes += shown.bytes
            }
        }
    }

    private static func scalarByteCount(_ tag: String) -> Int {
        let count = tag.utf8.count
        return 1 + ProtobufWriter.varintByteCount(UInt64(count)) + count + 5
    }

    private static func textValue(_ tag: String, _ text: String) -> [UInt8] {
        var value = ProtobufWriter()
        value.string(1, "\(tag)/text_summary")
        value.message(8) { tensor in
            // DT_STRING, one of them.
            tensor.int(1, 7)
            tensor.message(2) { shape in shape.message(2) { $0.int(1, 1) } }
            tensor.string(8, text)
        }
        value.message(9) { metadata in metadata.message(1) { $0.string(1, "text") } }
        return value.bytes
    }
}

/// How far files that were read one after the other show a log, and where each of them would be cut.
public struct EventScan {
    /// Of the file at hand: where the first event lies that shows something after `keeping`; nil if none does.
    public private(set) var cut: UInt64?
    private let keeping: Int64
    /// Of the file at hand, in bytes.
    private var offset: UInt64 = 0
    /// The last step that is shown; nil if none is.
    public private(set) var lastStep: Int64?
    /// A record is longer than any of ours, or broken: the rest of its file is not shown.
    public private(set) var isBroken = false
    private static let recordByteCount = 64 << 20

    public init(keeping: Int64 = .max) { self.keeping = keeping }

    /// Another file follows.
    public mutating func nextFile() {
        isBroken = false
        cut = nil
        offset = 0
    }

    /// - Returns: how many bytes at the beginning were whole records; the rest is to come again, with more after it.
    public mutating func read(_ bytes: UnsafeRawBufferPointer) -> Int {
        var used = 0
        while !isBroken {
            let rest = UnsafeRawBufferPointer(rebasing: bytes[used...])
            guard let (data, byteCount) = TFRecord.first(rest) else {
                if rest.count >= TFRecord.headerByteCount {
                    let length = TFRecord.length(rest)
                    isBroken = length.map { $0 > Self.recordByteCount || rest.count >= $0 + 16 } ?? true
                }
                break
            }
            read(event: data)
            used += byteCount
            offset += UInt64(byteCount)
        }
        return used
    }

    private mutating func read(event data: UnsafeRawBufferPointer) {
        var reader = ProtobufReader(data)
        var step: Int64 = 0
        while let (field, value) = reader.next() {
            switch (field, value) {
            case (2, .int(let number)): step = Int64(bitPattern: number)
            case (5, _):
                lastStep = step
                if step > keeping, cut == nil { cut = offset }
            case (7, .bytes(let session)):
                var status = ProtobufReader(session)
                guard case (1, .int(1))? = status.next() else { continue }
                lastStep = lastStep.flatMap { step == .min ? nil : min($0, step - 1) }
            default: break
            }
        }
    }
}
