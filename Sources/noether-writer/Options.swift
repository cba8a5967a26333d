/// Options that several subcommands share.
import ArgumentParser
import NoetherWriterClient
import Wire

struct SocketOption: ParsableArguments {
    @Option(
        help: ArgumentHelp(
            "The daemon's socket, instead of $NOETHER_WRITER_SOCKET or the user's.", valueName: "path"),
        completion: .file())
    var socket: String?

    var path: String { socket ?? DaemonConnection.defaultSocket() }
    func connect() throws -> DaemonConnection { try DaemonConnection(socket: path) }
    func status() throws -> StatusReport { try connect().status().message }
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
