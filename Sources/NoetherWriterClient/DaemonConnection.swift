/// A blocking connection for questions: handshake, then one request and its answer at a time. Not for use from several
/// threads at once.
import Posix
public import Wire

public enum ClientError: Error, Sendable, CustomStringConvertible {
    case notListening(socket: String, reason: String)
    case closed
    case refused(code: String, message: String)

    public var description: String {
        switch self {
        case .notListening(let socket, let reason):
            "no daemon answers on \(socket) (\(reason)); start noether-writerd, or name its socket in NOETHER_WRITER_SOCKET"
        case .closed: "the daemon closed the connection"
        case .refused(let code, let message): "\(message) (\(code))"
        }
    }
}

public final class DaemonConnection {
    private let socket: OwnedFD
    private var decoder = FrameDecoder()
    private var nextRequest: UInt32 = 1

    public init(socket path: String) throws {
        do throws(PosixError) { socket = try UnixSocket.connect(to: path) } catch {
            throw ClientError.notListening(socket: path, reason: error.reason)
        }
        _ = try ask(.hello, Hello(client: "noether-writer-swift/0.1.0"), Welcome.self)
    }

    /// Sends a JSON request and waits for its answer.
    /// - Throws: `ClientError`, or `PosixError` of the socket.
    public func ask<Answer: Decodable>(
        _ type: FrameType, _ message: some Encodable, _: Answer.Type
    ) throws -> Answer {
        let request = nextRequest
        nextRequest += 1
        var rest = Frame(type, request: request, payload: try JSONPayload.encode(message)).encoded()[...]
        while !rest.isEmpty {
            guard let sent = try rest.withUnsafeBytes({ try UnixSocket.send(on: socket, $0) }) else {
                try UnixSocket.waitUntilReady(socket, forWriting: true)
                continue
            }
            rest.removeFirst(sent)
        }
        while true {
            if let frame = try decoder.next() {
                guard frame.header.request == request else { continue }
                guard frame.header.type != FrameType.error.rawValue else {
                    let error = try JSONPayload.decode(ErrorMessage.self, from: frame.payload)
                    throw ClientError.refused(code: error.code, message: error.message)
                }
                return try JSONPayload.decode(Answer.self, from: frame.payload)
            }
            try receive()
        }
    }

    private func receive() throws {
        let buffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 64 << 10, alignment: 16)
        defer { buffer.deallocate() }
        switch try UnixSocket.receive(from: socket, into: buffer) {
        case .wouldBlock: try UnixSocket.waitUntilReady(socket, forWriting: false)
        case .end: throw ClientError.closed
        case .bytes(let count, _, _): decoder.feed(UnsafeRawBufferPointer(rebasing: buffer[..<count]))
        }
    }

    /// `$NOETHER_WRITER_SOCKET`, else the user's daemon, else the system template's.
    public static func defaultSocket() -> String {
        if let path = Process.environment("NOETHER_WRITER_SOCKET") { return path }
        if let directory = Process.environment("XDG_RUNTIME_DIR") {
            return "\(directory)/noether-writer/socket"
        }
        return "/run/noether-writer/\(Process.environment("USER") ?? "\(Process.userID)")/socket"
    }
}
