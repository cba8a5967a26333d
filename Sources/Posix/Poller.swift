// SPDX-License-Identifier: Apache-2.0
/// Says when sockets can be read or written: one thread in epoll_wait(2), for sockets that come and go by the thousand.
///
/// Dispatch's own sources can't be used for these: making and cancelling many of them crashes libdispatch now and then
/// (swift-corelibs-libdispatch#949; a flood of connections killed a daemon after some 10^4 of them). Each readiness is
/// told once and not again before `arm`, so that a busy socket can't fill a queue with events. An event may come for a
/// socket that is gone by then: its token is nobody's any more.
import CLinux
import Dispatch
import Glibc

public final class Poller: Sendable {
    public struct Event: Sendable {
        public var token: UInt64
        public var isReadable: Bool
        public var isWritable: Bool
    }

    private static let eventsAtOnce = 64

    private let fd: OwnedFD
    private let queue = DispatchQueue(label: "noether-writer.poller")

    public init() throws(PosixError) {
        fd = OwnedFD(adopting: try syscall("epoll_create1") { nw_poller_create() })
    }

    /// Never returns its thread.
    /// - Parameter told: called on that thread.
    public func start(_ told: @escaping @Sendable (Event) -> Void) {
        queue.async { [fd] in
            var events = [nw_event](repeating: nw_event(), count: Self.eventsAtOnce)
            while true {
                let count = nw_poller_wait(fd.number, &events, Int32(events.count))
                precondition(count >= 0 || errno == EINTR, "epoll_wait of a descriptor that is ours")
                for event in events.prefix(Int(max(0, count))) {
                    told(
                        Event(
                            token: event.token, isReadable: event.is_readable != 0,
                            isWritable: event.is_writable != 0))
                }
            }
        }
    }

    /// Armed for reading.
    public func add(_ socket: OwnedFD, token: UInt64) throws(PosixError) {
        try syscall("epoll_ctl") { nw_poller_add(fd.number, socket.number, token) }
    }

    /// Tells once when it can be read (or has ended), or, if asked for, written.
    public func arm(_ socket: OwnedFD, token: UInt64, writing: Bool) throws(PosixError) {
        try syscall("epoll_ctl") { nw_poller_arm(fd.number, socket.number, token, writing ? 1 : 0) }
    }

    public func remove(_ socket: OwnedFD) { nw_poller_remove(fd.number, socket.number) }
}
