// SPDX-License-Identifier: Apache-2.0
/// Messages for an unknown name. They list the known names, and the similar ones first.
import Wire

enum Names {
    private static let shown = 400
    /// More letters than this are no slip of the finger.
    private static let longest = 128

    /// `close to it: loss, loss/val; it has ...`.
    /// - Parameters:
    ///   - owner: who has the known names: `it`.
    ///   - nothing: what to say if there is none.
    static func hint(
        for name: String, among known: [String], owner: String = "it", nothing: String = "it has no log"
    ) -> String {
        guard !known.isEmpty else { return nothing }
        let near = near(name, among: known)
        let all = Text.clipped("\(owner) has " + known.joined(separator: ", "), shown)
        return near.isEmpty ? all : "close to it: \(near.joined(separator: ", ")); \(all)"
    }

    /// At most five, the nearest first.
    static func near(_ name: String, among known: [String]) -> [String] {
        let wanted = Array(name.lowercased().utf8)
        guard !wanted.isEmpty, wanted.count <= longest else { return [] }
        let limit = max(1, wanted.count / 3)
        var found: [(distance: Int, name: String)] = []
        for each in known {
            let bytes = Array(each.lowercased().utf8)
            guard bytes.count <= longest else { continue }
            // A part of a path of keys, or what it lacks.
            if wanted.count > 2, bytes.count > 2, bytes.contains(wanted) || wanted.contains(bytes) {
                found.append((0, each))
            } else if abs(bytes.count - wanted.count) <= limit {
                let distance = distance(wanted, bytes)
                if distance <= limit { found.append((distance, each)) }
            }
        }
        return found.enumerated().sorted { ($0.element.distance, $0.offset) < ($1.element.distance, $1.offset) }
            .prefix(5).map(\.element.name)
    }

    /// Levenshtein's: letters to change, to add or to remove.
    private static func distance(_ first: [UInt8], _ second: [UInt8]) -> Int {
        var row = Array(0...second.count)
        for (index, one) in first.enumerated() {
            var diagonal = row[0]
            row[0] = index + 1
            for (place, other) in second.enumerated() {
                let changed = diagonal + (one == other ? 0 : 1)
                diagonal = row[place + 1]
                row[place + 1] = min(changed, row[place] + 1, diagonal + 1)
            }
        }
        return row[second.count]
    }
}
