/// What systemd hands the daemon and hears from it. Without systemd every call does nothing.
///
/// Everything that is said goes out on a queue of its own: the manager's socket may be full, and a call that waited there could
/// not be allowed to stop the intake (systemd#1505).
import CSystemd
import Dispatch
import Posix
import Writer

struct ServiceManager: Sendable {
    private static let firstDescriptor: Int32 = 3
    /// Names in the fd store that are ours.
    static let keptPrefix = "save-"
    /// For how long `stored` waits for the manager to say that it has read a message.
    private static let barrierMicroseconds: UInt64 = 5_000_000

    private let queue = DispatchQueue(label: "noether-writer.service")
    let isPresent = Process.environment("NOTIFY_SOCKET") != nil

    /// What a service manager passed (sd_listen_fds(3)).
    struct HandedOver: Sendable {
        var listeners: [OwnedFD] = []
        /// From the fd store, by name.
        var kept: [String: [OwnedFD]] = [:]
        /// What is neither, in words.
        var strange: [String] = []
    }

    static func handedOver() -> HandedOver {
        var found = HandedOver()
        for index in 0..<max(0, nw_sd_listen_fds()) {
            let number = firstDescriptor + index
            let name = String(cString: nw_sd_listen_name(index))
            guard OwnedFD.isOpen(number) else {
                found.strange.append("descriptor \(number) (\(name)), which LISTEN_FDS counts, is closed")
                continue
            }
            let fd = OwnedFD(adopting: number)
            if nw_sd_is_listening_unix_stream(number) > 0 {
                do {
                    try UnixSocket.setNonBlocking(fd)
                    found.listeners.append(fd)
                } catch { found.strange.append("descriptor \(number) (\(name)): \(error)") }
            } else if name.hasPrefix(keptPrefix) {
                found.kept[name, default: []].append(fd)
            } else {
                found.strange.append(
                    "descriptor \(number) (\(name)), which was handed over, is no listening Unix stream socket"
                )
            }
        }
        return found
    }

    func notify(_ state: String) {
        guard isPresent else { return }
        queue.async { _ = nw_sd_notify(state) }
    }

    /// For the last words: returns when the manager has read them.
    func notifyAndWait(_ state: String) {
        guard isPresent else { return }
        queue.sync {
            _ = nw_sd_notify(state)
            _ = nw_sd_notify_barrier(Self.barrierMicroseconds)
        }
    }

    /// Puts descriptors into the manager's store under one name, and calls back when it has read that.
    func store(_ fds: [OwnedFD], name: String, done: @escaping @Sendable @Intake () -> Void) {
        guard isPresent else { return Intake.enter(done) }
        queue.async {
            let numbers = fds.map(\.number)
            // FDPOLL=0: a memfd never hangs up, and polling one is an error (sd_notify(3)).
            _ = nw_sd_notify_with_fds("FDSTORE=1\nFDPOLL=0\nFDNAME=\(name)", numbers, UInt32(numbers.count))
            _ = nw_sd_notify_barrier(Self.barrierMicroseconds)
            withExtendedLifetime(fds) {}
            Intake.enter(done)
        }
    }

    func remove(_ name: String) { notify("FDSTOREREMOVE=1\nFDNAME=\(name)") }

    /// Says WATCHDOG=1 at half the interval, each time by way of the intake queue: where that is stuck, the manager hears
    /// nothing and starts the daemon anew. The disk queues are left out: a hung disk is not cured by a restart.
    func startWatchdog() {
        let interval = nw_sd_watchdog_usec()
        guard interval > 0 else { return }
        beat(every: Double(interval) / 2e6)
    }

    private func beat(every seconds: Double) {
        queue.asyncAfter(deadline: .now() + seconds) {
            Intake.enter {
                self.notify("WATCHDOG=1")
                self.beat(every: seconds)
            }
        }
    }
}
