// SPDX-License-Identifier: Apache-2.0
/// Names that become parts of a path, looked at before anything is sent: the daemon refuses the same ones.
internal import TorchFile
internal import Wire

enum Names {
    /// - Throws: `NoetherWriterError.refused`, with words for what is wrong with it.
    static func check(_ name: String, _ what: String) throws(NoetherWriterError) {
        guard let problem = PathComponent.problem(with: name) else { return }
        let shown = name.count > 64 ? "\(name.prefix(64))..." : name
        throw refused(
            "\(what) \(shown.debugDescription) \(problem); it becomes one part of a path. Nothing was written; choose "
                + "another")
    }

    /// - Throws: `NoetherWriterError.refused`: a file of them can't be. Nothing has been looked at or copied then.
    static func check(_ targets: [SavePayload.Target]) throws(NoetherWriterError) {
        for target in targets {
            try check(target.name, "the model name")
            try check(target.tag, "the tag")
            if let info = target.info, !info.isEmpty { try check(info, "info") }
            try check(target.fileName, "the file name")
        }
        guard (1...Limits.targets).contains(targets.count) else {
            throw refused("one save writes 1 to \(Limits.targets) files, not \(targets.count)")
        }
        var files: Set<ByteName> = []
        for target in targets where !files.insert(ByteName(target.fileName)).inserted {
            throw refused("two files of one save have the name \(target.fileName)")
        }
    }

    /// - Throws: `NoetherWriterError.unsupportedValue`: the file would be larger than any may be.
    static func checkSize(
        _ target: SavePayload.Target, below directory: String, _ layout: SavedCopy.Layout
    ) throws(NoetherWriterError) {
        let name = ArchiveLayout.archiveName(path: "\(directory)/\(target.fileName)")
        let found = try? ArchiveLayout(
            archiveName: name, pickleLength: layout.pickleLength, storageLengths: layout.lengths)
        guard let found, found.imageLength <= Limits.imageBytes else { throw tooLarge(target.fileName) }
    }

    static func tooLarge(_ file: String) -> NoetherWriterError {
        .unsupportedValue(
            "\(file) would have more than \(Limits.imageBytes) bytes: save it in parts. Nothing was saved")
    }

    static func refused(_ message: String) -> NoetherWriterError {
        .refusedName(message)
    }
}
