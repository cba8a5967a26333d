/// Every syscall goes through `syscall`: EINTR is tried again, errno is read at once.
/// Posix is the only target that imports Glibc.

import Glibc

public struct PosixError: Error, Sendable, Equatable, CustomStringConvertible {
    public var errno: Int32
    /// What was tried, with its path where there is one.
    public var operation: String

    public init(_ errno: Int32, _ operation: String) {
        self.errno = errno
        self.operation = operation
    }

    public var reason: String { String(cString: strerror(errno)) }
    public var description: String { "\(operation): \(reason)" }

    /// No socket file, or nobody behind it.
    public var isNothingListening: Bool { errno == ENOENT || errno == ECONNREFUSED }

    /// Storage may accept the same bytes later: full, over quota, an I/O error, read-only for now.
    public var mayPass: Bool {
        switch errno {
        case ENOSPC, EDQUOT, EIO, EROFS, ESTALE, ENOMEM, EMFILE, ENFILE: true
        default: false
        }
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

public enum Clock {
    /// Seconds, for intervals; jumps of the wall clock don't reach it.
    public static var monotonicSeconds: Double {
        var time = timespec()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }

    /// Seconds since 1970: data for people, never a measure.
    public static var wallSeconds: Double {
        var time = timespec()
        clock_gettime(CLOCK_REALTIME, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
    }
}

extension Clock {
    public static func sleep(_ seconds: Double) {
        var time = timespec(tv_sec: Int(seconds), tv_nsec: Int((seconds - seconds.rounded(.down)) * 1e9))
        // Cut short by a signal, it is short: callers look at the clock.
        nanosleep(&time, nil)
    }
}

public enum Process {
    public static var physicalMemoryByteCount: Int {
        sysconf(Int32(_SC_PHYS_PAGES)) * sysconf(Int32(_SC_PAGESIZE))
    }

    public static var id: Int32 { getpid() }
    public static var userID: UInt32 { geteuid() }

    public static var hostName: String {
        var buffer = [CChar](repeating: 0, count: 256)
        guard gethostname(&buffer, 255) == 0 else { return "localhost" }
        return buffer.withUnsafeBufferPointer { String(cString: $0.baseAddress!) }
    }

    public static func environment(_ name: String) -> String? { getenv(name).map { String(cString: $0) } }
    public static func setFileModeMask(_ mask: UInt32) { umask(mask) }
    public static func ignoreSIGPIPE() { signal(SIGPIPE, SIG_IGN) }
    /// Signals taken by a Dispatch source must not also have their default effect.
    public static func ignoreSignal(_ number: Int32) { signal(number, SIG_IGN) }
    public static let terminate = SIGTERM
    public static let interrupt = SIGINT
    public static func exit(_ status: Int32) -> Never { Glibc.exit(status) }

    public static func writeToStandardError(_ line: String) {
        var text = line + "\n"
        text.withUTF8 { _ = write(2, $0.baseAddress, $0.count) }
    }
}
