// SPDX-License-Identifier: Apache-2.0
/// What a peer is told when it broke a rule: a code of docs/PROTOCOL.md section 7, and words for a person.
public struct WireError: Error, Sendable, Equatable {
    public enum Code: String, Sendable, CaseIterable {
        case badFrame = "bad-frame"
        case unsupportedVersion = "unsupported-version"
        case tooLarge = "too-large"
        case handshake
        case wrongUser = "wrong-user"
        case unknownType = "unknown-type"
        case notOpen = "not-open"
        case alreadyOpen = "already-open"
        case badName = "bad-name"
        case badPath = "bad-path"
        case badBuffer = "bad-buffer"
        case badLayout = "bad-layout"
        case badKey = "bad-key"
        case badSequence = "bad-sequence"
        case badRank = "bad-rank"
        case updateOrder = "update-order"
        case logTakenOver = "log-taken-over"
        case logFull = "log-full"
        case unknownRun = "unknown-run"
        case tooSlow = "too-slow"
        case runInUse = "run-in-use"
        case nameInUse = "name-in-use"
        case tooMany = "too-many"
        case busy
        case draining
        case storage
        case `internal`

        /// Whether the daemon closes the connection after saying so: the stream can't be trusted any more.
        public var isFatal: Bool {
            switch self {
            // guard: broken-stream-ends (= false for true)
            case .badFrame, .unsupportedVersion, .tooLarge, .handshake, .wrongUser, .internal: true
            default: false
            }
        }
    }

    public var code: Code
    public var message: String
    /// The errno behind `storage`.
    public var errno: Int32?
    /// Whether the connection ends with it. A defect of one save is that save's alone, whatever its code.
    public var isFatal: Bool

    public init(_ code: Code, _ message: String, errno: Int32? = nil) {
        self.code = code
        self.message =
            message.utf8.count <= Limits.messageBytes
            ? message : String(decoding: message.utf8.prefix(Limits.messageBytes), as: UTF8.self) + "..."
        self.errno = errno
        isFatal = code.isFatal
    }
}
