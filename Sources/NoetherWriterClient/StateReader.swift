// SPDX-License-Identifier: Apache-2.0
/// Reads the pickle of a checkpoint: plain values, and tensors in mapped storages. No general unpickler: it makes the
/// values of `StateValue` and nothing else, so there is nothing in a file that it could execute, and no class that it
/// could make. Everything is bounds-checked, and what a file may make of few bytes is bounded.
/// Source: CPython Lib/pickletools.py; torch/_utils.py and torch/_weights_only_unpickler.py at 2.13.
internal import TorchFile

struct StateReader {
    /// A value that others may name again, and that is filled after it was named.
    private final class Node {
        enum Kind {
            case value(StateValue)
            case list, tuple, dict, orderedDict
            case global(String)
            case dtype(DType)
            case storage(TensorStorage, DType?, count: Int)
            case mark
        }
        var kind: Kind
        var children: [Node] = []
        init(_ kind: Kind, _ children: [Node] = []) {
            self.kind = kind
            self.children = children
        }
    }

    /// As deep as a state may be that is saved.
    private static let levels = 1000
    /// How many values a state may have for each byte of its pickle. A small file can name one value again and again;
    /// without this limit it could fill the memory.
    private static let valuesPerByte = 16

    private let bytes: UnsafeRawBufferPointer
    private let storage: (String) -> TensorStorage?
    private var position = 0
    private var stack: [Node] = []
    private var nodes: [Node] = []
    private var memo: [Int: Node] = [:]
    private var storages: [String: TensorStorage] = [:]
    private var count = 0

    /// - Parameters:
    ///   - bytes: of the pickle; must stay as long as this is used.
    ///   - storage: the storage of that name in the file.
    init(_ bytes: UnsafeRawBufferPointer, storage: @escaping (String) -> TensorStorage?) {
        self.bytes = bytes
        self.storage = storage
    }

    struct Problem: Error, CustomStringConvertible {
        var description: String
    }

    private func problem(_ words: String) -> Problem {
        Problem(description: "the pickle, at byte \(position): \(words)")
    }

    /// Once.
    mutating func read() throws(Problem) -> StateValue {
        // One after the other: a chain of nodes that lets go of itself would overflow the stack.
        defer { for node in nodes { node.children = [] } }
        while true {
            let code = try byte()
            if code == UInt8(ascii: ".") { return try value(try pop(), level: 0) }
            try execute(code)
        }
    }

    // MARK: Bytes

    private mutating func byte() throws(Problem) -> UInt8 {
        guard position < bytes.count else { throw problem("it ends too early") }
        defer { position += 1 }
        return bytes[position]
    }

    private mutating func read(_ count: Int) throws(Problem) -> UnsafeRawBufferPointer {
        guard count >= 0, count <= bytes.count - position else { throw problem("it ends too early") }
        defer { position += count }
        return UnsafeRawBufferPointer(rebasing: bytes[position..<position + count])
    }

    private mutating func little<T: FixedWidthInteger>(_: T.Type) throws(Problem) -> T {
        T(littleEndian: try read(MemoryLayout<T>.size).loadUnaligned(as: T.self))
    }

    private mutating func text(_ count: Int) throws(Problem) -> String {
        guard let text = String(validating: try read(count), as: UTF8.self) else {
            throw problem("a text is not UTF-8")
        }
        return text
    }

    private mutating func line() throws(Problem) -> String {
        let start = position
        while try byte() != UInt8(ascii: "\n") {}
        return String(decoding: bytes[start..<position - 1], as: UTF8.self)
    }

    // MARK: The stack

    private mutating func push(_ kind: Node.Kind, _ children: [Node] = []) {
        let node = Node(kind, children)
        nodes.append(node)
        stack.append(node)
    }

    private mutating func pop() throws(Problem) -> Node {
        guard let node = stack.popLast() else { throw problem("it takes a value that is not there") }
        return node
    }

    private mutating func popToMark() throws(Problem) -> [Node] {
        let place = stack.lastIndex { if case .mark = $0.kind { true } else { false } }
        guard let place else { throw problem("a mark is missing") }
        defer { stack.removeSubrange(place...) }
        return Array(stack[(place + 1)...])
    }

    private func top() throws(Problem) -> Node {
        guard let node = stack.last else { throw problem("it fills a value that is not there") }
        return node
    }

    private mutating func execute(_ code: UInt8) throws(Problem) {
        switch code {
        case 0x80:
            guard try byte() <= 2 else { throw problem("its protocol is newer than 2, which torch.save writes") }
        case UInt8(ascii: "}"): push(.dict)
        case UInt8(ascii: "]"): push(.list)
        case UInt8(ascii: ")"): push(.tuple)
        case UInt8(ascii: "("): push(.mark)
        case UInt8(ascii: "N"): push(.value(.none))
        case 0x88: push(.value(.bool(true)))
        case 0x89: push(.value(.bool(false)))
        case UInt8(ascii: "K"): push(.value(.int(Int64(try byte()))))
        case UInt8(ascii: "M"): push(.value(.int(Int64(try little(UInt16.self)))))
        case UInt8(ascii: "J"): push(.value(.int(Int64(try little(Int32.self)))))
        case 0x8A: push(.value(.int(try long())))
        case UInt8(ascii: "G"):
            push(.value(.float(Double(bitPattern: try little(UInt64.self).byteSwapped))))
        case UInt8(ascii: "X"): push(.value(.string(try text(Int(try little(UInt32.self))))))
        case UInt8(ascii: "t"): push(.tuple, try popToMark())
        case 0x85: push(.tuple, [try pop()])
        case 0x86:
            let second = try pop()
            push(.tuple, [try pop(), second])
        case 0x87:
            let (third, second) = (try pop(), try pop())
            push(.tuple, [try pop(), second, third])
        case UInt8(ascii: "a"):
            let item = try pop()
            try fill(.list, [item])
        case UInt8(ascii: "e"): try fill(.list, try popToMark())
        case UInt8(ascii: "s"):
            let item = try pop()
            try fill(.dict, [try pop(), item])
        case UInt8(ascii: "u"): try fill(.dict, try popToMark())
        case UInt8(ascii: "q"): memo[Int(try byte())] = try top()
        case UInt8(ascii: "r"): memo[Int(try little(UInt32.self))] = try top()
        case UInt8(ascii: "h"): try recall(Int(try byte()))
        case UInt8(ascii: "j"): try recall(Int(try little(UInt32.self)))
        case UInt8(ascii: "c"):
            let (module, name) = (try line(), try line())
            if module == "torch", let dtype = DType(rawValue: name) {
                push(.dtype(dtype))
            } else {
                push(.global("\(module).\(name)"))
            }
        case UInt8(ascii: "R"): try reduce()
        case UInt8(ascii: "b"): try build()
        case UInt8(ascii: "Q"): try persistent()
        default: throw problem("opcode 0x\(String(code, radix: 16)) is not of a state of plain values and tensors")
        }
    }

    private mutating func long() throws(Problem) -> Int64 {
        let digits = try read(Int(try byte()))
        guard digits.count <= 8 else { throw problem("an integer does not fit into 64 bits") }
        var value: Int64 = digits.last.map { $0 >= 0x80 ? -1 : 0 } ?? 0
        for digit in digits.reversed() { value = value << 8 | Int64(digit) }
        return value
    }

    private enum Container { case list, dict }

    // Mutating, so that arguments which take from the stack are evaluated before it is looked at.
    private mutating func fill(_ container: Container, _ items: [Node]) throws(Problem) {
        let node = try top()
        switch (node.kind, container) {
        case (.list, .list): break
        case (.dict, .dict), (.orderedDict, .dict):
            guard items.count.isMultiple(of: 2) else { throw problem("a key has no value") }
        default: throw problem("it fills something that is neither a list nor a dict")
        }
        node.children += items
    }

    private mutating func recall(_ number: Int) throws(Problem) {
        guard let node = memo[number] else { throw problem("it names a value that is not there") }
        stack.append(node)
    }

    // MARK: What torch writes

    private mutating func reduce() throws(Problem) {
        let arguments = try pop()
        let callee = try pop()
        guard case .tuple = arguments.kind, case .global(let name) = callee.kind else {
            throw problem("it calls something that is not a function of torch's files")
        }
        let items = arguments.children
        switch name {
        case "collections.OrderedDict":
            guard items.isEmpty else { throw problem("an OrderedDict is made of something") }
            push(.orderedDict)
        case "torch.Size":
            // Of a list, which may grow later, each would be a copy.
            guard items.count == 1, case .tuple = items[0].kind else {
                throw problem("a torch.Size is not made of one tuple")
            }
            push(.tuple, items[0].children)
        case "_codecs.encode":
            guard items.count == 2, case .value(.string(let text)) = items[0].kind else {
                throw problem("bytes are not made of a text")
            }
            try countMade(text.utf8.count)
            var bytes: [UInt8] = []
            for scalar in text.unicodeScalars {
                guard scalar.value < 256 else { throw problem("bytes are made of a text that is not Latin-1") }
                bytes.append(UInt8(scalar.value))
            }
            push(.value(.bytes(bytes)))
        case "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3":
            push(.value(.tensor(try tensor(items, isNew: name.hasSuffix("v3")))))
        case "torch._utils._rebuild_parameter":
            guard items.count == 3, case .value(.tensor(var tensor)) = items[0].kind,
                case .value(.bool(let requiresGrad)) = items[1].kind
            else { throw problem("a Parameter is not made of a tensor") }
            tensor.isParameter = true
            tensor.requiresGrad = requiresGrad
            push(.value(.tensor(tensor)))
        default:
            throw problem(
                "it holds a \(name), which this library does not make: load the file with torch, or save plain values")
        }
    }

    /// Reads and drops the attributes of an OrderedDict. `Module.state_dict()` sets `_metadata`, which holds versions
    /// of modules and no values.
    private mutating func build() throws(Problem) {
        _ = try pop()
        guard case .orderedDict = try top().kind else {
            throw problem("it gives attributes to something else than an OrderedDict")
        }
    }

    private mutating func persistent() throws(Problem) {
        let items = try pop().children
        guard items.count == 5, case .value(.string("storage")) = items[0].kind,
            case .global(let kind) = items[1].kind, case .value(.string(let key)) = items[2].kind,
            case .value(.int(let count)) = items[4].kind, let count = Int(exactly: count)
        else { throw problem("it names a storage in words that torch does not write") }
        let untyped = kind == "torch.storage.UntypedStorage"
        let dtype = DType.allCases.first { $0.storageClass.map { "torch.\($0)" } == kind }
        guard untyped || dtype != nil else { throw problem("\(kind) is no storage that this library knows") }
        guard let found = storages[key] ?? storage(key) else { throw problem("the storage \(key) is missing") }
        storages[key] = found
        let (byteCount, overflow) = count.multipliedReportingOverflow(by: dtype?.byteCount ?? 1)
        guard !overflow, byteCount == found.byteCount else {
            throw problem("the storage \(key) has \(found.byteCount) bytes, and \(count) elements are wanted")
        }
        push(.storage(found, dtype, count: count))
    }

    private mutating func tensor(_ items: [Node], isNew: Bool) throws(Problem) -> Tensor {
        if items.count > 3 { try countMade(items[2].children.count + items[3].children.count) }
        guard items.count >= (isNew ? 7 : 6), case .storage(let storage, let ofStorage, _) = items[0].kind,
            case .value(.int(let offset)) = items[1].kind, let offset = Int(exactly: offset),
            let shape = sizes(items[2]), let strides = sizes(items[3]),
            case .value(.bool(let requiresGrad)) = items[4].kind
        else { throw problem("a tensor is made of something else than a storage and sizes") }
        try checkBits(items.dropFirst(isNew ? 7 : 6).first)
        var dtype = ofStorage
        if isNew, case .dtype(let named) = items[6].kind { dtype = named }
        guard let dtype else { throw problem("a tensor has no type") }
        let tensor = Tensor(
            storage, dtype: dtype, shape: shape, strides: strides, offset: offset, requiresGrad: requiresGrad)
        do throws(NoetherWriterError) { try tensor.validate() } catch { throw problem("\(error)") }
        return tensor
    }

    /// torch says beside a view that `conj()` or `neg()` has made, as a view of a conjugate's `imag` is, that the bytes
    /// of its storage are not its values (torch/_utils.py, `get_tensor_metadata`).
    private func checkBits(_ metadata: Node?) throws(Problem) {
        guard let metadata, !metadata.children.isEmpty else { return }
        throw problem(
            "it holds a tensor that is not yet conjugated or negated, which this library does not do: call "
                + "resolve_conj() or resolve_neg() before torch.save")
    }

    private func sizes(_ node: Node) -> [Int]? {
        guard case .tuple = node.kind else { return nil }
        var sizes: [Int] = []
        for child in node.children {
            guard case .value(.int(let size)) = child.kind, let size = Int(exactly: size) else { return nil }
            sizes.append(size)
        }
        return sizes
    }

    /// What is copied for a value counts too: a few bytes can ask for it again and again.
    private mutating func countMade(_ more: Int) throws(Problem) {
        count += more
        guard count <= Self.valuesPerByte * bytes.count else { throw problem("it makes too much of too few bytes") }
    }

    // MARK: The value

    private mutating func value(_ node: Node, level: Int) throws(Problem) -> StateValue {
        count += 1
        guard level <= Self.levels, count <= Self.valuesPerByte * bytes.count else {
            throw problem("it is nested deeper than \(Self.levels) levels, or in itself, or has too many values")
        }
        switch node.kind {
        case .value(let value): return value
        case .list: return .list(try values(node, level))
        case .tuple: return .tuple(try values(node, level))
        case .dict: return .dict(try pairs(node, level))
        case .orderedDict: return .orderedDict(try pairs(node, level))
        case .dtype(let dtype):
            throw problem("it holds torch.\(dtype.rawValue) as a value, which this library does not make")
        case .global(let name): throw problem("it holds \(name), which this library does not make")
        case .storage: throw problem("it holds a storage without a tensor")
        case .mark: throw problem("a mark is left over")
        }
    }

    private mutating func values(_ node: Node, _ level: Int) throws(Problem) -> [StateValue] {
        var values: [StateValue] = []
        values.reserveCapacity(node.children.count)
        for child in node.children { values.append(try value(child, level: level + 1)) }
        return values
    }

    private mutating func pairs(_ node: Node, _ level: Int) throws(Problem) -> [(key: StateValue, value: StateValue)] {
        var pairs: [(key: StateValue, value: StateValue)] = []
        var places: [DictKey: Int] = [:]
        for index in stride(from: 0, to: node.children.count, by: 2) {
            let key = try value(node.children[index], level: level + 1)
            let item = try value(node.children[index + 1], level: level + 1)
            guard key.isHashable(level: level) else { throw problem("a list or a dict is a key of a dict") }
            // As in Python's dict: a key that comes again keeps its place, and gets the later value.
            if let known = DictKey(key) {
                if let place = places[known] {
                    pairs[place].value = item
                    continue
                }
                places[known] = pairs.count
            }
            pairs.append((key, item))
        }
        return pairs
    }
}
