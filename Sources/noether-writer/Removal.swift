// SPDX-License-Identifier: Apache-2.0
/// Runs and checkpoints that go: what is live stays, links are not followed, a person is asked. For `rm` and `prune`.
import ArgumentParser
import NoetherWriterClient
import Posix
import RunFiles
import Wire

/// Why nothing was removed.
struct Refused: Error, CustomStringConvertible { let description: String }

/// A run's directory, locked as a daemon locks it, so that no trainer opens the run as long as this is kept.
final class LockedRun {
    let directory: Directory
    /// Its parent, and its name there.
    let parent: Directory
    let name: String

    /// - Throws: `Refused` if it is live, or if its name is a link.
    init(_ path: String) throws {
        guard let name = FileSystem.parts(of: path).last else { throw Refused(description: "/ is no run") }
        self.name = name
        parent = try Directory.open(FileSystem.absolute(path.dropping(first: 0, last: name.utf8.count)))
        guard parent.isDirectory(name) else {
            throw Refused(
                description: "\(path) is a symbolic link or no directory: nothing was removed. Name what it leads to")
        }
        directory = try parent.child(name, create: false)
        // guard: live-run-stays (always: directory.lock())
        guard directory.lock(), !directory.isLocked(below: "tracker/entries.journal") else {
            throw Refused(
                description: "\(path) is a live run: a daemon holds it, here or on another node. Nothing of it was "
                    + "removed")
        }
    }

    deinit { directory.unlock() }

    /// - Throws: `Refused` if there is none, or if the name is a link.
    func checkpoints() throws -> Directory {
        do { return try directory.child("checkpoints", create: false) } catch {
            throw Refused(description: error.description)
        }
    }
}

struct Confirmation: ParsableArguments {
    @Flag(help: "Do not ask.") var yes = false

    /// - Throws: `Refused` if the person does not want it, or cannot be asked.
    func ask(_ question: String) throws {
        if yes { return }
        guard Terminal.hasKeyboard else {
            throw Refused(
                description: "nothing was removed: nobody can be asked, since standard input is no terminal. --yes "
                    + "removes without asking")
        }
        NoetherWriter.flush()
        ThisProcess.prompt(Text.printable(question) + " [y/N] ")
        // guard: removal-confirmed (always)
        guard ["y", "yes"].contains((readLine() ?? "").lowercased()) else {
            throw Refused(description: "nothing was removed")
        }
    }
}
