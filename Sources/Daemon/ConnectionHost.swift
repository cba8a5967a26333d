// SPDX-License-Identifier: Apache-2.0
import Posix
import Wire
import Writer

/// What a connection asks of the daemon that has accepted it. `Daemon` is the only one.
@DaemonActor
protocol ConnectionHost: AnyObject {
    /// It is about to leave, and takes nothing new.
    var isDraining: Bool { get }
    /// How its service manager restarts and stops it; nil: nobody starts this daemon again but a client.
    var commands: Welcome.Service? { get }

    /// Whether the daemon leaves because this process may do more than it may itself.
    func givesWay(to peer: PeerCredentials) -> Bool
    /// - Parameter change: how many bytes more the connection holds than when it last said so. The daemon may close it.
    func holds(more change: Int)
    func forget(_ connection: Connection)
    /// Answers when everything accepted so far has ended, and every log is durable, or when the time is over.
    func whenDurable(
        runID: String?, timeoutSeconds: Double?, _ answer: @escaping @Sendable @DaemonActor (Waited) -> Void)
    /// - Parameter answer: gets, at the very end, what is durable and what is not.
    func leave(because reason: String, _ answer: @escaping @DaemonActor (Waited) -> Void)
    /// The living runs first, and as many as a frame holds.
    func fittingStatus() throws(WireError) -> StatusReport
    func metricsText(_ format: MetricsText.Format) -> String
}

/// What all connections of a daemon share.
@DaemonActor
final class ConnectionResources {
    let poller: Poller
    let runs: RunStore
    let metrics = Metrics()
    /// All connections read through one buffer: the daemon's queue handles one event at a time.
    let receiveBuffer = UnsafeMutableRawBufferPointer.allocate(byteCount: 256 << 10, alignment: 16)
    /// Answers that connections were promised and that storage has not let be given.
    var answersPending = 0
    /// Streams that are open.
    var subscriptionCount = 0

    nonisolated init(poller: Poller, runs: RunStore) {
        self.poller = poller
        self.runs = runs
    }
}
