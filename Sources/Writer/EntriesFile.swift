// SPDX-License-Identifier: Apache-2.0
/// `tracker/entries.th`: the log as `torch.save({key: {update: value}})` would write it. Runs on a disk queue, on a
/// snapshot of the columns.
///
/// A log that another one would take the place of is kept beside it, as entries.1.th, entries.2.th and so on: a run that is begun anew,
/// in a crash loop say, destroys nothing. The file says whose log it is in an extended attribute, so that a session which comes
/// back to a daemon that has not seen it goes on with it.
import Posix
import RunFiles
import TorchFile
import Wire

/// Whose log a file holds, and up to which of its numbers.
struct LogOwner: Sendable, Equatable {
    var session: String
    var sequence: UInt64
    /// Sessions that brought the log before, and have lost it to this one.
    var before: [String] = []
}

/// A log that a file holds, for who goes on with it.
struct FoundEntries: Sendable {
    var columns: LogColumns
    /// nil where the file does not say it.
    var owner: LogOwner?
}

enum EntriesFile {
    static let name = "entries.th"
    private static let attribute = "user.noether_writer.log"
    private static let beforeAttribute = "user.noether_writer.log_before"
    /// Of a file that is read into memory: more than any log of ours has.
    private static let readByteCount: UInt64 = 4 << 30

    static func write(_ log: LogColumns, of owner: LogOwner?, in directory: Directory) throws(PosixError) {
        var pickle = EntriesPickle(log)
        let layout: ArchiveLayout
        do {
            layout = try ArchiveLayout(
                archiveName: ArchiveLayout.archiveName(path: "\(directory.path)/\(name)"),
                pickleLength: UInt64(pickle.byteCount), storageLengths: [])
        } catch { preconditionFailure("a pickle in memory has a layout: \(error)") }
        // Asked for in order.
        var stream = ArchiveStream(layout: layout) { _, _, buffer in pickle.read(into: buffer) }
        var notes: [String: String] = [:]
        if let owner { notes[attribute] = "1 \(owner.session) \(owner.sequence) \(log.count)" }
        if let owner, !owner.before.isEmpty { notes[beforeAttribute] = owner.before.joined(separator: " ") }
        try DurableFile.write(
            name, in: directory, length: layout.imageLength, attributes: notes,
            produce: { stream.read(into: $0) },
            replacing: { () throws(PosixError) in
                guard !isHeld(by: log, of: owner, in: directory) else { return }
                try directory.keepBeside(name) { "entries.\($0).th" }  // guard: older-log-is-kept (skip)
                try Faults.reach("file.kept")
            })
    }

    /// Whether what is there is all in this log: then nothing is lost with it.
    private static func isHeld(by log: LogColumns, of owner: LogOwner?, in directory: Directory) -> Bool {
        guard let file = try? ReadFile(name, in: directory) else { return false }
        if let owner, let note = note(of: file), note.owner.session == owner.session,
            note.owner.sequence <= owner.sequence, note.rowCount <= log.count
        {
            return true
        }
        guard let old = try? columns(of: file) else { return false }
        return log.holds(old)
    }

    /// Finds the log in the file if it is the session's: its own, the one that it resumes, or its own that another session
    /// has taken over.
    static func find(for message: OpenRun, in directory: Directory) throws(PosixError) -> FoundEntries? {
        let file: ReadFile
        do throws(PosixError) { file = try ReadFile(name, in: directory) } catch {
            // What is no file is left as it is.
            if error.isMissing || !error.isRetryable { return nil }
            throw error
        }
        let owner = note(of: file)?.owner
        // guard: session-comes-back-after-finish (never: owner?.session == message.session)
        // guard: taken-over-in-the-file (never: owner?.before.contains(message.session) == true)
        let isKnown = owner?.session == message.session || owner?.before.contains(message.session) == true
        guard isKnown || message.resumeAt != nil else { return nil }
        guard let columns = try columns(of: file) else { return nil }
        // A daemon that died may have given it its name and no more, and this one says that the log is durable.
        try directory.sync()
        return FoundEntries(columns: columns, owner: owner)
    }

    private static func note(of file: ReadFile) -> (owner: LogOwner, rowCount: Int)? {
        let parts = file.attribute(attribute)?.split(separator: " ") ?? []
        guard parts.count == 4, parts[0] == "1", let sequence = UInt64(parts[2]), let count = Int(parts[3])
        else { return nil }
        let before = file.attribute(beforeAttribute)?.split(separator: " ").map { String($0) } ?? []
        return (LogOwner(session: String(parts[1]), sequence: sequence, before: before), count)
    }

    /// nil where it is no log that this daemon could have written: of a trainer that puts other things into its log, say.
    private static func columns(of file: ReadFile) throws(PosixError) -> LogColumns? {
        guard file.byteCount <= readByteCount else { return nil }
        let bytes = UnsafeMutableRawBufferPointer.allocate(byteCount: Int(file.byteCount), alignment: 16)
        defer { bytes.deallocate() }
        try file.read(at: 0, into: bytes)
        guard let pickle = try? ArchiveVerifier(UnsafeRawBufferPointer(bytes)).pickle() else { return nil }
        return EntriesColumns.read(
            UnsafeRawBufferPointer(rebasing: bytes[Int(pickle.lowerBound)..<Int(pickle.upperBound)]))
    }
}
