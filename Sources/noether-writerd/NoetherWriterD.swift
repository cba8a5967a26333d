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

    @Option(help: ArgumentHelp("A file of settings in YAML; see config/noether-writer.yaml.", valueName: "file"))
    var config: String?

    @Option(help: ArgumentHelp("Where to listen, if systemd hands over no socket.", valueName: "path"))
    var socket: String?

    @Option(
        help: ArgumentHelp("Exit after this long without connections and work; 0 means never.", valueName: "seconds"))
    var exitIdle: Double?

    @Flag(help: "Start a daemon that is nobody's child and keeps nothing of who starts it; return when it serves.")
    var detach = false

    @Flag(help: "Read the settings, say what is wrong with them, and exit: 0 if nothing is, 64 if something is.")
    var checkConfig = false

    /// The descriptor on which the process that started this one with --detach waits for it to be ready.
    @Option(help: .hidden)
    var readyDescriptor: Int32?

    static func main() {
        do {
            var command = try parseAsRoot()
            try command.run()
        } catch {
            // A person sees how the program is used. In a journal those lines would stand again and again.
            guard exitCode(for: error) == .validationFailure, ThisProcess.standardErrorIsJournal else {
                exit(withError: error)
            }
            if !(error is ExitCode) { ThisProcess.writeToStandardError("noether-writerd: \(message(for: error))") }
            exit(withError: ExitCode.validationFailure)
        }
    }

    mutating func run() throws {
        // A daemon that a trainer starts has been through this before it was nobody's child.
        if readyDescriptor == nil, let warning = SettingVariable.warning(ofNames: ThisProcess.environmentNames) {
            ThisProcess.writeToStandardError("noether-writerd: \(warning)")
        }
        if checkConfig { return try check() }
        if detach { try startAnew() }
        let inherited = InheritedDescriptors()
        // Before the first thread: files get the modes of their runs.
        let fileModeMask = ThisProcess.clearFileModeMask()
        ThisProcess.ignoreSIGPIPE()
        ThisProcess.ignoreSIGXFSZ()
        ThisProcess.raiseDescriptorLimit()
        ThisProcess.useOneHeap()
        let source = settingsSource
        let (settings, problem) = try read(source, isKept: inherited.isByManager)
        do throws(ListenRefusal) {
            let daemon = try Daemon(
                settings: settings, inherited: inherited, signals: SignalWatch(), fileModeMask: fileModeMask,
                startedByTrainer: readyDescriptor != nil, settingsProblem: problem, reading: source)
            if let readyDescriptor {
                Spawn.tellReady(on: readyDescriptor)
            }
            DaemonActor.enter { daemon.start() }
        } catch {
            switch error {
            case .alreadyServed(let path, let pid):
                ThisProcess.writeToStandardError(
                    "noether-writerd: \(path) is served by a living daemon, process \(pid)")
                throw ExitCode(DaemonExit.alreadyServed)
            case .system(let error):
                ThisProcess.writeToStandardError("noether-writerd: \(error)")
                throw ExitCode(1)
            }
        }
        dispatchMain()
    }

    private static var namedConfig: String? {
        SettingVariable.find(SettingVariable.config, ThisProcess.environment)?.value
    }

    /// What a daemon's programs and libraries look at, and what says whose it is. What tunes a trainer is none of it.
    private static func isKept(_ variable: String) -> Bool {
        ["HOME", "USER", "LOGNAME", "PATH", "LANG", "TZ", "TZDIR", "LD_LIBRARY_PATH", SettingVariable.config].contains(
            variable)
            || variable == SettingVariable.deprecatedName(of: SettingVariable.config)
            || ["LC_", "XDG_", "ASAN_", "TSAN_", "UBSAN_", "LSAN_"].contains { variable.hasPrefix($0) }
    }

    /// For a trainer that needs a daemon: other trainers will use it too. Its settings are those of its user's file.
    private func startAnew() throws -> Never {
        let dropped = ThisProcess.environmentNames.filter { name in
            let isSetting = [SettingVariable.prefix, SettingVariable.deprecatedPrefix].contains { name.hasPrefix($0) }
            return (isSetting || name == Faults.variable) && !Self.isKept(name)
        }
        if !dropped.isEmpty {
            ThisProcess.writeToStandardError(
                "not taken from the environment of process \(ThisProcess.parentID), since this daemon serves others too: "
                    + "\(dropped.sorted().joined(separator: ", ")); write settings into the file that "
                    + "\(SettingVariable.config) names, or into \(Self.userConfig ?? "noether-writer.yaml")")
        }
        var arguments: [String] = []
        if let socket { arguments += ["--socket", socket] }
        if let exitIdle {
            arguments += ["--exit-idle", Int(exactly: exitIdle).map { "\($0)" } ?? "\(exitIdle)"]
        }
        arguments += ["--ready-descriptor", "\(Spawn.readyDescriptor)"]
        let named = config ?? Self.namedConfig
        if let file = named ?? Self.userConfig, named != nil || FileFacts(file) != nil {
            arguments += ["--config", FileSystem.absolute(file)]
        }
        do throws(PosixError) { try Spawn.anew(arguments, keeping: Self.isKept) } catch {
            ThisProcess.writeToStandardError("noether-writerd: \(error)")
            throw ExitCode(1)
        }
    }

    /// The user's settings for daemons that trainers start.
    private static var userConfig: String? {
        let directory =
            ThisProcess.environment("XDG_CONFIG_HOME") ?? ThisProcess.environment("HOME").map { "\($0)/.config" }
        return directory.flatMap { $0.hasPrefix("/") ? "\($0)/noether-writer/noether-writer.yaml" : nil }
    }

    private var settingsSource: SettingsSource {
        SettingsSource(config: config ?? Self.namedConfig, socket: socket, exitIdle: exitIdle)
    }

    private func check() throws {
        do throws(SettingsError) { _ = try settingsSource.read() } catch { throw Self.wrong(error) }
        print("the settings are right")
    }

    /// - Parameter isKept: a service manager keeps this daemon, which then starts whatever the settings are.
    private func read(
        _ source: SettingsSource, isKept: Bool
    ) throws -> (settings: Settings, problem: String?) {
        guard isKept else {
            do throws(SettingsError) { return (try source.read(), nil) } catch { throw Self.wrong(error) }
        }
        let found = source.readOrFallBack()
        if found.problem == nil { source.keepCopy() }
        return found
    }

    /// Says it without the usage text, which would stand in a journal again and again.
    private static func wrong(_ error: SettingsError) -> ExitCode {
        ThisProcess.writeToStandardError("noether-writerd: \(error)")
        return ExitCode.validationFailure
    }
}
