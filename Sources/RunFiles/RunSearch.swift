// SPDX-License-Identifier: Apache-2.0
/// The runs below a directory, as its files show them.
public import Posix
import Wire

extension RunFiles {
    /// Directories in directories that are looked into: more than any layout of runs has.
    private static let searchDepth = 16

    /// Runs at and below a directory, sorted by their paths. Links are not followed, except the directory itself, and
    /// hidden directories are left out.
    /// - Parameter unreadable: gets each directory that could not be read; the others are found all the same.
    /// - Throws: if the directory itself cannot be read.
    public static func find(
        below path: String, unreadable: (PosixError) -> Void
    ) throws(PosixError) -> [String] {
        var found: [ByteName] = []
        try find(in: try Directory.open(FileSystem.absolute(path)), depth: searchDepth, &found, unreadable)
        return found.sorted().map(\.text)
    }

    private static func find(
        in directory: Directory, depth: Int, _ found: inout [ByteName], _ unreadable: (PosixError) -> Void
    ) throws(PosixError) {
        var names = try directory.names()
        let parts = ["tracker", "checkpoints"]
        if names.contains(where: { parts.contains($0) }), isRun(directory.path) {
            found.append(ByteName(directory.path))
            // A run may have stages below it, but none there.
            names.removeAll { parts.contains($0) }
        }
        guard depth > 1 else { return }
        for name in names where !name.begins(with: ".") && directory.isDirectory(name) {
            do throws(PosixError) {
                let child = try directory.child(name, create: false)
                try find(in: child, depth: depth - 1, &found, unreadable)
            } catch {
                // Somebody may remove one meanwhile.
                if !error.isMissing { unreadable(error) }
            }
        }
    }
}
