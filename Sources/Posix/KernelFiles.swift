// SPDX-License-Identifier: Apache-2.0
/// The kernel's files, clock and processes (`Machine`).
import CLinux
public import Glibc

public struct KernelFiles: FileStore {
    public init() {}

    public func open(_ path: String, _ flags: Int32, _ mode: UInt32) -> Int32 { nw_open(path, flags, mode) }

    public func openBeneath(_ directory: Int32, _ name: String, _ flags: UInt64, _ mode: UInt64) -> Int32 {
        nw_open_beneath(directory, name, flags, mode)
    }

    public func close(_ file: Int32) { _ = Glibc.close(file) }
    public func mkdir(_ path: String, _ mode: UInt32) -> Int32 { Glibc.mkdir(path, mode) }
    public func mkdir(_ name: String, in directory: Int32, _ mode: UInt32) -> Int32 { mkdirat(directory, name, mode) }

    public func names(in directory: Int32) -> [String]? {
        // A descriptor of its own: reading moves a position that closedir would close with it.
        let number = nw_open_beneath(directory, ".", UInt64(O_RDONLY | nw_o_directory | nw_o_cloexec), 0)
        guard number >= 0 else { return nil }
        guard let stream = fdopendir(number) else {
            let code = errno
            close(number)
            errno = code
            return nil
        }
        defer { closedir(stream) }
        var names: [String] = []
        while let entry = readdir(stream) {
            let name = withUnsafeBytes(of: &entry.pointee.d_name) { bytes in
                String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
            }
            if name != ".", name != ".." { names.append(name) }
        }
        return names
    }

    public func stat(_ path: String, _ status: inout stat) -> Int32 { fstatat(AT_FDCWD, path, &status, 0) }
    public func fstat(_ file: Int32, _ status: inout stat) -> Int32 { Glibc.fstat(file, &status) }

    public func fstat(_ name: String, in directory: Int32, _ status: inout stat) -> Int32 {
        fstatat(directory, name, &status, AT_SYMLINK_NOFOLLOW)
    }

    public func attribute(_ name: String, of path: String, into bytes: UnsafeMutableRawBufferPointer?) -> Int {
        nw_get_attribute(path, name, bytes?.baseAddress, bytes?.count ?? 0)
    }

    public func attribute(_ name: String, of file: Int32, into bytes: UnsafeMutableRawBufferPointer?) -> Int {
        nw_get_attribute_of(file, name, bytes?.baseAddress, bytes?.count ?? 0)
    }

    public func setAttribute(_ name: String, of file: Int32, to value: String) -> Int32 {
        nw_set_attribute(file, name, value, value.utf8.count)
    }

    public func read(_ file: Int32, into bytes: UnsafeMutableRawBufferPointer) -> Int {
        Glibc.read(file, bytes.baseAddress, bytes.count)
    }

    public func read(_ file: Int32, into bytes: UnsafeMutableRawBufferPointer, at offset: Int) -> Int {
        pread(file, bytes.baseAddress, bytes.count, offset)
    }

    public func write(_ file: Int32, _ bytes: UnsafeRawBufferPointer, at offset: Int) -> Int {
        pwrite(file, bytes.baseAddress, bytes.count, offset)
    }

    public func truncate(_ file: Int32, to length: Int) -> Int32 { ftruncate(file, length) }
    public func allocate(_ file: Int32, _ length: Int) -> Int32 { nw_allocate(file, length) }

    public func cloneRange(_ source: Int32, from: UInt64, count: UInt64, to file: Int32, at: UInt64) -> Int32 {
        nw_clone_range(source, from, count, file, at)
    }

    public func setDirect(_ file: Int32, _ on: Bool) -> Int32 {
        let flags = fcntl(file, F_GETFL)
        return fcntl(file, F_SETFL, on ? flags | nw_o_direct : flags & ~nw_o_direct)
    }

    public func dropCache(_ file: Int32) { _ = posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED) }
    public func fsync(_ file: Int32) -> Int32 { Glibc.fsync(file) }
    public func fdatasync(_ file: Int32) -> Int32 { Glibc.fdatasync(file) }
    public func flock(_ file: Int32) -> Int32 { nw_lock_exclusive(file) }
    public func chmod(_ file: Int32, _ mode: UInt32) -> Int32 { fchmod(file, mode) }

    public func rename(_ name: String, to other: String, in directory: Int32) -> Int32 {
        renameat(directory, name, directory, other)
    }

    public func renameNew(_ name: String, to other: String, in directory: Int32) -> Int32 {
        nw_rename_new(directory, name, other)
    }

    public func link(_ name: String, as other: String, in directory: Int32) -> Int32 {
        linkat(directory, name, directory, other, 0)
    }

    public func unlink(_ name: String, in directory: Int32) -> Int32 { unlinkat(directory, name, 0) }
    public func anyNumber() -> UInt64 { UInt64.random(in: .min ... .max) }
}

struct KernelTime: TimeSource {
    // guard: monotonic (= CLOCK_REALTIME for CLOCK_MONOTONIC)
    var monotonicSeconds: Double { seconds(CLOCK_MONOTONIC) }
    var wallSeconds: Double { seconds(CLOCK_REALTIME) }

    private func seconds(_ clock: clockid_t) -> Double {
        var time = timespec()
        clock_gettime(clock, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }

    func sleep(_ seconds: Double) {
        var time = timespec(tv_sec: Int(seconds), tv_nsec: Int((seconds - seconds.rounded(.down)) * 1e9))
        // Cut short by a signal, it is short: callers look at the clock.
        nanosleep(&time, nil)
    }
}

struct KernelProcesses: ProcessTable {
    func startTicks(of pid: Int32) -> UInt64? {
        guard let text = try? TextFile.read("/proc/\(pid)/stat"), let end = text.lastIndex(of: ")") else {
            return nil
        }
        // The command, in parentheses, may hold spaces: fields are counted after it, from the third.
        let fields = text[text.index(after: end)...].split(separator: " ")
        guard fields.count > 19, fields[0] != "Z", fields[0] != "X" else { return nil }
        return UInt64(fields[19])
    }
}
