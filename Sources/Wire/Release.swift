// SPDX-License-Identifier: Apache-2.0
/// What a release is called. The Swift programs and clients read it here, setuptools and the Python client read
/// `__version__` of the Python package, and `make lint` demands that they are equal.
public enum Release {
    public static let version = "0.1.0"

    /// Whether a release came before another one, as noether_writer/daemon_replacement.py compares them: by the numbers
    /// that the names begin with (1.2.3). What comes after those, or is no number, makes none older.
    public static func isOlder(_ version: String, than other: String) -> Bool {
        guard let first = numbers(of: version), let second = numbers(of: other) else { return false }
        return first.lexicographicallyPrecedes(second)
    }

    private static func numbers(of version: String) -> [Int]? {
        let parts = version.split(separator: ".", omittingEmptySubsequences: false).prefix(3)
        let numbers = parts.compactMap { Int($0.prefix { $0.isASCII && $0.isNumber }) }
        return numbers.count == 3 ? numbers : nil
    }
}
