// SPDX-License-Identifier: Apache-2.0
/// Which save a checkpoint's file holds, in an extended attribute. A daemon remembers what it has written; one that is
/// started after it reads it there, so that a save which comes late does not take the place of a newer one.
import Posix
import Wire

struct SaveMark: Sendable {
    private static let attribute = "user.noether_writer.save"

    let session: String
    let sequence: UInt64
    /// In seconds since 1970. It counts only for what a daemon before this one has accepted: whoever saves now is newer
    /// than any other session, whatever the clock says.
    let acceptedAt: Double
    let isRestored: Bool

    init(_ job: SaveJob) {
        session = job.session
        sequence = job.snapshot.sequence
        acceptedAt = job.acceptedAt
        isRestored = job.isRestored
    }

    init(session: String, sequence: UInt64) {
        self.session = session
        self.sequence = sequence
        acceptedAt = Clock.wallSeconds
        isRestored = false
    }

    private var milliseconds: Int64 { Int64(clamping: Int(max(0, min(acceptedAt * 1000, 1e15)))) }

    var attributes: [String: String] { [Self.attribute: "1 \(session) \(sequence) \(milliseconds)"] }

    /// Whether the name has a newer save, which is durable then.
    func isSuperseded(_ fileName: String, in directory: Directory) throws(PosixError) -> Bool {
        let parts = try directory.attribute(Self.attribute, of: fileName)?.split(separator: " ") ?? []
        guard parts.count == 4, parts[0] == "1", let otherSequence = UInt64(parts[2]),
            let otherMilliseconds = Int64(parts[3]),
            session.isSame(as: String(parts[1]))
                ? otherSequence > sequence : isRestored && otherMilliseconds > milliseconds
        else { return false }
        // Whoever gave it its name may have died before the name was durable.
        try directory.sync()
        return true
    }
}
