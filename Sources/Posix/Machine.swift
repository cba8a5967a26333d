// SPDX-License-Identifier: Apache-2.0
/// What this process runs on: a file store, a clock, the other processes, and queues. They are the kernel's and
/// Dispatch's in every program; the simulator (Tests/Simulator) puts its own in their place, so that the same code
/// above them runs on a disk that loses what was not synced, on a virtual clock, in an order that a seed decides.
public import Dispatch
public import Glibc

public enum Machine {
    // Unchecked: written by `replace` alone, before the process has a second thread.
    nonisolated(unsafe) public private(set) static var files: any FileStore = KernelFiles()
    nonisolated(unsafe) public private(set) static var time: any TimeSource = KernelTime()
    nonisolated(unsafe) public private(set) static var processes: any ProcessTable = KernelProcesses()
    nonisolated(unsafe) public private(set) static var scheduler: any Scheduler = DispatchScheduler()

    /// Once, before anything else runs in this process.
    public static func replace(
        files: any FileStore, time: any TimeSource, processes: any ProcessTable, scheduler: any Scheduler
    ) {
        Self.files = files
        Self.time = time
        Self.processes = processes
        Self.scheduler = scheduler
    }
}

var files: any FileStore { Machine.files }

/// Files by descriptors and names, as the kernel has them. Each call does what the system call does that it is named
/// after, with `errno` set where it returns -1. Nothing here decides anything.
public protocol FileStore: Sendable {
    func open(_ path: String, _ flags: Int32, _ mode: UInt32) -> Int32
    /// openat2(2) with RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS.
    func openBeneath(_ directory: Int32, _ name: String, _ flags: UInt64, _ mode: UInt64) -> Int32
    func close(_ file: Int32)
    func mkdir(_ path: String, _ mode: UInt32) -> Int32
    func mkdir(_ name: String, in directory: Int32, _ mode: UInt32) -> Int32
    /// nil where it can't be read; `errno` says why.
    func names(in directory: Int32) -> [String]?

    func stat(_ path: String, _ status: inout stat) -> Int32
    func fstat(_ file: Int32, _ status: inout stat) -> Int32
    /// If the name is a symbolic link, this describes the link itself, not the file that it leads to.
    func fstat(_ name: String, in directory: Int32, _ status: inout stat) -> Int32
    func attribute(_ name: String, of path: String, into bytes: UnsafeMutableRawBufferPointer?) -> Int
    func attribute(_ name: String, of file: Int32, into bytes: UnsafeMutableRawBufferPointer?) -> Int
    func setAttribute(_ name: String, of file: Int32, to value: String) -> Int32

    /// From where the last one ended.
    func read(_ file: Int32, into bytes: UnsafeMutableRawBufferPointer) -> Int
    func read(_ file: Int32, into bytes: UnsafeMutableRawBufferPointer, at offset: Int) -> Int
    func write(_ file: Int32, _ bytes: UnsafeRawBufferPointer, at offset: Int) -> Int
    func truncate(_ file: Int32, to length: Int) -> Int32
    func allocate(_ file: Int32, _ length: Int) -> Int32
    func cloneRange(_ source: Int32, from: UInt64, count: UInt64, to file: Int32, at: UInt64) -> Int32
    /// O_DIRECT.
    func setDirect(_ file: Int32, _ on: Bool) -> Int32
    /// What is clean in the page cache goes.
    func dropCache(_ file: Int32)
    func fsync(_ file: Int32) -> Int32
    func fdatasync(_ file: Int32) -> Int32
    /// Exclusively, without waiting, as long as the descriptor is open.
    func flock(_ file: Int32) -> Int32
    func chmod(_ file: Int32, _ mode: UInt32) -> Int32

    func rename(_ name: String, to other: String, in directory: Int32) -> Int32
    /// Only if nothing has the other name.
    func renameNew(_ name: String, to other: String, in directory: Int32) -> Int32
    func link(_ name: String, as other: String, in directory: Int32) -> Int32
    func unlink(_ name: String, in directory: Int32) -> Int32

    /// For a name that nothing has.
    func anyNumber() -> UInt64
}

public protocol TimeSource: Sendable {
    var monotonicSeconds: Double { get }
    var wallSeconds: Double { get }
    func sleep(_ seconds: Double)
}

public protocol ProcessTable: Sendable {
    /// See `ThisProcess.startTicks`.
    func startTicks(of pid: Int32) -> UInt64?
}

public protocol Scheduler: Sendable {
    /// Serial on each queue, in order of calling.
    func async(on queue: DispatchQueue, _ work: @escaping @Sendable () -> Void)
    func async(on queue: DispatchQueue, after seconds: Double, _ work: @escaping @Sendable () -> Void)
}

struct DispatchScheduler: Scheduler {
    func async(on queue: DispatchQueue, _ work: @escaping @Sendable () -> Void) { queue.async(execute: work) }

    func async(on queue: DispatchQueue, after seconds: Double, _ work: @escaping @Sendable () -> Void) {
        queue.asyncAfter(deadline: .now() + seconds, execute: work)
    }
}
