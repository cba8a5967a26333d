// SPDX-License-Identifier: Apache-2.0
/// A log's pickle as columns again: what `EntriesPickle` made, or `torch.save`. It is read twice, since the file has key by key what the
/// columns want row by row; nothing is in memory beside it but one key's updates.
import RunFiles
import Wire

enum EntriesColumns {
    /// - Returns: nil where it holds what no log over the wire could.
    static func read(_ pickle: UnsafeRawBufferPointer) -> LogColumns? {
        var (updates, isOrdered) = (Updates(), [Bool]())
        var reader = EntriesReader(pickle)
        guard
            let keys = try? reader.read(
                wants: { _ in
                    if let ordered = updates.endKey() { isOrdered.append(ordered) }
                    updates.startKey()
                    return true
                }, { _, update, _ in updates.add(update) })
        else { return nil }
        if let ordered = updates.endKey() { isOrdered.append(ordered) }

        guard var filler = LogColumns.Filler(updates: updates.all, keys: keys) else { return nil }
        var key = -1
        var disordered: [Int64: ScalarBits] = [:]
        func endKey() {
            for (update, value) in disordered.sorted(by: { $0.key < $1.key }) {
                filler.add(value, at: update, to: key)
            }
            disordered = [:]
        }
        reader = EntriesReader(pickle)
        let again = try? reader.read(
            wants: { _ in
                endKey()
                key += 1
                return true
            },
            { _, update, value in
                if isOrdered[key] {
                    filler.add(ScalarBits(value), at: update, to: key)
                } else {
                    disordered[update] = ScalarBits(value)
                }
            })
        guard again != nil else { return nil }
        endKey()
        return filler.finished()
    }

    /// The updates of all keys, most of which have the same ones.
    private struct Updates {
        private(set) var all: [Int64] = []
        private var key: [Int64] = []
        private var isInKey = false
        private var isOrdered = true

        mutating func startKey() {
            (isInKey, isOrdered) = (true, true)
            key.removeAll(keepingCapacity: true)
        }

        mutating func add(_ update: Int64) {
            if let last = key.last, last >= update { isOrdered = false }
            key.append(update)
        }

        /// - Returns: whether its updates came in order; nil where there was no key.
        mutating func endKey() -> Bool? {
            guard isInKey else { return nil }
            isInKey = false
            if !isOrdered { key = Set(key).sorted() }
            if key != all, key.contains(where: { !has($0) }) { all = merged() }
            return isOrdered
        }

        private func has(_ update: Int64) -> Bool {
            var (low, high) = (0, all.count)
            while low < high {
                let middle = (low + high) / 2
                if all[middle] < update { low = middle + 1 } else { high = middle }
            }
            return low < all.count && all[low] == update
        }

        private func merged() -> [Int64] {
            var merged: [Int64] = []
            merged.reserveCapacity(all.count + key.count)
            var (left, right) = (all[...], key[...])
            while let a = left.first, let b = right.first {
                merged.append(min(a, b))
                if a <= b { left.removeFirst() }
                if b <= a { right.removeFirst() }
            }
            return merged + left + right
        }
    }
}

extension ScalarBits {
    fileprivate init(_ value: EntryValue) {
        self =
            switch value {
            case .float(let bits): ScalarBits(tag: .float, bits: bits)
            case .int(let value): ScalarBits(value)
            case .bool(let value): ScalarBits(value)
            case .none: ScalarBits(tag: .none, bits: 0)
            case .string(let text): ScalarBits(text)
            case .bigInt(let digits):
                ScalarBits(tag: .bigInt, bits: UInt64(digits.count), tail: digits[...])
            }
    }
}
