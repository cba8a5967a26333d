// SPDX-License-Identifier: Apache-2.0
/// Names that become one part of a path: the daemon refuses them by this rule, and the Swift client before it sends.
public enum PathComponent {
    /// What is wrong with a name: not empty, no `/`, no NUL or other control character, not `.` or `..`, at most
    /// NAME_MAX.
    /// - Returns: nil if it can be one part of a path.
    public static func problem(with name: String) -> String? {
        if name.isEmpty {  // guard: name-empty (never)
            "is empty"
        } else if name.utf8.count > Limits.nameBytes {  // guard: name-length (never)
            "has \(name.utf8.count) bytes, and at most \(Limits.nameBytes) are possible"
        } else if name == "." || name == ".." {  // guard: name-dots (never)
            "is a directory reference"
        } else if name.utf8.contains(UInt8(ascii: "/")) {  // guard: name-slash (never)
            "holds a slash"
            // guard: name-control (never)
        } else if name.unicodeScalars.contains(where: { $0.properties.generalCategory == .control }) {
            "holds a control character"
        } else {
            nil
        }
    }
}
