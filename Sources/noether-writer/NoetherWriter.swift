// SPDX-License-Identifier: Apache-2.0
/// The command line tool's root: its subcommands, and what its exit status says. Each subcommand has a file of its own.
import ArgumentParser
import NoetherWriterClient
import Posix
import RunFiles
import Wire

@main
struct NoetherWriter: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "noether-writer",
        abstract: "Shows and checks the runs, checkpoints and logs that noether-writerd writes.",
        discussion: """
            RUN is a run's id, or its directory. The ids of the last few thousand runs that daemons of yours have opened are known. \
            An ended run is read from its files and needs no daemon.

            Exit status: 0 done; 1 something failed, or a file is broken; 2 not done within the time; 3 no daemon answers; \
            4 there is no such run or key; 64 wrong options.
            """,
        version: Release.version,
        subcommands: [
            Status.self, Runs.self, Show.self, Compare.self, Top.self, Tail.self, Plot.self, Export.self,
            Report.self, Checkpoints.self, Latest.self, Best.self, Verify.self, Prune.self, Remove.self, Wait.self,
            Drain.self, Stop.self, Restart.self, MetricsCommand.self, Completions.self,
        ])

    static func main() {
        ThisProcess.ignoreSIGPIPE()
        do {
            var command = try parseAsRoot()
            try command.run()
            try Terminal.flush()
        } catch let error as NoetherWriterError {
            fail(error.description, error.isNoDaemon ? .noDaemon : error.isTimeout ? .timeout : .failure)
        } catch let error as RunFilesError {
            fail(error.description, .failure)
        } catch let error as NotFound {
            fail(error.description, .notFound)
        } catch let error as KeptByService {
            fail(error.description, .failure)
        } catch let error as Refused {
            fail(error.description, .failure)
        } catch let error as PosixError {
            fail(error)
        } catch {
            do { try Terminal.flush() } catch { fail(error) }
            exit(withError: error)
        }
    }

    /// Output that is shown as it comes.
    static func flush() { do { try Terminal.flush() } catch { fail(error) } }

    /// `| head` has all that it wants.
    private static func fail(_ error: PosixError) -> Never {
        if error.isNoReader { ThisProcess.exitAtOnce(0) }
        fail(error.description, .failure)
    }

    private static func fail(_ words: String, _ code: ExitCode) -> Never {
        ThisProcess.writeToStandardError("noether-writer: \(Text.printable(words))")
        ThisProcess.exit(code.rawValue)
    }
}

extension ExitCode {
    static let timeout = ExitCode(2)
    static let noDaemon = ExitCode(3)
    static let notFound = ExitCode(4)
}

/// No such run, or no such key in it.
struct NotFound: Error, CustomStringConvertible {
    let description: String
}

extension NoetherWriterError {
    var isNoDaemon: Bool {
        switch self {
        case .notListening, .wrongSocket: true
        default: false
        }
    }

    var isTimeout: Bool {
        if case .timeout = self { true } else { false }
    }
}
