/// `tracker/entries.th`: the log as `torch.save({key: {update: value}})` would write it. Runs on a disk queue, on a
/// snapshot of the columns.
import Posix
import TorchFile

enum EntriesFile {
    static let name = "entries.th"

    static func write(_ log: LogColumns, in directory: Directory) throws(PosixError) {
        var pickle = EntriesPickle(log)
        let layout: ArchiveLayout
        do {
            layout = try ArchiveLayout(
                archiveName: "entries", pickleLength: UInt64(pickle.byteCount), storageLengths: [])
        } catch { preconditionFailure("a pickle in memory has a layout: \(error)") }
        // Asked for in order.
        var stream = ArchiveStream(layout: layout) { _, _, buffer in pickle.read(into: buffer) }
        try DurableFile.write(
            name, in: directory, length: layout.imageLength, produce: { stream.read(into: $0) })
    }
}
