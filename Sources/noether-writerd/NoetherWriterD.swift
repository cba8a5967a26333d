/// The daemon's command line. Everything it does is in Daemon.
import ArgumentParser
import Daemon
import Dispatch
import Posix
import Writer

@main
struct NoetherWriterD: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "noether-writerd",
        abstract: "Writes the checkpoints and logs of PyTorch trainers on this node.",
        version: Daemon.version)

    @Option(help: ArgumentHelp("Settings in YAML; see config/noether-writer.yaml.", valueName: "file"))
    var config: String?

    @Option(help: ArgumentHelp("Where to listen, unless a socket is handed over.", valueName: "path"))
    var socket: String?

    @Option(help: ArgumentHelp("Leave after so long without connections and work.", valueName: "seconds"))
    var exitIdle: Double?

    mutating func run() throws {
        Process.ignoreSIGPIPE()
        var settings: Settings
        do throws(SettingsError) {
            settings = try Settings(
                yaml: try config.map { path throws(SettingsError) in (try Self.read(path), path) })
        } catch { throw ValidationError(error.description) }
        if let socket {
            guard socket.hasPrefix("/") else {
                throw ValidationError("--socket takes an absolute path, not \(socket)")
            }
            settings.socket = socket
        }
        if let exitIdle { settings.exitIdleSeconds = exitIdle }
        do throws(ListenRefusal) {
            let daemon = try Daemon(settings: settings)
            Intake.enter { daemon.start() }
        } catch {
            switch error {
            case .alreadyServed(let path, let pid):
                Process.writeToStandardError(
                    "noether-writerd: \(path) is served by a live daemon, process \(pid)")
                throw ExitCode(75)
            case .system(let error):
                Process.writeToStandardError("noether-writerd: \(error)")
                throw ExitCode(1)
            }
        }
        dispatchMain()
    }

    private static func read(_ path: String) throws(SettingsError) -> String {
        do throws(PosixError) { return try TextFile.read(path) } catch {
            throw SettingsError(description: "\(error)")
        }
    }
}
