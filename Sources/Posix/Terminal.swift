/// Standard output, where a person may be looking.
import CLinux
import Glibc

public enum Terminal {
    public static var isTerminal: Bool { isatty(1) == 1 }

    /// In columns.
    public static var width: Int {
        let columns = nw_terminal_columns(1)
        return columns > 0 ? Int(columns) : 80
    }

    /// At once, without a line's end.
    public static func write(_ text: String) {
        var text = text
        text.withUTF8 { _ = Glibc.write(1, $0.baseAddress, $0.count) }
    }
}
