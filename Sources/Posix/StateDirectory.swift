// SPDX-License-Identifier: Apache-2.0
/// The directory in which a daemon keeps the files that the next daemon needs.

public enum StateDirectory {
    /// systemd's StateDirectory=, else the user's state directory, else beside the socket.
    /// - Parameter environment: looks a variable up.
    public static func standard(_ environment: (String) -> String?, socket: String) -> String {
        if let given = environment("STATE_DIRECTORY")?.split(separator: ":").first { return String(given) }
        if let directory = environment("XDG_STATE_HOME"), directory.hasPrefix("/") {
            return "\(directory)/noether-writer"
        }
        if let home = environment("HOME"), home.hasPrefix("/"), home != "/" {
            return "\(home)/.local/state/noether-writer"
        }
        return "\(socket).state"
    }

    /// The one that systemd gives to the daemon of the system template for this user.
    public static func ofTemplate(_ user: String) -> String { "/var/lib/noether-writer/\(user)" }
}
