// SPDX-License-Identifier: Apache-2.0
/// Which save a checkpoint's file holds, in an extended attribute. A daemon remembers what it has written; one that is
/// started after it reads it there, so that a save which comes late does not take the place of a newer one.
import Posix
import Wire

struct SaveMark: Sendable {
    private static let attribute = "user.noether_writer.save"

    let session: String
    let sequence: UInt64

    var attributes: [String: String] { [Self.attribute: "1 \(session) \(sequence)"] }

    /// Whether the name has a newer save of the same session, which is durable then.
    func isSuperseded(_ fileName: String, in directory: Directory) throws(PosixError) -> Bool {
        let parts = try directory.attribute(Self.attribute, of: fileName)?.split(separator: " ") ?? []
        guard parts.count == 3, parts[0] == "1", session.isSame(as: String(parts[1])),
            let other = UInt64(parts[2]), other > sequence
        else { return false }
        // Whoever gave it its name may have died before the name was durable.
        try directory.sync()
        return true
    }
}
