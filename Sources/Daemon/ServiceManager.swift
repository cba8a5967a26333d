/// What systemd hands the daemon and hears from it. Without systemd every call does nothing.
import CSystemd
import Posix

struct ServiceManager: Sendable {
    private static let firstDescriptor: Int32 = 3

    /// Listening sockets that a service manager passed (sd_listen_fds(3)).
    static func listeningSockets() -> [OwnedFD] {
        let count = nw_sd_listen_fds()
        guard count > 0 else { return [] }
        return (0..<count).compactMap { index in
            let fd = OwnedFD(adopting: firstDescriptor + index)
            guard nw_sd_is_listening_unix_stream(fd.number) > 0 else { return nil }
            try? UnixSocket.setNonBlocking(fd)
            return fd
        }
    }

    func notify(_ state: String) { _ = nw_sd_notify(state) }
}
