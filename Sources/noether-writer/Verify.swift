// SPDX-License-Identifier: Apache-2.0
/// `noether-writer verify`: whether files are whole. It needs no daemon.
import ArgumentParser
import Posix
import RunFiles
import TorchFile

struct Verify: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Checks files: their structure, and the CRC of each record.",
        discussion:
            "torch.load never checks CRCs. Exit status: 0 all files are whole, 1 a file is broken or cannot be read.\n\n"
            + examples(
                "noether-writer verify /data/runs/abcde", "noether-writer verify net_cp=latest_model.th"))
    @Argument(
        help: "Files that torch.save or noether-writerd wrote; for a run's directory, all its files.",
        completion: .file())
    var paths: [String]
    @OptionGroup var output: JSONOption

    private struct Result: Encodable {
        var path: String
        var isWhole: Bool
        var records: Int?
        var problem: String?
    }

    func run() throws {
        var results: [Result] = []
        for path in try paths.flatMap(Self.files) {
            var result = Result(path: path, isWhole: false)
            do {
                let file = try MappedFile(path)
                result.records = try ArchiveVerifier(file.bytes).verify().count
                result.isWhole = true
                withExtendedLifetime(file) {}
            } catch { result.problem = "\(error)" }
            results.append(result)
            guard !output.json else { continue }
            let words = result.problem.map { Text.paint("BROKEN", .red) + ": " + Text.printable($0) }
            print(
                "\(Text.printable(path)): \(words ?? Text.paint("ok", .green) + ", \(result.records ?? 0) records")"
            )
        }
        _ = try output.print(results)
        if results.contains(where: { !$0.isWhole }) { throw ExitCode.failure }
    }

    /// The file, or those of a run.
    private static func files(_ path: String) throws -> [String] {
        guard FileFacts(path)?.isDirectory == true else { return [path] }
        let run = try RunFiles(path)
        return (run.hasEntries ? [run.entriesPath] : [])
            + (try run.checkpoints().map { "\(run.directory)/checkpoints/\($0.file)" })
    }
}
