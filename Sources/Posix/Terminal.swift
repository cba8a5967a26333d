// SPDX-License-Identifier: Apache-2.0
/// Standard output, where a person may be looking.
import CLinux
import Glibc

public enum Terminal {
    public static var isTerminal: Bool { isatty(1) == 1 }
    /// A person can press keys.
    public static var hasKeyboard: Bool { isatty(0) == 1 }

    /// In columns.
    public static var width: Int { size?.columns ?? 80 }

    /// nil if standard output is not a terminal, or one that does not know.
    public static var size: (columns: Int, rows: Int)? {
        var (columns, rows): (Int32, Int32) = (0, 0)
        guard nw_terminal_size(1, &columns, &rows) == 0, columns > 0, rows > 0 else { return nil }
        return (Int(columns), Int(rows))
    }

    /// What `print` has kept back, and whether all that it was given has gone out.
    public static func flush() throws(PosixError) {
        errno = 0
        guard nw_flush_output() != 0 else { return }
        // An error of before has left no number.
        throw PosixError(errno == 0 ? EIO : errno, "write standard output")
    }

    /// At once, without a line's end; all of it, or nothing more where nobody reads.
    public static func write(_ text: String) {
        var text = text
        text.withUTF8 { bytes in
            var done = 0
            while done < bytes.count {
                let count = Glibc.write(1, bytes.baseAddress! + done, bytes.count - done)
                guard count > 0 || errno == EINTR || errno == EAGAIN else { return }
                done += max(0, count)
            }
        }
    }
}

/// The terminal taken over: keys come one by one and are not echoed, the cursor is hidden, and what was on the screen
/// comes back at the end. `leave` may be called from any thread, more than once.
public final class FullScreen: Sendable {
    private let saved: termios

    /// nil if standard input or output is not a terminal.
    public init?() {
        var settings = termios()
        guard Terminal.isTerminal, tcgetattr(0, &settings) == 0 else { return nil }
        saved = settings
    }

    public func enter() {
        var raw = saved
        raw.c_lflag &= ~tcflag_t(ICANON | ECHO)
        withUnsafeMutableBytes(of: &raw.c_cc) { keys in
            keys[Int(VMIN)] = 0
            keys[Int(VTIME)] = 0
        }
        tcsetattr(0, TCSANOW, &raw)
        var settings = saved
        nw_terminal_restore_at_fault(&settings, Self.leaving)
        // The other screen of xterm, and no cursor.
        Terminal.write("\u{1B}[?1049h\u{1B}[?25l")
    }

    private static let leaving = "\u{1B}[?25h\u{1B}[?1049l"

    public func leave() {
        Terminal.write(Self.leaving)
        var settings = saved
        tcsetattr(0, TCSANOW, &settings)
    }

    /// Stops this process as Ctrl-Z does; returns when it continues.
    public func suspend() {
        leave()
        kill(getpid(), SIGSTOP)
        enter()
    }

    /// Keys pressed since the last call; nil if nobody can press any more.
    public func keys() -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: 64)
        let count = bytes.withUnsafeMutableBytes { read(0, $0.baseAddress, $0.count) }
        if count < 0 { return errno == EINTR || errno == EAGAIN ? [] : nil }
        return Array(bytes.prefix(count))
    }

    /// Standard input, to be polled beside others.
    public static func keyboard() throws(PosixError) -> OwnedFD {
        OwnedFD(adopting: try syscall("dup") { dup(0) })
    }
}
