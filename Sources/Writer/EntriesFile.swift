/// `tracker/entries.th`: the log as `torch.save({key: {update: value}})` would write it. Runs on a disk queue, on a
/// snapshot of the columns.
import Posix
import TorchFile
import Wire

enum EntriesFile {
    static let name = "entries.th"

    static func pickle(_ log: LogColumns) -> [UInt8] {
        var pickle = PickleWriter()
        pickle.proto()
        pickle.emptyDict()
        pickle.mark()
        for (id, key) in log.keys.enumerated() where log.valueCount(key: key) > 0 {
            pickle.string(key)
            pickle.emptyDict()
            pickle.mark()
            log.forEach(column: id) { update, value in
                pickle.int(update)
                switch value.tag {
                case .float: pickle.float(bitPattern: value.bits)
                case .int: pickle.int(Int64(bitPattern: value.bits))
                case .bool: pickle.bool(value.bits == 1)
                case .none: pickle.none()
                case .string: pickle.string(String(decoding: value.tail, as: UTF8.self))
                case .bigInt: pickle.bigInt(littleEndian: Array(value.tail))
                }
            }
            pickle.setItems()
        }
        pickle.setItems()
        pickle.stop()
        return pickle.bytes
    }

    static func write(_ log: LogColumns, in directory: Directory) throws(PosixError) {
        let pickle = pickle(log)
        let layout: ArchiveLayout
        do {
            layout = try ArchiveLayout(
                archiveName: "entries", pickleLength: UInt64(pickle.count), storageLengths: [])
        } catch { preconditionFailure("a pickle in memory has a layout: \(error)") }
        var stream = ArchiveStream(layout: layout) { _, position, buffer in
            pickle.withUnsafeBytes { buffer.copyBytes(from: $0[position..<position + buffer.count]) }
        }
        try DurableFile.write(name, in: directory, length: layout.imageLength) { stream.read(into: $0) }
    }
}
