// SPDX-License-Identifier: Apache-2.0
/// A name as the bytes that it is: of a run, a file, a key. Swift's own `==`, hashes, `hasPrefix` and `count` go by
/// Unicode equivalence and by characters: a letter with its accent is there the same as the letter and the accent, and
/// two files, or two keys, would be one. Where names are compared or looked up, it is by this type or by the functions
/// below.
public struct ByteName: Sendable, Hashable, Comparable {
    public let text: String

    public init(_ text: String) { self.text = text }

    public static func == (first: ByteName, second: ByteName) -> Bool { first.text.isSame(as: second.text) }

    public static func < (first: ByteName, second: ByteName) -> Bool {
        first.text.utf8.lexicographicallyPrecedes(second.text.utf8)
    }

    public func hash(into hasher: inout Hasher) {
        var text = text
        text.withUTF8 { hasher.combine(bytes: UnsafeRawBufferPointer($0)) }
    }
}

extension StringProtocol {
    public func isSame(as other: some StringProtocol) -> Bool { utf8.elementsEqual(other.utf8) }
    public func begins(with beginning: some StringProtocol) -> Bool { utf8.starts(with: beginning.utf8) }
    public func ends(with end: some StringProtocol) -> Bool {
        utf8.count >= end.utf8.count && utf8.suffix(end.utf8.count).elementsEqual(end.utf8)
    }

    /// What is between a beginning and an end of so many bytes.
    public func dropping(first: Int, last: Int = 0) -> String {
        String(decoding: utf8.dropFirst(first).dropLast(last), as: UTF8.self)
    }
}
