// SPDX-License-Identifier: Apache-2.0
/// The rare messages, as JSON: they can be read in a trace. Members a side does not know are ignored.

import FoundationEssentials

public enum JSONPayload {
    public static func decode<T: Decodable>(_ type: T.Type, from payload: [UInt8]) throws(WireError) -> T {
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        do { return try decoder.decode(type, from: Data(payload)) } catch {
            throw WireError(.badFrame, words(error))
        }
    }

    /// What is wrong, by the names that the members have in the JSON.
    private static func words(_ error: any Error) -> String {
        guard let error = error as? DecodingError else { return "the JSON cannot be decoded" }
        switch error {
        case .keyNotFound(let key, let context): return "\(name(context.codingPath + [key])) is missing"
        case .valueNotFound(_, let context): return "\(name(context.codingPath)) is null"
        case .typeMismatch(_, let context):
            // "Expected to decode String but found number instead.": the first is a type of Swift's.
            let found = context.debugDescription.split(separator: " ").drop { $0 != "found" }.dropFirst().dropLast()
            return "\(name(context.codingPath)) has the wrong type: \(found.joined(separator: " "))"
        case .dataCorrupted(let context) where !context.codingPath.isEmpty:
            return "\(name(context.codingPath)) \(context.debugDescription)"
        default: return "the payload is not JSON, or a number in it is outside of its range"
        }
    }

    private static func name(_ path: [any CodingKey]) -> String {
        var name = ""
        for key in path {
            if let index = key.intValue {
                name += "[\(index)]"
            } else {
                name += (name.isEmpty ? "" : ".") + snakeCase(key.stringValue)
            }
        }
        return name.isEmpty ? "the JSON" : "the member \(name)"
    }

    /// As `convertToSnakeCase` does it, for names that have a capital letter at the beginning of a word only.
    private static func snakeCase(_ name: String) -> String {
        name.map { $0.isUppercase ? "_\($0.lowercased())" : "\($0)" }.joined()
    }

    public static func encode(_ message: some Encodable) throws(WireError) -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        encoder.keyEncodingStrategy = .convertToSnakeCase
        do { return Array(try encoder.encode(message)) } catch {
            throw WireError(.internal, "a message does not encode: \(error)")
        }
    }
}

// Members are those of docs/PROTOCOL.md in camel case; `JSONPayload` turns them into snake case and back.

public struct Hello: Codable, Sendable, Equatable {
    public var versions: [Int]
    public var client: String

    public init(versions: [Int] = [1], client: String) {
        self.versions = versions
        self.client = client
    }
}

public struct Welcome: Codable, Sendable, Equatable {
    public var version = 1
    public var daemon: String
    public var pid: Int32
    public var capabilities = FrameType.capabilities
    public var limits = Limits.announced
    /// nil: no service manager keeps this daemon.
    public var service: Service?

    public init(daemon: String, pid: Int32, service: Service? = nil) {
        self.daemon = daemon
        self.pid = pid
        self.service = service
        if service != nil { capabilities.removeAll { $0 == "leave" } }
    }

    /// What ends a daemon that a service manager keeps, as lines for a shell; nil where the daemon does not know its
    /// unit.
    public struct Service: Codable, Sendable, Equatable {
        public var restart: String?
        public var stop: String?

        public init(restart: String?, stop: String?) {
            self.restart = restart
            self.stop = stop
        }
    }

    /// The daemon's release.
    public var release: String { String(daemon.drop { $0 != "/" }.dropFirst()) }
}

public struct ErrorMessage: Codable, Sendable, Equatable {
    public var code: String
    public var message: String
    public var fatal: Bool
    public var errno: Int32?
    public var sequence: UInt64?

    public init(_ error: WireError, sequence: UInt64? = nil) {
        code = error.code.rawValue
        message = error.message
        fatal = error.isFatal
        errno = error.errno
        self.sequence = sequence
    }
}

public struct OpenRun: Codable, Sendable, Equatable {
    public var outputRoot: String
    public var runId: String
    public var stageName: String?
    public var debug: Bool?
    public var session: String
    /// `files`: the connection saves files at any path below the descriptor that comes with this, and has no run.
    public var layout: String?
    public static let filesLayout = "files"
    public var log: Bool?
    public var rank: Int?
    public var worldSize: Int?
    public var node: String?
    public var resumeAt: Int64?
    public var configYaml: String?
    /// Whether event files for TensorBoard are wanted; nil leaves it to the daemon's setting.
    public var tensorboard: Bool?
    /// Whether this side knows `progress` events.
    public var progress: Bool?
    /// What the modes of this run's files lack: the trainer's umask(2).
    public var umask: UInt32?
    /// Which older checkpoints are removed; nil leaves it to the daemon's settings.
    public var keepLast: Int?
    public var keepEvery: Int?

    public init(
        outputRoot: String, runID: String, stageName: String?, debug: Bool, session: String, log: Bool,
        node: String
    ) {
        self.outputRoot = outputRoot
        self.runId = runID
        self.stageName = stageName
        self.debug = debug
        self.session = session
        self.log = log
        self.node = node
    }
}

public struct RunOpened: Codable, Sendable, Equatable {
    public var runDirectory: String
    public var lastSequence: UInt64
    public var logUpdate: Int64?
    public var logEntries: Int?
    /// Whether what this connection logs is taken. Not told by the first daemons, as the next member.
    public var log: Bool?
    /// Updates of this session that were refused, the last ones: the connection may have ended before that was heard.
    public var refused: [ErrorMessage]?

    public init(runDirectory: String, lastSequence: UInt64, logUpdate: Int64?, logEntries: Int?) {
        self.runDirectory = runDirectory
        self.lastSequence = lastSequence
        self.logUpdate = logUpdate
        self.logEntries = logEntries
    }
}

public struct CheckpointEvent: Codable, Sendable, Equatable {
    public enum Kind: String, Codable, Sendable {
        case accepted, progress, written, durable, stalled, failed, released
    }

    public var sequence: UInt64
    public var event: Kind
    public var target: Int?
    public var path: String?
    public var bytes: UInt64?
    /// Handed to the file system, of `bytes`.
    public var bytesDone: UInt64?
    public var error: ErrorMessage?
    public var buffer: UInt64?

    public init(_ event: Kind, sequence: UInt64) {
        self.event = event
        self.sequence = sequence
    }
}

/// A file, or a directory with all that is below it, goes after what was accepted for it before.
public struct Remove: Codable, Sendable, Equatable {
    public var sequence: UInt64
    public var path: String
    /// Also a directory that is not empty.
    public var recursive: Bool?
    /// Only when what this session has saved to these paths is durable.
    public var after: [String]?

    public init(sequence: UInt64, path: String, recursive: Bool?, after: [String]? = nil) {
        self.sequence = sequence
        self.path = path
        self.recursive = recursive
        self.after = after
    }
}

/// A directory takes another name when all that this session has saved below it is durable.
public struct Commit: Codable, Sendable, Equatable {
    public var sequence: UInt64
    public var from: String
    public var to: String
    /// What has the other name already goes.
    public var replace: Bool?
    /// Relative paths of files that must be there.
    public var files: [String]?
    /// For how long they are waited for.
    public var patienceS: Double?

    public init(
        sequence: UInt64, from: String, to: String, replace: Bool?, files: [String]? = nil,
        patienceSeconds: Double? = nil
    ) {
        self.sequence = sequence
        self.from = from
        self.to = to
        self.replace = replace
        self.files = files
        patienceS = patienceSeconds
    }
}

public struct WaitPath: Codable, Sendable, Equatable {
    public var path: String
    public var timeoutS: Double?

    public init(path: String, timeoutSeconds: Double?) {
        self.path = path
        timeoutS = timeoutSeconds
    }
}

public struct Finish: Codable, Sendable, Equatable {
    public var sequence: UInt64
    public init(sequence: UInt64) { self.sequence = sequence }
}

public struct Finished: Codable, Sendable, Equatable {
    public var entriesPath: String?
    public var entries: Int

    public init(entriesPath: String?, entries: Int) {
        self.entriesPath = entriesPath
        self.entries = entries
    }
}

public struct PageRequest: Codable, Sendable, Equatable {
    public var key: String?
    public var from: Int
    public var limit: Int

    public init(key: String? = nil, from: Int, limit: Int) {
        self.key = key
        self.from = from
        self.limit = limit
    }
}

public struct WaitRequest: Codable, Sendable, Equatable {
    public var runId: String?
    public var timeoutS: Double?

    public init(runID: String?, timeoutSeconds: Double?) {
        self.runId = runID
        self.timeoutS = timeoutSeconds
    }
}

public struct MetricsRequest: Codable, Sendable, Equatable {
    /// `prometheus` for the format of node_exporter's textfile collector; nil or another word for OpenMetrics.
    public var format: String?

    public init(format: String? = nil) { self.format = format }
}

public struct Leave: Codable, Sendable, Equatable {
    /// For the daemon's log: who wants what.
    public var reason: String?

    public init(reason: String) { self.reason = reason }
}

public struct Waited: Codable, Sendable, Equatable {
    public struct Failure: Codable, Sendable, Equatable {
        public var path: String
        public var message: String
        /// Not told by the first daemons.
        public var errno: Int32?

        public init(path: String, message: String, errno: Int32? = nil) {
            self.path = path
            self.message = message
            self.errno = errno
        }
    }

    public var done: Bool
    public var pending: Int
    public var failed: [Failure]
    /// What storage refuses for now, if the time ran out. Not told by the first daemons.
    public var stalled: [Failure]?

    public init(done: Bool, pending: Int, failed: [Failure], stalled: [Failure]) {
        self.done = done
        self.pending = pending
        self.failed = failed
        self.stalled = stalled
    }
}

public struct RunStatus: Codable, Sendable, Equatable {
    public struct Checkpoints: Codable, Sendable, Equatable {
        public var inFlight = 0
        public var bytesInFlight: UInt64 = 0
        /// How many bytes of the files in flight the file system has. The first daemons do not say it.
        public var bytesWritten: UInt64?
        public var durable = 0
        /// Of files that became durable, of saves that have ended. Not told by the first daemons, as the optional
        /// members below.
        public var bytesDurable: UInt64?
        public var failed = 0
        public init() {}
    }

    public enum State: String, Codable, Sendable { case running, finished, interrupted }

    public var runId: String
    public var runDirectory: String
    public var state: State
    public var pid: Int32
    public var node: String
    public var entries: Int
    public var lastUpdate: Int64?
    public var checkpoints: Checkpoints
    public var stalled: String?
    /// When the trainer logged the last update, in seconds since 1970.
    public var lastUpdateAt: Double?
    /// The last update that survives the daemon, and the last that survives power loss.
    public var logWrittenUpdate: Int64?
    public var logDurableUpdate: Int64?
    /// The file that is being written now.
    public var writing: CheckpointInfo?

    public init(
        runID: String, runDirectory: String, state: State, pid: Int32, node: String, entries: Int,
        lastUpdate: Int64?, checkpoints: Checkpoints, stalled: String?
    ) {
        self.runId = runID
        self.runDirectory = runDirectory
        self.state = state
        self.pid = pid
        self.node = node
        self.entries = entries
        self.lastUpdate = lastUpdate
        self.checkpoints = checkpoints
        self.stalled = stalled
    }
}

/// What there is of files at any path, all processes together.
public struct FilesStatus: Codable, Sendable, Equatable {
    /// Processes that have saved such files, and live.
    public var processes = 0
    public var checkpoints = RunStatus.Checkpoints()
    public var stalled: String?
    public init() {}
}

public struct StatusReport: Codable, Sendable, Equatable {
    public var version: String
    public var pid: Int32
    public var uptimeS: Double
    public var socket: String
    public var state: String
    public var connections: Int
    public var runs: [RunStatus]
    /// Of the daemon's process, without what it shares with trainers.
    public var memoryBytes: UInt64?
    /// What is wrong with the daemon's settings, and what it uses in their place.
    public var settingsProblem: String?
    /// How many more there are than a frame holds.
    public var runsLeftOut: Int?
    /// nil: nobody has saved such files.
    public var files: FilesStatus?

    public init(
        version: String, pid: Int32, uptimeSeconds: Double, socket: String, state: String, connections: Int,
        runs: [RunStatus]
    ) {
        self.version = version
        self.pid = pid
        self.uptimeS = uptimeSeconds
        self.socket = socket
        self.state = state
        self.connections = connections
        self.runs = runs
    }
}

/// Asks for the image of a file, as the client has found the file itself.
public struct Restore: Codable, Sendable, Equatable {
    public var device: UInt64
    public var inode: UInt64
    public var bytes: UInt64
    /// The file's times, in nanoseconds since 1970.
    public var modifiedNs: Int64
    public var changedNs: Int64

    public init(device: UInt64, inode: UInt64, bytes: UInt64, modifiedNs: Int64, changedNs: Int64) {
        self.device = device
        self.inode = inode
        self.bytes = bytes
        self.modifiedNs = modifiedNs
        self.changedNs = changedNs
    }
}

/// With a descriptor if it is found.
public struct Restored: Codable, Sendable, Equatable {
    public var found: Bool

    public init(found: Bool) { self.found = found }
}
