// SPDX-License-Identifier: Apache-2.0
/// Wakes a thread that sleeps in poll(2): eventfd(2).
import CLinux
import Glibc

public final class WakeEvent: Sendable {
    private let fd: OwnedFD

    public init() throws(PosixError) {
        fd = OwnedFD(adopting: try syscall("eventfd") { nw_eventfd() })
    }

    public func signal() {
        var one: UInt64 = 1
        _ = write(fd.number, &one, 8)
    }

    /// Sleeps until the socket can be read (or written, if asked for), `signal` was called, or the time is over (-1:
    /// never).
    public func wait(for socket: OwnedFD, orWriting: Bool, milliseconds: Int32 = -1) throws(PosixError) {
        var entries = [
            pollfd(fd: fd.number, events: Int16(POLLIN), revents: 0),
            pollfd(fd: socket.number, events: Int16(POLLIN | (orWriting ? POLLOUT : 0)), revents: 0),
        ]
        try syscall("poll") { poll(&entries, 2, milliseconds) }
        if entries[0].revents != 0 {
            var count: UInt64 = 0
            _ = read(fd.number, &count, 8)
        }
    }
}
