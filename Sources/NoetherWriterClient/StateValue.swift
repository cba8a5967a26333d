// SPDX-License-Identifier: Apache-2.0
internal import Synchronization
internal import TorchFile
internal import Wire

/// What a checkpoint holds: a tree of Python values with tensors in it, which torch.load gives back.
public indirect enum StateValue: Sendable {
    /// Python's None.
    case none
    /// Python's bool.
    case bool(Bool)
    /// Python's int.
    case int(Int64)
    /// Python's float.
    case float(Double)
    /// Python's str.
    case string(String)
    /// Python's bytes.
    case bytes([UInt8])
    /// Python's list.
    case list([StateValue])
    /// Python's tuple.
    case tuple([StateValue])
    /// Python's dict: in order, as Python's dicts are.
    case dict([(key: StateValue, value: StateValue)])
    /// A collections.OrderedDict, as `Module.state_dict()` is.
    case orderedDict([(key: StateValue, value: StateValue)])
    /// A torch.Tensor, or a torch.nn.Parameter.
    case tensor(Tensor)

    /// `state_dict` of named buffers, in order.
    public static func stateDict(_ tensors: KeyValuePairs<String, Tensor>) -> StateValue {
        .orderedDict(tensors.map { (.string($0.key), .tensor($0.value)) })
    }
}

extension StateValue: ExpressibleByStringLiteral, ExpressibleByIntegerLiteral, ExpressibleByFloatLiteral,
    ExpressibleByBooleanLiteral, ExpressibleByNilLiteral, ExpressibleByArrayLiteral,
    ExpressibleByDictionaryLiteral
{
    public init(stringLiteral value: String) { self = .string(value) }
    public init(integerLiteral value: Int64) { self = .int(value) }
    public init(floatLiteral value: Double) { self = .float(value) }
    public init(booleanLiteral value: Bool) { self = .bool(value) }
    public init(nilLiteral: ()) { self = .none }
    public init(arrayLiteral elements: StateValue...) { self = .list(elements) }
    public init(dictionaryLiteral elements: (StateValue, StateValue)...) {
        self = .dict(elements.map { (key: $0.0, value: $0.1) })
    }
}

extension StateValue {
    /// Whether Python takes it as a key of a dict.
    func isHashable(level: Int) -> Bool {
        switch self {
        case .list, .dict, .orderedDict: false
        // What is nested too deep is found out when it is written.
        case .tuple(let values): level > 1000 || values.allSatisfy { $0.isHashable(level: level + 1) }
        default: true
        }
    }

    /// `state_dict` of named tensors, in their order.
    // A literal must not become a Dictionary, which has no order.
    @_disfavoredOverload
    public static func stateDict(_ tensors: some Sequence<(key: String, value: Tensor)>) -> StateValue {
        .orderedDict(tensors.map { (.string($0.key), .tensor($0.value)) })
    }
}

/// A key of a dict as Python compares keys: 1, 1.0 and True are one.
enum DictKey: Hashable {
    case none
    case int(Int64)
    case float(Double)
    case string(ByteName)
    case bytes([UInt8])
    case tuple([DictKey])

    /// nil if no other key is the same: a tensor, or NaN. What can't be a key, or is nested too deep, is refused
    /// elsewhere.
    init?(_ value: StateValue, level: Int = 0) {
        switch value {
        case .none: self = .none
        case .bool(let truth): self = .int(truth ? 1 : 0)
        case .int(let number): self = .int(number)
        case .float(let number):
            if number.isNaN { return nil }
            self = Int64(exactly: number).map { .int($0) } ?? .float(number)
        case .string(let text): self = .string(ByteName(text))
        case .bytes(let bytes): self = .bytes(bytes)
        case .tuple(let values):
            guard level <= 1000 else { return nil }
            var keys: [DictKey] = []
            for value in values {
                guard let key = DictKey(value, level: level + 1) else { return nil }
                keys.append(key)
            }
            self = .tuple(keys)
        case .list, .dict, .orderedDict, .tensor: return nil
        }
    }

    /// In messages.
    var words: String {
        switch self {
        case .none: "None"
        case .int(let number): "\(number)"
        case .float(let number): "\(number)"
        case .string(let key): key.text.debugDescription
        case .bytes(let bytes): "of \(bytes.count) bytes"
        case .tuple(let keys): "that is a tuple of \(keys.count)"
        }
    }
}

/// A value's pickle, and the storages it names: `data/0` is the first one met.
struct StatePickle {
    private(set) var storages: [TensorStorage] = []
    private var numbers: [ObjectIdentifier: Int] = [:]
    private var dtypes: [ObjectIdentifier: DType] = [:]
    private var writer = PickleWriter()
    private var isTooDeep = false

    var bytes: [UInt8] { writer.bytes }

    /// Deeper ones torch.save refuses too (a RecursionError), and writing them would overflow a stack.
    private static let levels = 1000
    /// What was too deep to be saved. Swift lets go of a value level by level, each one deeper in the stack: a program
    /// that has just been told what is wrong with its state would end without a word when it lets go of 200,000 levels.
    private static let tooDeep = Mutex<[StateValue]>([])
    private static let tooDeepCount = 64

    /// A bounded number of them, since they are never freed.
    private static func keepForever(_ value: StateValue) {
        tooDeep.withLock { if $0.count < tooDeepCount { $0.append(value) } }
    }

    /// The longest text that is written into a pickle, in bytes.
    private static let textByteCount = 1 << 30

    /// - Throws: `NoetherWriterError.unsupportedValue`: a tensor that does not fit its storage, one storage under two
    /// types,
    ///   what can't be a key, a key that comes twice, what is nested too deep.
    init(_ value: StateValue) throws(NoetherWriterError) {
        writer.proto()
        do throws(NoetherWriterError) { try write(value, level: 0) } catch {
            if isTooDeep { Self.keepForever(value) }
            throw error
        }
        writer.stop()
    }

    private mutating func write(_ value: StateValue, level: Int) throws(NoetherWriterError) {
        guard level <= Self.levels else {
            isTooDeep = true
            throw .unsupportedValue("the state is nested deeper than \(Self.levels) levels: nothing was saved")
        }
        switch value {
        case .none: writer.none()
        case .bool(let value): writer.bool(value)
        case .int(let value): writer.int(value)
        case .float(let value): writer.float(bitPattern: value.bitPattern)
        case .string(let value): try write(value)
        case .bytes(let bytes):
            // Protocol 2 has no bytes: Latin-1 text, encoded on loading (CPython, Modules/_pickle.c, save_bytes).
            writer.global("_codecs", "encode")
            writer.mark()
            try write(String(String.UnicodeScalarView(bytes.map { Unicode.Scalar($0) })))
            writer.string("latin1")
            writer.tuple()
            writer.reduce()
        case .list(let values):
            writer.emptyList()
            writer.mark()
            for value in values { try write(value, level: level + 1) }
            writer.appends()
        case .tuple(let values):
            if values.isEmpty { return writer.emptyTuple() }
            writer.mark()
            for value in values { try write(value, level: level + 1) }
            writer.tuple()
        case .dict(let pairs):
            writer.emptyDict()
            try write(pairs, level: level)
        case .orderedDict(let pairs):
            emptyOrderedDict()
            try write(pairs, level: level)
        case .tensor(let tensor): try write(tensor)
        }
    }

    private mutating func write(_ text: String) throws(NoetherWriterError) {
        guard text.utf8.count <= Self.textByteCount else {
            throw .unsupportedValue(
                "a text of \(text.utf8.count) bytes; at most \(Self.textByteCount): save it as a tensor of bytes")
        }
        writer.string(text)
    }

    private mutating func write(
        _ pairs: [(key: StateValue, value: StateValue)], level: Int
    ) throws(NoetherWriterError) {
        writer.mark()
        var seen: Set<DictKey> = []
        for pair in pairs {
            guard pair.key.isHashable(level: level) else {
                throw .unsupportedValue("a list or a dict can't be a key of a dict in Python: nothing was saved")
            }
            // Python's dict would hold the last one only.
            if let key = DictKey(pair.key), !seen.insert(key).inserted {
                throw .unsupportedValue("the key \(key.words) is twice in a dict: nothing was saved")
            }
            try write(pair.key, level: level + 1)
            try write(pair.value, level: level + 1)
        }
        writer.setItems()
    }

    private mutating func emptyOrderedDict() {
        writer.global("collections", "OrderedDict")
        writer.emptyTuple()
        writer.reduce()
    }

    /// As torch/_tensor.py, `_reduce_ex_internal`, at 2.13.
    private mutating func write(_ tensor: Tensor) throws(NoetherWriterError) {
        try tensor.validate()
        if tensor.isParameter {
            writer.global("torch._utils", "_rebuild_parameter")
            writer.mark()
        }
        let isNew = tensor.dtype.storageClass == nil
        writer.global("torch._utils", isNew ? "_rebuild_tensor_v3" : "_rebuild_tensor_v2")
        writer.mark()
        try writeStorage(tensor)
        writer.int(Int64(tensor.offset))
        writeSizes(tensor.shape)
        writeSizes(tensor.strides)
        writer.bool(tensor.requiresGrad && !tensor.isParameter)
        emptyOrderedDict()
        if isNew { writer.global("torch", tensor.dtype.rawValue) }
        writer.tuple()
        writer.reduce()
        if tensor.isParameter {
            writer.bool(tensor.requiresGrad)
            emptyOrderedDict()
            writer.tuple()
            writer.reduce()
        }
    }

    private mutating func writeStorage(_ tensor: Tensor) throws(NoetherWriterError) {
        let identity = ObjectIdentifier(tensor.storage)
        if let known = dtypes[identity], known != tensor.dtype {
            throw .unsupportedValue(
                "one storage is viewed as \(known.rawValue) and as \(tensor.dtype.rawValue); torch files hold one "
                    + "type a storage")
        }
        dtypes[identity] = tensor.dtype
        let number = numbers[identity] ?? storages.count
        if number == storages.count {
            numbers[identity] = number
            storages.append(tensor.storage)
        }
        writer.mark()
        writer.string("storage")
        if let storageClass = tensor.dtype.storageClass {
            writer.global("torch", storageClass)
        } else {
            writer.global("torch.storage", "UntypedStorage")
        }
        writer.string(String(number))
        writer.string("cpu")
        // An untyped storage counts bytes.
        let unit = tensor.dtype.storageClass == nil ? 1 : tensor.dtype.byteCount
        writer.int(Int64(tensor.storage.byteCount / unit))
        writer.tuple()
        writer.binPersistentID()
    }

    private mutating func writeSizes(_ sizes: [Int]) {
        if sizes.isEmpty { return writer.emptyTuple() }
        writer.mark()
        for size in sizes { writer.int(Int64(size)) }
        writer.tuple()
    }
}
