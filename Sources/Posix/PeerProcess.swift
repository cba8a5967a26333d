// SPDX-License-Identifier: Apache-2.0
/// A process at the other end of a socket, known for good: by a pidfd where the kernel has them, else by its number and
/// when it
/// started. A number alone names nobody: numbers are used again, and every process of another pid namespace has the
/// number 0.
import CLinux
import Glibc

public final class PeerProcess: Sendable {
    /// 0 where it is in a pid namespace that this process can't see.
    public let pid: Int32
    /// When it started, in clock ticks since boot; nil where that can't be known.
    public let startTicks: UInt64?
    /// Readable when the process has ended (pidfd_open(2)).
    public let pidfd: OwnedFD?
    /// The inode of the pidfd; nil if the kernel does not give each process an inode of its own.
    private let inode: UInt64?

    /// The process that has connected.
    public init(of socket: OwnedFD, pid: Int32) {
        self.pid = pid
        let number = nw_peer_pidfd(socket.number, pid)
        pidfd = number < 0 ? nil : OwnedFD(adopting: number)
        var found: UInt64 = 0
        inode = number >= 0 && nw_pidfd_inode(number, &found) == 0 ? found : nil
        startTicks = pid > 0 ? ThisProcess.startTicks(of: pid) : nil
    }

    /// One that a daemon before this one has noted down.
    public init(pid: Int32, startTicks: UInt64?) {
        self.pid = pid
        self.startTicks = startTicks
        pidfd = nil
        inode = nil
    }

    /// Whether it has ended, as far as that can be known. What it has forked may live.
    public var hasEnded: Bool {
        if let pidfd { return nw_pidfd_has_ended(pidfd.number) != 0 }
        guard pid > 0 else { return false }
        // Where proc(5) is hidden (ProtectProc= of systemd), only that somebody has the number can be seen.
        guard let startTicks else { return kill(pid, 0) != 0 && errno == ESRCH }
        return ThisProcess.startTicks(of: pid) != startTicks
    }

    /// Whether both are known to be one process. Two that can't be told apart are not.
    public func isSame(as other: PeerProcess) -> Bool {
        if let inode, let others = other.inode { return inode == others }
        return pid > 0 && pid == other.pid && startTicks != nil && startTicks == other.startTicks
    }

    /// The same, without a descriptor that is held.
    public var noted: PeerProcess { PeerProcess(pid: pid, startTicks: startTicks) }

    /// For messages.
    public var name: String { pid > 0 ? "process \(pid)" : "a process of another pid namespace" }
}
