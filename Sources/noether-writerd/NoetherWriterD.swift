// SPDX-License-Identifier: Apache-2.0
/// The daemon's command line. Everything it does is in Daemon.
import ArgumentParser
import Daemon
import Dispatch
import Posix
import Wire
import Writer

@main
struct NoetherWriterD: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "noether-writerd",
        abstract: "Writes the checkpoints and logs of PyTorch trainers on this node.",
        version: Release.version)

    @Option(help: ArgumentHelp("Settings in YAML; see config/noether-writer.yaml.", valueName: "file"))
    var config: String?

    @Option(help: ArgumentHelp("Where to listen, unless a socket is handed over.", valueName: "path"))
    var socket: String?

    @Option(help: ArgumentHelp("Leave after so long without connections and work.", valueName: "seconds"))
    var exitIdle: Double?

    mutating func run() throws {
        let handedOver = HandedOver()
        Process.ignoreSIGPIPE()
        Process.raiseDescriptorLimit()
        let (config, socket, exitIdle) = (config, socket, exitIdle)
        @Sendable func read() throws(SettingsError) -> Settings {
            try Self.settings(config: config, socket: socket, exitIdle: exitIdle)
        }
        Process.useOneHeap()
        let settings: Settings
        do throws(SettingsError) { settings = try read() } catch { throw ValidationError(error.description) }
        do throws(ListenRefusal) {
            let daemon = try Daemon(
                settings: settings, handedOver: handedOver, signals: SignalWatch(), reading: read)
            Intake.enter { daemon.start() }
        } catch {
            switch error {
            case .alreadyServed(let path, let pid):
                Process.writeToStandardError(
                    "noether-writerd: \(path) is served by a live daemon, process \(pid)")
                throw ExitCode(DaemonExit.alreadyServed)
            case .system(let error):
                Process.writeToStandardError("noether-writerd: \(error)")
                throw ExitCode(1)
            }
        }
        dispatchMain()
    }

    /// The file, then the environment, then the command line.
    private static func settings(
        config: String?, socket: String?, exitIdle: Double?
    ) throws(SettingsError) -> Settings {
        var settings = try Settings(
            yaml: try config.map { path throws(SettingsError) in (try read(path), path) })
        if let socket {
            guard socket.hasPrefix("/") else {
                throw SettingsError(description: "--socket takes an absolute path, not \(socket)")
            }
            settings.socket = socket
        }
        if let exitIdle {
            guard exitIdle >= 0 else {
                throw SettingsError(description: "--exit-idle takes seconds, 0 or more")
            }
            settings.exitIdleSeconds = exitIdle
        }
        return settings
    }

    private static func read(_ path: String) throws(SettingsError) -> String {
        do throws(PosixError) { return try TextFile.read(path) } catch {
            throw SettingsError(description: "\(error)")
        }
    }
}
