// SPDX-License-Identifier: Apache-2.0
/// A log as its journal has it, for who only reads: of a run whose daemon is dead.
public import Posix

public enum JournalReader {
    /// nil where the file holds no log. A daemon may be appending to it: what is whole counts.
    public static func log(at path: String) throws(PosixError) -> LogColumns? {
        let file = try MappedFile(path)
        defer { withExtendedLifetime(file) {} }
        return log(in: file.bytes)
    }

    package static func log(in journal: UnsafeRawBufferPointer) -> LogColumns? { JournalFormat.replay(journal)?.log }
}
