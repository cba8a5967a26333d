// SPDX-License-Identifier: Apache-2.0
/// `noether-writer verify`: whether files are whole. It needs no daemon.
import ArgumentParser
import FoundationEssentials
import Posix
import RunFiles
import TorchFile

struct Verify: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Checks files: their structure, and the CRC of each record; and sharded checkpoints.",
        discussion:
            "torch.load never checks CRCs. Exit status: 0 all files are whole, 1 a file is broken or cannot be read.\n\n"
            + examples(
                "noether-writer verify /data/runs/abcde", "noether-writer verify net_cp=latest_model.th"))
    @Argument(
        help:
            "Files that torch.save or noether-writerd wrote, directories of noether_writer.dcp; of a run's directory, all.",
        completion: .file())
    var paths: [String]
    @OptionGroup var output: JSONOption

    private struct Result: Encodable {
        var path: String
        var isWhole: Bool
        var records: Int?
        /// How many files a sharded checkpoint has; nil for a single file.
        var files: Int?
        var problem: String?
    }

    func run() throws {
        var results: [Result] = []
        for path in try paths.flatMap(Self.files) {
            var result = Result(path: path, isWhole: false)
            do {
                if FileFacts(path)?.isDirectory == true {
                    result.files = try ShardedCheckpoint(path).verify()
                } else {
                    let file = try MappedFile(path)
                    result.records = try ArchiveVerifier(file.bytes).verify().count
                    withExtendedLifetime(file) {}
                }
                result.isWhole = true
            } catch { result.problem = "\(error)" }
            results.append(result)
            guard !output.json else { continue }
            let words = result.problem.map { Text.paint("BROKEN", .red) + ": " + Text.printable($0) }
            let count = result.files.map { "\($0) files" } ?? "\(result.records ?? 0) records"
            print("\(Text.printable(path)): \(words ?? Text.paint("ok", .green) + ", " + count)")
        }
        _ = try output.print(results)
        if results.contains(where: { !$0.isWhole }) { throw ExitCode.failure }
    }

    /// The file or the sharded checkpoint, or those of a run.
    private static func files(_ path: String) throws -> [String] {
        guard FileFacts(path)?.isDirectory == true, !ShardedCheckpoint.has(path) else { return [path] }
        let run = try RunFiles(path)
        let checkpoints = "\(run.directory)/checkpoints"
        let sharded = FileFacts(checkpoints) == nil ? [] : try Directory.open(checkpoints).names()
        return (run.hasEntries ? [run.entriesPath] : [])
            + (try run.checkpoints().map { "\(checkpoints)/\($0.file)" })
            + sharded.filter { !$0.hasPrefix(".") }.map { "\(checkpoints)/\($0)" }
            .filter(ShardedCheckpoint.has).sorted()
    }
}

/// A directory of `noether_writer.dcp`, with its manifest.
private struct ShardedCheckpoint {
    private struct Manifest: Decodable {
        struct File: Decodable {
            var length: Int
            var crc32: UInt32
        }
        var files: [String: File]
    }

    private static let manifestName = ".noether_writer_manifest.json"
    private let path: String

    init(_ path: String) { self.path = path }

    static func has(_ path: String) -> Bool { FileFacts("\(path)/\(manifestName)")?.isRegular == true }

    /// - Returns: how many files it has, all of which are what was saved.
    func verify() throws -> Int {
        let text = try MappedFile("\(path)/\(Self.manifestName)")
        let manifest: Manifest
        do { manifest = try JSONDecoder().decode(Manifest.self, from: Data(text.bytes)) } catch {
            throw Problem(description: "\(Self.manifestName) cannot be read")
        }
        for (name, expected) in manifest.files.sorted(by: { $0.key < $1.key }) {
            let file = try MappedFile("\(path)/\(name)")
            var sum = CRC32()
            sum.update(file.bytes)
            guard file.bytes.count == expected.length, sum.value == expected.crc32 else {
                throw Problem(description: "\(name) is not what was saved")
            }
            withExtendedLifetime(file) {}
        }
        return manifest.files.count
    }

    private struct Problem: Error, CustomStringConvertible { let description: String }
}
