// SPDX-License-Identifier: Apache-2.0
/// What systemd hands the daemon and hears from it. Without systemd every call does nothing.
///
/// Everything that is said goes out on a queue of its own: the manager's socket may be full, and a call that waited
/// there could not be allowed to stop the daemon's queue (systemd#1505).
import CSystemd
import Dispatch
import Posix
import Wire
import Writer

struct ServiceManager: DescriptorKeeper {
    /// Names in the fd store that are ours.
    static let keptPrefix = "save-"
    /// For how long the manager may take to read a message.
    private static let barrierMicroseconds: UInt64 = 2_000_000
    private static let barrierSeconds = Double(barrierMicroseconds) / 1e6

    private let queue = DispatchQueue(label: "noether-writer.service")
    let isPresent = ThisProcess.environment("NOTIFY_SOCKET") != nil

    /// Whether the store outlives a stop of the unit too: systemd says how large it is from the release on that can do
    /// so, and the units ask for it (FileDescriptorStorePreserve=).
    let keepsStore = ThisProcess.environment("FDSTORE") != nil

    /// Descriptors that the store has room for: as systemd says it (254), or else as the units do.
    var storeCapacity: Int { ThisProcess.environment("FDSTORE").flatMap { Int($0) } ?? Self.standardStoreCapacity }
    /// FileDescriptorStoreMax= of the units.
    private static let standardStoreCapacity = 4096

    /// How a person ends this daemon if the manager keeps it, as a client is told.
    /// - Parameters:
    ///   - cgroup: of this process, as /proc/self/cgroup has it.
    ///   - isUsers: the manager is a user's.
    static func commands(cgroup: String, isUsers: Bool) -> Welcome.Service {
        let path = cgroup.split(separator: "\n").first { $0.hasPrefix("0::") }?.split(separator: "/") ?? []
        guard let last = path.lastIndex(where: { $0.hasSuffix(".service") && !$0.hasPrefix("user@") }) else {
            return Welcome.Service(restart: nil, stop: nil)
        }
        let unit = path[last]
        let systemctl = isUsers ? "systemctl --user" : "systemctl"
        return Welcome.Service(
            restart: "\(systemctl) restart \(unit)",
            // The socket too, which would start it again.
            stop: "\(systemctl) stop \(unit.dropLast(".service".count)).socket \(unit)")
    }

    /// A user's manager gives its number to its services (systemd.exec(5)).
    static var commands: Welcome.Service {
        commands(
            cgroup: (try? TextFile.read("/proc/self/cgroup")) ?? "",
            isUsers: ThisProcess.environment("MANAGERPID") == "\(ThisProcess.parentID)")
    }

    func notify(_ state: String) {
        guard isPresent else { return }
        queue.async { _ = nw_sd_notify(state) }
    }

    /// The text that `systemctl status` shows. It is one line, because each line of a notification is a field of
    /// its own, and the text has names in it that a trainer chose.
    static func status(_ words: String) -> String {
        "STATUS=\(Log.printable(words))"
    }

    /// For the last words: returns when the manager has read them, or after a moment.
    func notifyAndWait(_ state: String) {
        guard isPresent else { return }
        let told = DispatchSemaphore(value: 0)
        queue.async {
            _ = nw_sd_notify(state)
            _ = nw_sd_notify_barrier(Self.barrierMicroseconds)
            told.signal()
        }
        _ = told.wait(timeout: .now() + .microseconds(Int(Self.barrierMicroseconds)))
    }

    /// Puts descriptors into the manager's store under one name, and calls back when it has read that. A manager that
    /// is stuck must not keep checkpoints from the disk: then it calls back all the same, and says so.
    @DaemonActor
    func store(_ fds: [OwnedFD], name: String, done: @escaping @Sendable @DaemonActor () -> Void) {
        guard isPresent else { return DaemonActor.enter(done) }
        let once = Once<Void>(done)
        queue.async {
            let numbers = fds.map(\.number)
            // FDPOLL=0: a memfd never hangs up, and polling one is an error (sd_notify(3)).
            _ = nw_sd_notify_with_fds("FDSTORE=1\nFDPOLL=0\nFDNAME=\(name)", numbers, UInt32(numbers.count))
            _ = nw_sd_notify_barrier(Self.barrierMicroseconds)
            withExtendedLifetime(fds) {}
            DaemonActor.enter { once.give(()) }
        }
        once.give(after: Self.barrierSeconds) {
            Log.writeLimited(
                .warning, "systemd does not answer: a checkpoint is not in its fd store", topic: .storage)
        }
    }

    func remove(_ name: String) { notify("FDSTOREREMOVE=1\nFDNAME=\(name)") }

    /// The same; calls back with whether the manager has read it. A manager that is stuck must not keep the next
    /// checkpoint from the disk.
    @DaemonActor
    func remove(_ name: String, done: @escaping @Sendable @DaemonActor (Bool) -> Void) {
        guard isPresent else { return DaemonActor.enter { done(true) } }
        let once = Once(done)
        queue.async {
            var result: Int32 = -1
            for _ in 0..<10 {
                result = nw_sd_notify("FDSTOREREMOVE=1\nFDNAME=\(name)")  // guard: fd-store-forgets (= 1)
                if result >= 0 { break }
                Clock.sleep(0.05)
            }
            // 0: nobody to tell, and so nobody who keeps anything.
            let isRead = result == 0 || (result > 0 && nw_sd_notify_barrier(Self.barrierMicroseconds) > 0)
            DaemonActor.enter { once.give(isRead) }
        }
        once.give(after: Self.barrierSeconds) { false }
    }

    /// Says WATCHDOG=1 at half the interval, each time by way of the daemon's queue: where that is stuck, the manager
    /// hears nothing and starts the daemon anew. The disk queues are left out: a hung disk is not cured by a restart.
    func startWatchdog() {
        let interval = nw_sd_watchdog_usec()
        guard interval > 0 else { return }
        beat(every: Double(interval) / 2e6)
    }

    private func beat(every seconds: Double) {
        queue.asyncAfter(deadline: .now() + seconds) {
            DaemonActor.enter {
                self.notify("WATCHDOG=1")
                self.beat(every: seconds)
            }
        }
    }
}
