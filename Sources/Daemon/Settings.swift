// SPDX-License-Identifier: Apache-2.0
/// The daemon's settings: a YAML file, then the environment, then the command line; later ones win. An unknown or
/// ill-typed one is an error that names it and its line or variable. `config/noether-writer.yaml` documents each.
public import Posix
public import Writer

public struct SettingsError: Error, Sendable, CustomStringConvertible {
    public let description: String

    public init(description: String) { self.description = description }
}

public struct Settings: Sendable, Equatable {
    /// Where the daemon listens, unless it is handed a socket.
    public var socket: String
    /// Leaves after so many seconds without connections and work; 0 never.
    public var exitIdleSeconds = 0.0
    /// Serial queues for blocking disk work, for each file system: as many files are written at one time. Eight
    /// trainers that save at one moment took 2.1 times one O_DIRECT write of all with one queue, 1.75 with two, 1.55
    /// with four, 1.26 with eight.
    public var diskQueues = 8
    /// How long a daemon that leaves goes on writing what it has accepted.
    public var drainSeconds = 600.0

    /// How many checkpoints whose tag has a number are kept (`Retention`); 0 keeps all.
    public var keepLast = 0
    public var keepEvery = 0
    /// What snapshots that are not durable yet may take in memory: of all runs, and of one.
    public var snapshotBytes = ThisProcess.physicalMemoryByteCount / 2
    public var snapshotBytesPerRun = ThisProcess.physicalMemoryByteCount / 2
    /// The most bytes of memory for images of durable files (`SnapshotVault`), out of what snapshots leave free. 0
    /// turns images off.
    public var restoreBytes = ThisProcess.memoryByteCount / 8
    /// What the log of one run may take in memory.
    public var logBytesPerRun = 2 << 30
    /// The most bytes of memory for the logs of all runs together. A daemon that passes the limit of its control group
    /// is killed, and so is the next one when it has recovered the same logs.
    public var logBytes = ThisProcess.memoryByteCount / 4

    /// Where the daemon remembers which runs have a journal.
    public var stateDirectory: String

    /// Where metrics are written for node_exporter's textfile collector, and how often; nil: nowhere.
    public var metricsFile: String?
    public var metricsFileSeconds = 15.0

    /// Which runs have event files for TensorBoard.
    public var tensorboard = TensorBoardPolicy.onRequest

    /// What a living daemon can take: the others need a restart.
    mutating func applyChangeable(from new: Settings) {
        exitIdleSeconds = new.exitIdleSeconds
        drainSeconds = new.drainSeconds
    }

    /// Settings of `new` that differ and need a restart, by name.
    func changedFixed(_ new: Settings) -> [String] {
        var names: [String] = []
        if socket != new.socket { names.append(Key.socket.rawValue) }
        if logBytesPerRun != new.logBytesPerRun { names.append(Key.logBytesPerRun.rawValue) }
        if logBytes != new.logBytes { names.append(Key.logBytes.rawValue) }
        if snapshotBytes != new.snapshotBytes { names.append(Key.snapshotBytes.rawValue) }
        if snapshotBytesPerRun != new.snapshotBytesPerRun {
            names.append(Key.snapshotBytesPerRun.rawValue)
        }
        if restoreBytes != new.restoreBytes { names.append(Key.restoreBytes.rawValue) }
        if keepLast != new.keepLast { names.append(Key.keepLast.rawValue) }
        if keepEvery != new.keepEvery { names.append(Key.keepEvery.rawValue) }
        if diskQueues != new.diskQueues { names.append(Key.diskQueues.rawValue) }
        if tensorboard != new.tensorboard { names.append(Key.tensorboard.rawValue) }
        if metricsFile != new.metricsFile { names.append(Key.metricsFile.rawValue) }
        if metricsFileSeconds != new.metricsFileSeconds { names.append(Key.metricsFileSeconds.rawValue) }
        if stateDirectory != new.stateDirectory { names.append(Key.stateDirectory.rawValue) }
        return names
    }

    enum Key: String, CaseIterable {
        case socket
        case exitIdleSeconds = "exit_idle_seconds"
        case diskQueues = "disk_queues"
        case keepLast = "keep_last"
        case keepEvery = "keep_every"
        case snapshotBytes = "snapshot_bytes"
        case snapshotBytesPerRun = "snapshot_bytes_per_run"
        case restoreBytes = "restore_bytes"
        case logBytesPerRun = "log_bytes_per_run"
        case logBytes = "log_bytes"
        case drainSeconds = "drain_seconds"
        case stateDirectory = "state_directory"
        case tensorboard
        case metricsFile = "metrics_file"
        case metricsFileSeconds = "metrics_file_seconds"

        var variable: String {
            self == .socket ? "NOETHER_WRITER_SOCKET" : SettingVariable.name(of: rawValue)
        }
    }

    /// - Parameters:
    ///   - yaml: text of the configuration file with its name, or nil.
    ///   - environment: looks a variable up.
    public init(
        yaml: (text: String, name: String)?, environment: (String) -> String? = ThisProcess.environment
    ) throws(SettingsError) {
        socket = SocketPath.standard(environment)
        stateDirectory = ""
        if let yaml { try read(yaml.text, yaml.name) }
        for key in Key.allCases {
            if let found = SettingVariable.find(key.variable, environment) {
                try set(key, found.value, "the environment variable \(found.name)")
            }
        }
        if stateDirectory.isEmpty {
            stateDirectory = StateDirectory.standard(environment, socket: socket)
        }
    }

    private mutating func read(_ text: String, _ file: String) throws(SettingsError) {
        for line in try settingsLines(text, file) {
            let place = "\(file), line \(line.line)"
            guard let key = Key(rawValue: line.name) else {
                throw SettingsError(
                    description: "\(place): unknown setting \(line.name); known are "
                        + Key.allCases.map(\.rawValue).joined(separator: ", "))
            }
            guard let value = line.value else {
                throw SettingsError(description: "\(place): \(key.rawValue) takes one value")
            }
            try set(key, value, "\(place), setting \(key.rawValue)")
        }
    }

    private mutating func set(_ key: Key, _ value: String, _ place: String) throws(SettingsError) {
        switch key {
        case .socket: socket = try Self.absolutePath(value, place)
        case .stateDirectory: stateDirectory = try Self.absolutePath(value, place)
        case .tensorboard:
            guard let policy = TensorBoardPolicy(rawValue: value) else {
                throw SettingsError(
                    description: "\(place): must be on-request, always or never, not \(value)")
            }
            tensorboard = policy
        case .metricsFile:
            let path = try Self.absolutePath(value, place)
            guard path.hasSuffix(".prom") else {
                throw SettingsError(
                    description: "\(place): must be a file that ends in .prom, as node_exporter needs it, not \(value)")
            }
            // Several users' daemons can have one setting, and a file each.
            metricsFile = path.replacing("%u", with: ThisProcess.userName)
        case .metricsFileSeconds:
            metricsFileSeconds = try Self.seconds(value, place)
            guard metricsFileSeconds >= 1 else {
                throw SettingsError(description: "\(place): must be a number of seconds, 1 or more, not \(value)")
            }
        case .exitIdleSeconds: exitIdleSeconds = try Self.seconds(value, place)
        case .drainSeconds: drainSeconds = try Self.seconds(value, place)
        case .diskQueues:
            guard let count = Int(value), (1...16).contains(count) else {
                throw SettingsError(description: "\(place): must be a number from 1 to 16, not \(value)")
            }
            diskQueues = count
        case .keepLast: keepLast = try Self.count(value, place)
        case .keepEvery: keepEvery = try Self.count(value, place)
        case .snapshotBytes: snapshotBytes = try Self.bytes(value, place)
        case .snapshotBytesPerRun: snapshotBytesPerRun = try Self.bytes(value, place)
        case .restoreBytes: restoreBytes = value == "0" ? 0 : try Self.bytes(value, place)
        case .logBytesPerRun: logBytesPerRun = try Self.bytes(value, place)
        case .logBytes: logBytes = try Self.bytes(value, place)
        }
    }

    private static func absolutePath(_ value: String, _ place: String) throws(SettingsError) -> String {
        guard value.hasPrefix("/"), !value.utf8.contains(where: { $0 < 0x20 }) else {
            throw SettingsError(
                description:
                    "\(place): must be an absolute path without control characters, not \(value.debugDescription)")
        }
        return value
    }

    private static func bytes(_ value: String, _ place: String) throws(SettingsError) -> Int {
        guard let count = Int(value), count >= 1 << 16 else {
            throw SettingsError(description: "\(place): must be a number of bytes, 65536 or more, not \(value)")
        }
        return count
    }

    private static func count(_ value: String, _ place: String) throws(SettingsError) -> Int {
        guard let count = Int(value), count >= 0 else {
            throw SettingsError(description: "\(place): must be a number, 0 or more, not \(value)")
        }
        return count
    }

    static let secondsRange = 0...1e9

    private static func seconds(_ value: String, _ place: String) throws(SettingsError) -> Double {
        guard let seconds = Double(value), secondsRange.contains(seconds) else {
            throw SettingsError(description: "\(place): must be a number of seconds, 0 or more, not \(value)")
        }
        return seconds
    }
}
