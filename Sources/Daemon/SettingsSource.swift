// SPDX-License-Identifier: Apache-2.0
/// Reads the settings, and finds others to use if they are wrong. A daemon that a service manager keeps must start:
/// what an earlier one had accepted is in the manager's store, and a unit that fails again and again loses that store.
/// So it keeps a copy of the last file that was right, and says aloud that it uses the copy.
public import Posix

public struct SettingsSource: Sendable {
    private static let stateVariable = Settings.Key.stateDirectory.variable

    private let config: String?
    private let socket: String?
    private let exitIdle: Double?
    private let environment: @Sendable (String) -> String?
    private let names: @Sendable () -> [String]

    /// - Parameters:
    ///   - config: the path of the settings' file.
    ///   - socket: as the command line says it; it wins over the file and the environment.
    ///   - exitIdle: the same, in seconds.
    ///   - environment: looks a variable up.
    ///   - names: of all variables.
    public init(
        config: String?, socket: String?, exitIdle: Double?,
        environment: @escaping @Sendable (String) -> String? = ThisProcess.environment,
        names: @escaping @Sendable () -> [String] = { ThisProcess.environmentNames }
    ) {
        self.config = config
        self.socket = socket
        self.exitIdle = exitIdle
        self.environment = environment
        self.names = names
    }

    /// The file, then the environment, then the command line.
    public func read() throws(SettingsError) -> Settings {
        let unknown = SettingVariable.unknown(ofNames: names()).filter { environment($0)?.isEmpty == false }
        guard unknown.isEmpty else {
            throw SettingsError(
                description: "the environment variable \(unknown.joined(separator: ", ")) is no setting; known are "
                    + Settings.Key.allCases.map(\.variable).joined(separator: ", "))
        }
        guard let config else { return try settings(yaml: nil, environment) }
        return try settings(yaml: (try text(of: config), config), environment)
    }

    /// - Returns: the settings, and what is wrong with those that are wanted; nil if nothing is.
    public func readOrFallBack() -> (settings: Settings, problem: String?) {
        let wrong: SettingsError
        do throws(SettingsError) { return (try read(), nil) } catch { wrong = error }
        // Variables that are no settings are all that is wrong.
        if let config, let text = try? text(of: config), let found = try? settings(yaml: (text, config), environment) {
            return (found, "\(wrong); it counts for nothing")
        }
        // What only says where things are is taken even if another variable is wrong.
        let places = Set(
            ["HOME", "USER", "XDG_RUNTIME_DIR", "XDG_STATE_HOME", "STATE_DIRECTORY", Self.stateVariable]
                + [SettingVariable.deprecatedName(of: Self.stateVariable)].compactMap { $0 })
        let onlyPlaces = { @Sendable in places.contains($0) ? environment($0) : nil }
        if let kept = try? TextFile.read(keptPath) {
            for environment in [environment, onlyPlaces] {
                if let settings = try? settings(yaml: (kept, keptPath), environment) {
                    return (settings, "\(wrong); the settings of \(keptPath), the last ones that were right, are used")
                }
            }
        }
        if let settings = try? settings(yaml: nil, environment) {
            return (settings, "\(wrong); the default of each setting in that file is used")
        }
        guard let settings = try? Settings(yaml: nil, environment: onlyPlaces) else {
            preconditionFailure("the defaults are settings")
        }
        return (settings, "\(wrong); the defaults are used for everything")
    }

    /// Keeps a copy of the file, which `read` has found right.
    public func keepCopy() {
        guard let config, let text = try? TextFile.read(config), text != (try? TextFile.read(keptPath)) else { return }
        // Without a copy the daemon works as well, until somebody writes a wrong setting.
        _ = try? Directory.openOrCreateRoot(stateDirectory, mode: 0o700)
        try? TextFile.replace(keptPath, with: text, mode: 0o600)
    }

    /// Not below the directory that the file itself may name: it must be found if the file cannot be read.
    private var stateDirectory: String {
        SettingVariable.find(Self.stateVariable, environment)?.value
            ?? StateDirectory.standard(environment, socket: socket ?? SocketPath.standard(environment))
    }
    private var keptPath: String { "\(stateDirectory)/last-good.yaml" }

    private func settings(
        yaml: (text: String, name: String)?, _ environment: @Sendable (String) -> String?
    ) throws(SettingsError) -> Settings {
        var settings = try Settings(yaml: yaml, environment: environment)
        if let socket {
            guard socket.hasPrefix("/") else {
                throw SettingsError(description: "--socket must be an absolute path, not \(socket)")
            }
            settings.socket = socket
        }
        if let exitIdle {
            guard Settings.secondsRange.contains(exitIdle) else {
                throw SettingsError(description: "--exit-idle must be 0 to 1000000000 seconds")
            }
            settings.exitIdleSeconds = exitIdle
        }
        return settings
    }

    private func text(of path: String) throws(SettingsError) -> String {
        do throws(PosixError) { return try TextFile.read(path) } catch {
            throw SettingsError(description: "\(error)")
        }
    }
}
