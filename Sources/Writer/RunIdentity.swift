// SPDX-License-Identifier: Apache-2.0
/// Whose run this is, as files that outlive a daemon say it: a log's journal, and the note beside a snapshot in the service
/// manager's store. The form is these files' own, so that a change to a message of the protocol leaves them readable.
public import Wire

public struct RunIdentity: Codable, Sendable, Equatable {
    /// The form that this build writes, and the newest one that it knows. Files from before there was a version have none.
    static let version = 1

    var version: Int?
    public var outputRoot: String
    public var runId: String
    public var stageName: String?
    public var debug: Bool?
    public var session: String
    /// As in `open_run`: of files at any path.
    public var layout: String?
    public var rank: Int?
    public var worldSize: Int?
    public var node: String?
    public var tensorboard: Bool?
    public var umask: UInt32?
    public var keepLast: Int?
    public var keepEvery: Int?

    public init(_ message: OpenRun) {
        version = Self.version
        outputRoot = message.outputRoot
        runId = message.runId
        stageName = message.stageName
        debug = message.debug
        session = message.session
        layout = message.layout
        rank = message.rank
        worldSize = message.worldSize
        node = message.node
        tensorboard = message.tensorboard
        umask = message.umask
        keepLast = message.keepLast
        keepEvery = message.keepEvery
    }

    /// The same run as another session or rank of it is known.
    public init(_ run: RunName, session: String, rank: Int, like other: RunIdentity?) {
        version = Self.version
        outputRoot = run.outputRoot
        runId = run.runID
        stageName = run.stageName
        debug = run.debug
        self.session = session
        self.rank = rank
        layout = other?.layout
        umask = other?.umask
        keepLast = other?.keepLast
        keepEvery = other?.keepEvery
    }

    /// Written by a daemon that knows more than this one.
    public var isNewer: Bool { version ?? 0 > Self.version }
}
