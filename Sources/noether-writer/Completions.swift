// SPDX-License-Identifier: Apache-2.0
/// `noether-writer completions`: what a shell needs to complete the words of this tool.
import ArgumentParser

struct Completions: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Prints a script that completes this tool's words in a shell.",
        discussion: """
            bash: source <(noether-writer completions bash). zsh: put the output into a file _noether-writer on your \
            fpath. fish: put it into ~/.config/fish/completions/noether-writer.fish.
            """)

    enum Shell: String, CaseIterable, ExpressibleByArgument {
        case bash, zsh, fish
    }

    @Argument(help: "bash, zsh or fish.")
    var shell: Shell

    func run() throws {
        let kind: CompletionShell =
            switch shell {
            case .bash: .bash
            case .zsh: .zsh
            case .fish: .fish
            }
        print(NoetherWriter.completionScript(for: kind))
    }
}
