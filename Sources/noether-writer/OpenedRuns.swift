// SPDX-License-Identifier: Apache-2.0
/// Runs that daemons of this user have opened, also those that no daemon knows any more: from the index that each keeps
/// in its state directory. No daemon is asked, so all the places where one may keep it are looked at.
import Posix
import RunFiles
import Wire
import Writer
import YAML

struct OpenedRuns {
    /// The last opened first.
    private let entries: [RunIndex.Entry]

    /// - Parameter user: another one, for root.
    init(of user: String?) {
        var seen: Set<ByteName> = []
        entries = Self.stateDirectories(of: user).filter { seen.insert(ByteName($0)).inserted }
            .flatMap { RunIndex(in: $0).all() }
    }

    /// Ids of those that are still there, each once.
    var ids: [String] {
        Set(entries.filter { RunFiles.isRun($0.runDirectory) }.map { ByteName($0.runId) }).sorted().map(\.text)
    }

    /// - Returns: the directory of the run of this id that was opened last and is still there; and another one, where
    ///   it was, if none is.
    func find(_ id: String) -> (directory: String?, gone: String?) {
        let found = entries.filter { $0.runId.isSame(as: id) }.map(\.runDirectory)
        if let there = found.first(where: RunFiles.isRun) { return (there, nil) }
        return (nil, found.first)
    }

    private static func stateDirectories(of user: String?) -> [String] {
        if let user {
            let home = Users.home(of: user).map { home in
                StateDirectory.standard({ $0 == "HOME" ? home : nil }, socket: "")
            }
            return [home, StateDirectory.ofTemplate(user)].compactMap { $0 }
        }
        let environment = ThisProcess.environment
        let settings = [
            environment("NOETHER_WRITER_CONFIG"),
            (environment("XDG_CONFIG_HOME") ?? environment("HOME").map { "\($0)/.config" })
                .map { "\($0)/noether-writer/noether-writer.yaml" },
            "/etc/noether-writer/noether-writer.yaml",
        ]
        return [environment("NOETHER_WRITER_SETTING_STATE_DIRECTORY")].compactMap { $0 }.filter { !$0.isEmpty }
            + settings.compactMap { $0.flatMap(stateDirectory) }
            + [
                StateDirectory.standard(environment, socket: SocketPath.standard(environment)),
                StateDirectory.ofTemplate(ThisProcess.userName),
            ]
    }

    /// The state directory that a settings file names; nil if there is none or the file cannot be read.
    private static func stateDirectory(inSettings path: String) -> String? {
        guard FileFacts(path)?.isRegular == true, let text = try? TextFile.read(path),
            let document = try? YAMLDocument(text), let root = document.root,
            case .mapping(let pairs) = document[root].content
        else { return nil }
        return pairs.first { document[$0.key].text == "state_directory" }.flatMap { document[$0.value].text }
    }
}
