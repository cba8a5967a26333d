/// The rare messages, as JSON: they can be read in a trace. Members a side does not know are ignored.

import FoundationEssentials

public enum JSONPayload {
    public static func decode<T: Decodable>(_ type: T.Type, from payload: [UInt8]) throws(WireError) -> T {
        do { return try JSONDecoder().decode(type, from: Data(payload)) } catch {
            throw WireError(.badFrame, "the JSON of \(type) does not decode: \(error)")
        }
    }

    public static func encode(_ message: some Encodable) throws(WireError) -> [UInt8] {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .withoutEscapingSlashes]
        encoder.keyEncodingStrategy = .useDefaultKeys
        do { return Array(try encoder.encode(message)) } catch {
            throw WireError(.internal, "a message does not encode: \(error)")
        }
    }
}

// Members are spelled as on the wire, so that no key tables stand between the code and PROTOCOL.md.

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

    public init(daemon: String, pid: Int32) {
        self.daemon = daemon
        self.pid = pid
    }
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
        fatal = error.code.isFatal
        errno = error.errno
        self.sequence = sequence
    }
}

public struct OpenRun: Codable, Sendable, Equatable {
    public var output_root: String
    public var run_id: String
    public var stage_name: String?
    public var debug: Bool?
    public var session: String
    public var log: Bool?
    public var rank: Int?
    public var world_size: Int?
    public var node: String?
    public var resume_at: Int64?
    public var config_yaml: String?

    public init(
        outputRoot: String, runID: String, stageName: String?, debug: Bool, session: String, log: Bool,
        node: String
    ) {
        output_root = outputRoot
        run_id = runID
        stage_name = stageName
        self.debug = debug
        self.session = session
        self.log = log
        self.node = node
    }
}

public struct RunOpened: Codable, Sendable, Equatable {
    public var run_directory: String
    public var last_sequence: UInt64
    public var log_update: Int64?

    public init(runDirectory: String, lastSequence: UInt64, logUpdate: Int64?) {
        run_directory = runDirectory
        last_sequence = lastSequence
        log_update = logUpdate
    }
}

public struct CheckpointEvent: Codable, Sendable, Equatable {
    public enum Kind: String, Codable, Sendable {
        case accepted, written, durable, stalled, failed, released
    }

    public var sequence: UInt64
    public var event: Kind
    public var target: Int?
    public var path: String?
    public var bytes: UInt64?
    public var error: ErrorMessage?
    public var buffer: UInt64?

    public init(_ event: Kind, sequence: UInt64) {
        self.event = event
        self.sequence = sequence
    }
}

public struct Finish: Codable, Sendable, Equatable {
    public var sequence: UInt64
    public init(sequence: UInt64) { self.sequence = sequence }
}

public struct Finished: Codable, Sendable, Equatable {
    public var entries_path: String?
    public var entries: Int

    public init(entriesPath: String?, entries: Int) {
        entries_path = entriesPath
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
    public var run_id: String?
    public var timeout_s: Double?

    public init(runID: String?, timeoutSeconds: Double?) {
        run_id = runID
        timeout_s = timeoutSeconds
    }
}

public struct Waited: Codable, Sendable, Equatable {
    public struct Failure: Codable, Sendable, Equatable {
        public var path: String
        public var message: String

        public init(path: String, message: String) {
            self.path = path
            self.message = message
        }
    }

    public var done: Bool
    public var pending: Int
    public var failed: [Failure]

    public init(done: Bool, pending: Int, failed: [Failure]) {
        self.done = done
        self.pending = pending
        self.failed = failed
    }
}

public struct RunStatus: Codable, Sendable, Equatable {
    public struct Checkpoints: Codable, Sendable, Equatable {
        public var in_flight = 0
        public var bytes_in_flight: UInt64 = 0
        public var durable = 0
        public var failed = 0
        public init() {}
    }

    public enum State: String, Codable, Sendable { case running, finished, interrupted }

    public var run_id: String
    public var run_directory: String
    public var state: State
    public var pid: Int32
    public var node: String
    public var entries: Int
    public var last_update: Int64?
    public var checkpoints: Checkpoints
    public var stalled: String?

    public init(
        runID: String, runDirectory: String, state: State, pid: Int32, node: String, entries: Int,
        lastUpdate: Int64?, checkpoints: Checkpoints, stalled: String?
    ) {
        run_id = runID
        run_directory = runDirectory
        self.state = state
        self.pid = pid
        self.node = node
        self.entries = entries
        last_update = lastUpdate
        self.checkpoints = checkpoints
        self.stalled = stalled
    }
}

public struct StatusReport: Codable, Sendable, Equatable {
    public var version: String
    public var pid: Int32
    public var uptime_s: Double
    public var socket: String
    public var state: String
    public var connections: Int
    public var runs: [RunStatus]

    public init(
        version: String, pid: Int32, uptimeSeconds: Double, socket: String, state: String, connections: Int,
        runs: [RunStatus]
    ) {
        self.version = version
        self.pid = pid
        uptime_s = uptimeSeconds
        self.socket = socket
        self.state = state
        self.connections = connections
        self.runs = runs
    }
}
