// SPDX-License-Identifier: Apache-2.0
/// What a service manager passed to this process: listening sockets, and what a daemon before this one put into the fd
/// store.
import CSystemd
import Posix
import Synchronization

public final class InheritedDescriptors: Sendable {
    private static let firstDescriptor: Int32 = 3

    let listeners: [OwnedFD]
    /// What is neither, in words.
    let unrecognized: [String]
    private let kept: Mutex<[String: [OwnedFD]]>

    /// The sockets' places in the file system.
    var paths: [(path: String, socket: OwnedFD)] {
        listeners.compactMap { socket in UnixSocket.path(of: socket).map { ($0, socket) } }
    }

    /// Whether a service manager keeps this daemon: it starts the next one too.
    public var isByManager: Bool {
        !listeners.isEmpty || ThisProcess.environment("NOTIFY_SOCKET") != nil || kept.withLock { !$0.isEmpty }
    }

    /// Names in the fd store, until `claimKept`.
    var keptNames: Set<String> { kept.withLock { Set($0.keys) } }

    /// From the fd store, by name; given away once, since whoever holds one pins a checkpoint's memory.
    func claimKept() -> [String: [OwnedFD]] {
        kept.withLock { kept in
            defer { kept = [:] }
            return kept
        }
    }

    /// Takes the descriptors over (sd_listen_fds(3)). Before anything else in the process opens one: where the
    /// manager's word is wrong and a number is closed, it may soon be somebody else's.
    public init() {
        var listeners: [OwnedFD] = []
        var kept: [String: [OwnedFD]] = [:]
        var unrecognized: [String] = []
        let count = nw_sd_listen_fds()
        if count < 0 {
            let reason = PosixError(-count, "sd_listen_fds")
            unrecognized.append(
                "LISTEN_FDS counts descriptors that are not there (\(reason)); none was taken over")
        }
        for index in 0..<max(0, count) {
            let number = Self.firstDescriptor + index
            let name = String(cString: nw_sd_listen_name(index))
            let fd = OwnedFD(adopting: number)
            if nw_sd_is_listening_unix_stream(number) > 0 {
                do {
                    try UnixSocket.setNonBlocking(fd)
                    listeners.append(fd)
                } catch { unrecognized.append("descriptor \(number) (\(name)): \(error)") }
            } else if name.hasPrefix(ServiceManager.keptPrefix) {
                kept[name, default: []].append(fd)
            } else {
                unrecognized.append(
                    "descriptor \(number) (\(name)), which was handed over, is not a listening Unix stream socket"
                )
            }
        }
        self.listeners = listeners
        self.unrecognized = unrecognized
        self.kept = Mutex(kept)
    }
}
