// SPDX-License-Identifier: Apache-2.0
/// The paths of files that are saved without a run: resolved by this process, as torch.save would open them. As
/// noether_writer/_files.py.
internal import Posix

/// A file that a save writes.
struct SavedPath: Sendable {
    /// Absolute, without links in its directory.
    let path: String
    /// What the names of its records begin with.
    let archive: String
    /// On which its directory is.
    let device: UInt64

    private static let nameByteCount = 255
    private static let pathByteCount = 4096
    private static let linksFollowed = 40

    /// - Throws: `NoetherWriterError.storage`, `.refusedName`: a save of this path is bound to fail, as torch.save's
    ///   would be.
    init(_ text: String) throws(NoetherWriterError) {
        let place = try Self.followed(Self.located(text))
        let directory = Self.split(place).directory
        let found: PathFacts
        do throws(PosixError) { found = try PathFacts(directory, follows: true) } catch {
            throw Self.refused(error, "\(directory): \(error.reason)", directory)
        }
        guard found.isDirectory else {
            throw Self.refused(.isNoDirectory(directory), "\(directory) is not a directory", directory)
        }
        try Self.checkWritable(directory, place)
        path = place
        device = found.device
        archive = try Self.archive(of: text)
    }

    /// The absolute path of a file or directory whose directory is there: without links in its directory; its own name
    /// is as it is given.
    static func located(_ text: String) throws(NoetherWriterError) -> String {
        guard !text.utf8.contains(0) else {
            throw .refusedName("the path \(text.debugDescription) holds a NUL; nothing was changed")
        }
        let (directory, name) = split(text)
        guard !["", ".", ".."].contains(name) else {
            throw refused(.isDirectory(text), "\(text.debugDescription) names a directory", text)
        }
        let shown = directory.isEmpty ? "." : directory
        do throws(PosixError) {
            let real = try PathFacts.real(shown)
            return try checked(real == "/" ? "/\(name)" : "\(real)/\(name)")
        } catch {
            if error.errno == PosixError.nameTooLong(text).errno {
                throw refused(error, "\(text): \(error.reason)", text)
            }
            // torch.save's words.
            let words =
                error.isMissing ? "Parent directory \(shown) does not exist" : "\(directory): \(error.reason)"
            throw refused(error, words, directory)
        }
    }

    /// The path of a directory may be given with slashes after it.
    static func directory(_ text: String) throws(NoetherWriterError) -> String {
        let slash = UInt8(ascii: "/")
        let bytes = Array(text.utf8)
        let end = bytes.lastIndex { $0 != slash }.map { $0 + 1 } ?? bytes.count
        return try located(String(decoding: bytes[..<end], as: UTF8.self))
    }

    /// The path of the file to which a link leads, as torch.save writes there; else the path itself.
    static func followed(_ path: String) throws(NoetherWriterError) -> String {
        var path = path
        for _ in 0..<linksFollowed {
            guard let target = PathFacts.link(path) else { return path }
            path = try located(target.hasPrefix("/") ? target : "\(split(path).directory)/\(target)")
        }
        let error = PosixError.loop(path)
        throw refused(error, "\(path): \(error.reason)", path)
    }

    private static func checked(_ path: String) throws(PosixError) -> String {
        guard path.utf8.count < pathByteCount, split(path).name.utf8.count <= nameByteCount else {
            throw .nameTooLong(path)
        }
        return path
    }

    /// Splits the path at its last slash.
    private static func split(_ path: String) -> (directory: String, name: String) {
        let bytes = Array(path.utf8)
        guard let slash = bytes.lastIndex(of: UInt8(ascii: "/")) else { return ("", path) }
        let directory = slash == 0 ? bytes[...0] : bytes[..<slash]
        return (String(decoding: directory, as: UTF8.self), String(decoding: bytes[(slash + 1)...], as: UTF8.self))
    }

    private static func checkWritable(_ directory: String, _ path: String) throws(NoetherWriterError) {
        var found: PathFacts?
        do throws(PosixError) { found = try PathFacts(path, follows: false) } catch {
            if !error.isMissing { throw refused(error, "\(path): \(error.reason)", path) }
        }
        if let found {
            if found.isDirectory { throw refused(.isDirectory(path), "\(path) is a directory", path) }
            guard found.isRegular else {
                throw refused(
                    .alreadyExists(path),
                    "\(path) is not a regular file: a save replaces the whole file, which would remove it. Use "
                        + "torch.save",
                    path)
            }
            do throws(PosixError) { try PathFacts.checkWritable(path, isDirectory: false) } catch {
                throw refused(error, "\(path): \(error.reason)", path)
            }
        }
        do throws(PosixError) { try PathFacts.checkWritable(directory, isDirectory: true) } catch {
            throw refused(
                error,
                "\(directory): \(error.reason). A save writes a new file there, which then takes the name", directory)
        }
    }

    /// What torch.save(obj, text) lets the names of its records begin with.
    private static func archive(of text: String) throws(NoetherWriterError) -> String {
        guard text.utf8.allSatisfy({ $0 < 0x80 }) else { return "archive" }
        let bytes = Array(text.utf8)
        let start = bytes.lastIndex { $0 == UInt8(ascii: "/") || $0 == UInt8(ascii: "\\") }.map { $0 + 1 } ?? 0
        let name = bytes[start...]
        let stem = name.lastIndex(of: UInt8(ascii: ".")).map { name[..<$0] } ?? name
        guard !stem.isEmpty else {
            throw .refusedName(
                "invalid file name: \(text): a name needs something before its last dot; nothing was changed")
        }
        return String(decoding: stem, as: UTF8.self)
    }

    static func refused(_ error: PosixError, _ words: String, _ path: String) -> NoetherWriterError {
        .storage(path: path, message: "\(words). Nothing was changed", errno: error.errno)
    }

    static func isWithin(_ path: String, _ directory: String) -> Bool {
        let (path, directory) = (Array(path.utf8), Array(directory.utf8))
        let slash = UInt8(ascii: "/")
        return path == directory || path.starts(with: directory.last == slash ? directory : directory + [slash])
    }
}
