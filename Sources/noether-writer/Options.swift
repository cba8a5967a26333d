// SPDX-License-Identifier: Apache-2.0
/// Options that several subcommands share.
import ArgumentParser
import NoetherWriterClient
import Posix
import Wire

struct SocketOption: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "The daemon's socket; default: $NOETHER_WRITER_SOCKET, or else the user's.", valueName: "path"),
        completion: .file())
    var socket: String?

    @Option(help: ArgumentHelp("For root: the daemon of this user.", valueName: "name"))
    var user: String?

    mutating func validate() throws {
        guard let user else { return }
        guard socket == nil else { throw ValidationError("--user finds the socket; give --user or --socket") }
        guard ThisProcess.userID == 0 else {
            throw ValidationError("--user is for root: another user's daemon refuses you")
        }
        guard let uid = Users.uid(of: user) ?? UInt32(user) else { throw ValidationError("no user \(user)") }
        socket = SocketPath.ofUser(Users.name(of: uid) ?? user, uid: uid)
        DaemonLauncher.observe(uid: uid)
    }

    var path: String { socket ?? DaemonConnection.defaultSocket() }
    /// - Parameter limit: for the daemon's welcome.
    func connect(within limit: Duration? = nil) throws -> DaemonConnection {
        try DaemonConnection(socket: path, welcomeWithin: limit)
    }
    func status() throws -> StatusReport { try connect().statusBlocking().message }
}

/// The whole time that a command may take, whatever it waits for.
struct TimeoutOption: ParsableArguments {
    @Option(help: ArgumentHelp("Give up after this long.", valueName: "seconds")) var timeout: Double?
    private let start = Clock.monotonicSeconds

    private enum CodingKeys: String, CodingKey { case timeout }

    func validate() throws {
        guard (0...1e9).contains(timeout ?? 0) else {
            throw ValidationError("--timeout must be 0 to 1000000000 seconds")
        }
    }

    /// nil: as long as it takes.
    var seconds: Double? { timeout.map { max(0, start + $0 - Clock.monotonicSeconds) } }
    var duration: Duration? { seconds.map { .seconds($0) } }
    /// For an answer that itself comes when the time is over.
    var withGrace: Duration? { seconds.map { .seconds($0 + 0.5) } }
}

struct JSONOption: ParsableArguments {
    @Flag(help: "Print JSON, for programs.") var json = false

    /// - Returns: whether it was printed.
    func print(_ message: some Encodable) throws -> Bool {
        if json { Swift.print(String(decoding: try JSONPayload.encode(message), as: UTF8.self)) }
        return json
    }
}

/// JSON messages that go out as they came.
struct Empty: Encodable {}

/// An example of a command's use, below its --help.
func examples(_ lines: String...) -> String {
    "Examples:\n" + lines.map { "  \($0)" }.joined(separator: "\n")
}
