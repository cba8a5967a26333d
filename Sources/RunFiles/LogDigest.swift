// SPDX-License-Identifier: Apache-2.0
/// A summary of a log: the first, last, lowest and highest value of each key. It stays small however long the log is.
import Wire

public struct LogDigest: Sendable {
    public typealias Place = (update: Int64, value: EntryValue)

    public struct Key: Sendable {
        public let name: String
        public fileprivate(set) var count = 0
        /// One of its values is a number, or NaN.
        public fileprivate(set) var hasNumber = false
        public fileprivate(set) var last: Place?
        /// The lowest finite value, and the first of those that are equally low; nil if no value is finite.
        public fileprivate(set) var lowest: Place?
        public fileprivate(set) var highest: Place?
        private var bounds = (low: 0.0, high: 0.0)

        fileprivate init(_ name: String) { self.name = name }

        fileprivate mutating func add(_ value: EntryValue, update: Int64) {
            count += 1
            if last.map({ $0.update <= update }) ?? true { last = (update, value) }
            guard let number = value.number else { return }
            hasNumber = true
            guard number.isFinite else { return }
            if lowest.map({ number < bounds.low || number == bounds.low && update < $0.update }) ?? true {
                (lowest, bounds.low) = ((update, value), number)
            }
            if highest.map({ number > bounds.high || number == bounds.high && update < $0.update }) ?? true {
                (highest, bounds.high) = ((update, value), number)
            }
        }
    }

    /// In the log's order.
    public private(set) var keys: [Key] = []
    public private(set) var lastUpdate: Int64?
    private var places: [ByteName: Int] = [:]
    private var current = 0

    public init() {}

    public subscript(key: String) -> Key? { places[ByteName(key)].map { keys[$0] } }

    /// The values that follow are this key's.
    public mutating func begin(_ key: String) {
        if let known = places[ByteName(key)] { return current = known }
        current = keys.count
        places[ByteName(key)] = current
        keys.append(Key(key))
    }

    public mutating func add(_ value: EntryValue, update: Int64) {
        keys[current].add(value, update: update)
        if update > lastUpdate ?? .min || lastUpdate == nil { lastUpdate = update }
    }
}
