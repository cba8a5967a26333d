// SPDX-License-Identifier: Apache-2.0
/// A path as a client names it: from the root that the client has opened. Paths are bytes: they are compared as such, and
/// a name may hold whatever the kernel takes.
import Posix
import Wire

struct AbsolutePath: Sendable, Hashable {
    /// Without slashes that are too many.
    let text: String

    static func == (first: AbsolutePath, second: AbsolutePath) -> Bool { first.text.isSame(as: second.text) }
    func hash(into hasher: inout Hasher) { hasher.combine(ByteName(text)) }

    init(_ path: String) throws(WireError) {
        guard path.begins(with: "/"), path.utf8.count < Limits.pathBytes, !path.utf8.contains(0) else {
            throw WireError(
                .badPath,
                "a path must be absolute, below \(Limits.pathBytes) bytes and without NUL, not \(Self.quoted(path)) "
                    + "(\(path.utf8.count) bytes)")
        }
        let parts = FileSystem.parts(of: path)
        for part in parts {
            guard !part.isSame(as: "."), !part.isSame(as: ".."), part.utf8.count <= Limits.nameBytes else {
                throw WireError(
                    .badPath,
                    "\(Self.quoted(path)) has a part that is . or .. or has more than \(Limits.nameBytes) bytes")
            }
        }
        text = "/" + parts.joined(separator: "/")
    }

    /// For messages.
    static func quoted(_ path: String) -> String { String(path.prefix(64)).debugDescription }

    /// The last part; nil for the root itself.
    var name: String? { FileSystem.parts(of: text).last }
    /// Of the last part.
    var directory: String { "/" + FileSystem.parts(of: text).dropLast().joined(separator: "/") }

    /// Whether it is the other one, or below it.
    func isWithin(_ other: AbsolutePath) -> Bool {
        guard text.begins(with: other.text) else { return false }
        let length = other.text.utf8.count
        if length == 1 || text.utf8.count == length { return true }
        return text.utf8.dropFirst(length).first == UInt8(ascii: "/")
    }

    /// Those of the directories above it, the nearest first, and the path itself before them.
    var way: [AbsolutePath] {
        var found: [AbsolutePath] = []
        var parts = FileSystem.parts(of: text)[...]
        while true {
            found.append(AbsolutePath(known: "/" + parts.joined(separator: "/")))
            if parts.popLast() == nil { return found }
        }
    }

    private init(known: String) { text = known }
}
