// SPDX-License-Identifier: Apache-2.0
/// The names of the daemon's environment variables. `NOETHER_WRITER_SETTING_` and a setting's name in capitals is that
/// setting. The names of version 0.1 before its release began with `NOETHER_WRITERD_`, which differs by one letter from
/// the clients' variables: they are read if the new name is not set, and the daemon says so once.
import Posix

public enum SettingVariable {
    public static let prefix = "NOETHER_WRITER_SETTING_"
    /// Names the file of settings.
    public static let config = "NOETHER_WRITER_CONFIG"
    public static let deprecatedPrefix = "NOETHER_WRITERD_"

    static func name(of setting: String) -> String { prefix + setting.uppercased() }

    /// The older name of one of this file's variables; nil if it has none.
    public static func deprecatedName(of variable: String) -> String? {
        if variable == config { return deprecatedPrefix + "CONFIG" }
        return variable.hasPrefix(prefix) ? deprecatedPrefix + variable.dropFirst(prefix.count) : nil
    }

    private static func currentName(of deprecated: Substring) -> String {
        switch deprecated {
        case "CONFIG": config
        case "FAULTS": Faults.variable
        default: prefix + deprecated
        }
    }

    /// A variable by its name, or else by its older one. An empty one is as good as none.
    /// - Returns: its value, and the name that has it.
    public static func find(
        _ variable: String, _ environment: (String) -> String?
    ) -> (value: String, name: String)? {
        for name in [variable, deprecatedName(of: variable)].compactMap({ $0 }) {
            if let value = environment(name), !value.isEmpty { return (value, name) }
        }
        return nil
    }

    /// Those that look like a setting's and are none, as after a slip of the pen.
    static func unknown(ofNames names: [String]) -> [String] {
        let known = Set(Settings.Key.allCases.map(\.variable))
        return names.filter { name in
            if name.hasPrefix(deprecatedPrefix) {
                let current = currentName(of: name.dropFirst(deprecatedPrefix.count))
                return current.hasPrefix(prefix) && !known.contains(current)
            }
            return name.hasPrefix(prefix) && !known.contains(name)
        }.sorted()
    }

    /// What to say of older names among those that are set, in one line; nil if there are none.
    public static func warning(ofNames names: [String]) -> String? {
        let old = names.filter { $0.hasPrefix(deprecatedPrefix) }.sorted()
        guard !old.isEmpty else { return nil }
        let pairs = old.map { "\($0) is now \(currentName(of: $0.dropFirst(deprecatedPrefix.count)))" }
        return "older names of variables are set, which the next minor release does not read: "
            + pairs.joined(separator: ", ")
    }
}
