// SPDX-License-Identifier: Apache-2.0
/// Work on storage that is tried again as long as that may help. What a refusal means is said here and nowhere else:
///
/// - One that may pass (no room, a read-only or unmounted file system, a permission) is tried again, after pauses that
///   grow, and is told each time. Nothing is given up for it.
/// - After one for another reason than room, what is held open is let go of: the next try opens it anew by its path.
/// - Storage that answers nothing is told as well, and waited for.
/// - Any other refusal ends the work, unless it is tried `always`.
///
/// Owned by the daemon's queue. One try at a time.
import Posix
import Wire

@DaemonActor
final class StorageJob {
    enum Patience {
        case whileRetryable
        case always
    }

    /// How long each try after a refusal waits, in seconds.
    private static let pauses = [0.5, 1, 2, 4, 8, 15, 30]

    private let disks: DiskQueues
    private let patience: Patience
    /// Lets go of what is held open on this storage.
    private let letGo: @Sendable @DaemonActor () -> Void
    /// Refusals in a row.
    private(set) var refusals = 0
    /// Why storage refuses for now.
    private(set) var refusal: PosixError?
    /// What the work is on: the path of a file, in most cases.
    private var subject = ""
    /// The same for whoever waits. It is the one place that says why a file does not get on.
    var stall: Waited.Failure? { refusal.map { Waited.Failure(path: subject, message: $0.description) } }
    /// The next try waits for its time.
    private(set) var isWaiting = false

    init(
        _ disks: DiskQueues, _ patience: Patience = .whileRetryable,
        letGo: @escaping @Sendable @DaemonActor () -> Void = {}
    ) {
        self.disks = disks
        self.patience = patience
        self.letGo = letGo
    }

    /// One try.
    /// - Parameters:
    ///   - operation: what the work does, in words: "write".
    ///   - subject: what it does that to: "/a/file".
    ///   - progress: grows while the work moves.
    ///   - refused: hears why storage refuses, or that it answers nothing.
    ///   - again: begins the next try, which may be another one than this.
    ///   - ended: not called after a refusal that is tried again.
    func run<Value: Sendable>(
        at place: DiskQueues.Place, _ operation: String, _ subject: String,
        _ work: @escaping @Sendable () throws(PosixError) -> Value,
        progress: @escaping @Sendable () -> UInt64 = { 0 },
        refused: @escaping @Sendable @DaemonActor (PosixError) -> Void = { _ in },
        again: @escaping @Sendable @DaemonActor () -> Void,
        ended: @escaping @Sendable @DaemonActor (Result<Value, PosixError>) -> Void
    ) {
        self.subject = subject
        disks.run(
            at: place,
            { () -> Result<Value, PosixError> in
                do throws(PosixError) { return .success(try work()) } catch { return .failure(error) }
            }, progress: progress,
            silent: { seconds in
                let error = PosixError.silence(seconds, "\(operation) \(subject)")
                self.refusal = error
                refused(error)
            }
        ) { result in
            // guard: tried-again (never: error.isRetryable)
            if case .failure(let error) = result, self.patience == .always || error.isRetryable {
                return self.refuse(error, refused: refused, again: again)
            }
            self.succeeded()
            ended(result)
        }
    }

    /// Storage refuses, as somebody else has found out.
    func refuse(
        _ error: PosixError, refused: @DaemonActor (PosixError) -> Void = { _ in },
        again: @escaping @Sendable @DaemonActor () -> Void
    ) {
        refusal = error  // guard: journal-refusal-said (= nil)
        if !error.isLackOfRoom, !error.isSilence { letGo() }
        pause(again)
        refused(error)
    }

    /// The next try comes after a pause.
    func pause(_ again: @escaping @Sendable @DaemonActor () -> Void) {
        let seconds = Self.pauses[min(refusals, Self.pauses.count - 1)]
        refusals += 1
        isWaiting = true
        DaemonActor.enter(after: seconds) {
            self.isWaiting = false
            again()
        }
    }

    /// Storage takes what it is given.
    func succeeded() {
        refusals = 0
        refusal = nil
    }
}
