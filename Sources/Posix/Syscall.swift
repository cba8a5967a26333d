// SPDX-License-Identifier: Apache-2.0
/// Every syscall goes through `syscall`: EINTR is tried again, errno is read at once.
/// Posix is the only target that imports Glibc.

import CLinux
import Glibc

public struct PosixError: Error, Sendable, Equatable, CustomStringConvertible {
    public var errno: Int32
    /// What was tried, with its path where there is one.
    public var operation: String

    /// Known to be worth another try, whatever the number says.
    private var isMarkedRetryable = false

    public init(_ errno: Int32, _ operation: String) {
        self.errno = errno
        self.operation = operation
    }

    public var asRetryable: PosixError {
        var error = self
        error.isMarkedRetryable = true
        return error
    }

    public static func alreadyExists(_ operation: String) -> PosixError { PosixError(EEXIST, operation) }
    public static func invalid(_ operation: String) -> PosixError { PosixError(EINVAL, operation) }
    public static func inputOutput(_ operation: String) -> PosixError { PosixError(EIO, operation) }
    public static func missing(_ operation: String) -> PosixError { PosixError(ENOENT, operation) }
    public static func isHeld(_ path: String) -> PosixError {
        PosixError(EBUSY, "use \(path), which another daemon holds, here or on another node")
    }
    public static func loop(_ operation: String) -> PosixError { PosixError(ELOOP, operation) }

    public var reason: String { String(cString: strerror(errno)) }

    private static let known: [(number: Int32, name: String)] = [
        (ENOSPC, "ENOSPC"), (EDQUOT, "EDQUOT"), (EIO, "EIO"), (EROFS, "EROFS"), (ESTALE, "ESTALE"),
        (ENOMEM, "ENOMEM"), (EMFILE, "EMFILE"), (ENFILE, "ENFILE"), (EACCES, "EACCES"), (EPERM, "EPERM"),
        (ENOENT, "ENOENT"), (EFBIG, "EFBIG"), (ETIMEDOUT, "ETIMEDOUT"), (EEXIST, "EEXIST"),
        (EISDIR, "EISDIR"),
    ]

    /// All that `name` can be.
    public static let names = known.map(\.name) + ["other"]

    /// As C names it; what a file system rarely says is `other`.
    public var name: String { Self.known.first { $0.number == errno }?.name ?? "other" }
    public var description: String { "\(operation): \(reason)" }

    /// No socket file, or nobody listens on it.
    public var isNothingListening: Bool { errno == ENOENT || errno == ECONNREFUSED }

    public var isMissing: Bool { errno == ENOENT }
    /// Something has the name.
    public var isTaken: Bool { errno == EEXIST }

    /// This user may make no file there.
    public var isForbidden: Bool { errno == EACCES || errno == EPERM || errno == EROFS }

    /// Who read a pipe has gone.
    public var isNoReader: Bool { errno == EPIPE }

    /// Storage may accept the same bytes later: full, over quota, an I/O error, read-only for now, a permission that
    /// somebody can give, a mount that is gone.
    public var isRetryable: Bool {
        if isMarkedRetryable { return true }
        return switch errno {
        case ENOSPC, EDQUOT, EIO, EROFS, ESTALE, ENOMEM, EMFILE, ENFILE: true
        case EACCES, EPERM, EBUSY, EAGAIN, ENOLCK, ETIMEDOUT: true
        case ENOTCONN, ENODEV, ENXIO, ESHUTDOWN, EHOSTDOWN, EHOSTUNREACH, ENETDOWN, ENETUNREACH: true
        case ECONNABORTED, ECONNREFUSED, ECONNRESET, EREMOTEIO: true
        default: false
        }
    }

    /// Only room is missing: what is there already is good.
    public var isLackOfRoom: Bool { errno == ENOSPC || errno == EDQUOT }

    public var isSilence: Bool { errno == ETIMEDOUT }

    /// Storage that answers nothing, not even no.
    public static func silence(_ seconds: Double, _ operation: String) -> PosixError {
        PosixError(ETIMEDOUT, "\(operation): nothing has moved for \(Int(seconds)) s")
    }
}

@discardableResult
func syscall<T: FixedWidthInteger & SignedInteger>(
    _ operation: @autoclosure () -> String, _ body: () -> T
) throws(PosixError) -> T {
    while true {
        let result = body()
        if result >= 0 { return result }
        let code = errno
        if code != EINTR { throw PosixError(code, operation()) }
    }
}

/// All of it, however often write(2) stops short.
func writeAll(
    _ bytes: [UInt8], to number: Int32, _ operation: @autoclosure () -> String
) throws(PosixError) {
    var done = 0
    while done < bytes.count {
        done += try syscall(operation()) {
            bytes.withUnsafeBytes { write(number, $0.baseAddress! + done, $0.count - done) }
        }
    }
}

public enum Clock {
    /// Seconds, for intervals; jumps of the wall clock don't reach it.
    public static var monotonicSeconds: Double { Machine.time.monotonicSeconds }

    /// Seconds since 1970: data for people, never a measure.
    public static var wallSeconds: Double { Machine.time.wallSeconds }
}

extension Clock {
    /// `2026-01-31 14:05:09`, in this place's time.
    public static func local(_ wallSeconds: Double) -> String {
        guard wallSeconds.isFinite, abs(wallSeconds) < 1e12 else { return "?" }
        var seconds = time_t(wallSeconds)
        var parts = tm()
        localtime_r(&seconds, &parts)
        var text = [CChar](repeating: 0, count: 64)
        let length = strftime(&text, text.count, "%Y-%m-%d %H:%M:%S", &parts)
        return String(decoding: text.prefix(length).map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }

    public static func sleep(_ seconds: Double) { Machine.time.sleep(seconds) }
}

public enum ThisProcess {
    public static var physicalMemoryByteCount: Int {
        sysconf(Int32(_SC_PHYS_PAGES)) * sysconf(Int32(_SC_PAGESIZE))
    }

    /// The memory that this process may take at most: that of the machine, or the limit of its control group.
    public static var memoryByteCount: Int { min(physicalMemoryByteCount, JobMemory().limit ?? .max) }

    /// Before the first thread starts. glibc gives each thread a heap of its own otherwise, and what one frees another
    /// can't use: 64 logs that grow at once took 19 bytes a scalar so, 12.7 with one heap, and no more time.
    public static func useOneHeap() { _ = nw_malloc_one_arena() }

    /// After something large has gone: malloc keeps what is free (malloc_trim(3)).
    public static func giveBackFreeMemory() { nw_malloc_trim() }

    /// What malloc holds for nobody, in bytes.
    public static var freeHeapByteCount: Int { Int(nw_malloc_free_bytes()) }
    public static var id: Int32 { getpid() }

    /// This user's name as /etc/passwd has it, else as the environment says, else the number. Not by getpwuid(3), which
    /// may ask a directory service, and wait for it.
    public static var userName: String {
        let lines = ((try? TextFile.read("/etc/passwd")) ?? "").split(separator: "\n")
        for line in lines {
            let fields = line.split(separator: ":", omittingEmptySubsequences: false)
            if fields.count > 2, UInt32(fields[2]) == userID { return String(fields[0]) }
        }
        if let name = environment("USER"), !name.isEmpty, !name.contains("/") { return name }
        return "\(userID)"
    }

    /// Resident bytes (proc(5), status): of this process alone, and those that others may have too.
    public static var memory: (own: UInt64, shared: UInt64) {
        var found: [Substring: UInt64] = [:]
        for line in ((try? TextFile.read("/proc/self/status", atMost: 4096)) ?? "").split(separator: "\n") {
            let parts = line.split(whereSeparator: { $0 == ":" || $0 == "\t" || $0 == " " })
            if parts.count == 3, parts[2] == "kB", let number = UInt64(parts[1]) {
                found[parts[0]] = number << 10
            }
        }
        return (found["RssAnon"] ?? 0, (found["RssFile"] ?? 0) + (found["RssShmem"] ?? 0))
    }

    /// User and system time of all threads so far.
    public static var cpuSeconds: Double {
        var time = timespec()
        clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
    public static var userID: UInt32 { geteuid() }
    /// Whether this number stands for all users that have none in this user namespace (user_namespaces(7)).
    public static func isNobody(_ uid: UInt32) -> Bool {
        guard uid == overflowUserID else { return false }
        return !userIDs.contains { $0.contains(UInt64(uid)) }
    }
    private static let overflowUserID: UInt32? =
        (try? TextFile.read("/proc/sys/kernel/overflowuid", atMost: 64)).flatMap { UInt32($0.filter(\.isNumber)) }
    private static let userIDs: [Range<UInt64>] =
        ((try? TextFile.read("/proc/self/uid_map", atMost: 65536)) ?? "").split(separator: "\n").compactMap {
            let numbers = $0.split(separator: " ").compactMap { UInt32($0).map(UInt64.init) }
            return numbers.count == 3 ? numbers[0]..<numbers[0] + numbers[2] : nil
        }
    public static var parentID: Int32 { getppid() }

    /// When a process started, in clock ticks since boot (proc(5), stat, field 22); nil if there is no such process.
    /// With the pid it names a process for good: pids are used again.
    public static func startTicks(of pid: Int32) -> UInt64? { Machine.processes.startTicks(of: pid) }

    /// How many descriptors this process may have.
    public static var descriptorLimit: Int {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return 1024 }
        return Int(min(limit.rlim_cur, 1 << 30))
    }

    /// As many descriptors as this process may have: a shell's soft limit of 1,024 is for select(2), which nothing here
    /// calls.
    public static func raiseDescriptorLimit() {
        var limit = rlimit()
        guard getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit) == 0 else { return }
        limit.rlim_cur = limit.rlim_max
        setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    }

    public static var hostName: String {
        var buffer = [CChar](repeating: 0, count: 256)
        guard gethostname(&buffer, 255) == 0 else { return "localhost" }
        return buffer.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    }

    public static var environmentNames: [String] {
        var found: [String] = []
        var next = environ
        while let variable = next.pointee {
            found.append(String(String(cString: variable).prefix { $0 != "=" }))
            next += 1
        }
        return found
    }
    public static func environment(_ name: String) -> String? { getenv(name).map { String(cString: $0) } }
    /// From then on each file gets the mode that its maker names. One thread, at the start.
    /// - Returns: the mask until then.
    public static func clearFileModeMask() -> UInt32 { umask(0) }
    /// Read from proc(5): umask(2) could only tell it by setting another one, under other threads' feet.
    public static var fileModeMask: UInt32? {
        for line in ((try? TextFile.read("/proc/self/status", atMost: 4096)) ?? "").split(separator: "\n") {
            let parts = line.split(whereSeparator: { $0 == ":" || $0 == "\t" || $0 == " " })
            if parts.count == 2, parts[0] == "Umask" { return UInt32(parts[1], radix: 8) }
        }
        return nil
    }
    public static func ignoreSIGPIPE() { signal(SIGPIPE, SIG_IGN) }
    /// A file beyond the limit of this process fails with EFBIG then, and kills nobody (setrlimit(2)).
    public static func ignoreSIGXFSZ() { signal(SIGXFSZ, SIG_IGN) }
    /// Signals taken by a Dispatch source must not also have their default effect.
    public static func ignoreSignal(_ number: Int32) { signal(number, SIG_IGN) }
    public static let terminate = SIGTERM
    public static let interrupt = SIGINT
    public static let quit = SIGQUIT
    public static let windowChange = SIGWINCH
    public static let terminalStop = SIGTSTP
    /// Called by exit(3), and by the return of `main`.
    public static func atExit(_ body: @convention(c) () -> Void) { atexit(body) }
    public static func exit(_ status: Int32) -> Never { Glibc.exit(status) }
    /// Without what `print` has kept back.
    public static func exitAtOnce(_ status: Int32) -> Never { _exit(status) }

    public static let hangUp = SIGHUP

    /// Whether standard error is the connection to systemd's journal that JOURNAL_STREAM names (systemd.exec(5)).
    public static var standardErrorIsJournal: Bool {
        guard let text = environment("JOURNAL_STREAM") else { return false }
        var status = stat()
        guard fstat(2, &status) == 0 else { return false }
        return text == "\(status.st_dev):\(status.st_ino)"
    }

    /// A pipe whose reader is gone takes nothing, and does not end this process: what a library says is no reason to.
    public static func writeToStandardError(_ line: String) { prompt(line + "\n") }

    /// As `writeToStandardError`, without a line's end.
    public static func prompt(_ text: String) {
        var text = text
        var pipe = sigset_t()
        var before = sigset_t()
        var pending = sigset_t()
        sigemptyset(&pipe)
        sigaddset(&pipe, SIGPIPE)
        sigpending(&pending)
        let wasPending = sigismember(&pending, SIGPIPE) == 1
        pthread_sigmask(SIG_BLOCK, &pipe, &before)
        let count = text.withUTF8 { write(2, $0.baseAddress, $0.count) }
        // It is this thread's own: SIGPIPE goes to the thread that has written.
        if count < 0, errno == EPIPE, !wasPending {
            var atOnce = timespec()
            _ = sigtimedwait(&pipe, nil, &atOnce)
        }
        pthread_sigmask(SIG_SETMASK, &before, nil)
    }
}
