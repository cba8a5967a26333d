// SPDX-License-Identifier: Apache-2.0
internal import TorchFile

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

/// A value's pickle, and the storages it names: `data/0` is the first one met.
struct StatePickle {
    private(set) var storages: [TensorStorage] = []
    private var numbers: [ObjectIdentifier: Int] = [:]
    private var dtypes: [ObjectIdentifier: DType] = [:]
    private var writer = PickleWriter()

    var bytes: [UInt8] { writer.bytes }

    /// - Throws: `ClientError.unsupportedValue`: a tensor that does not fit its storage, one storage under two types.
    init(_ value: StateValue) throws(ClientError) {
        writer.proto()
        try write(value)
        writer.stop()
    }

    private mutating func write(_ value: StateValue) throws(ClientError) {
        switch value {
        case .none: writer.none()
        case .bool(let value): writer.bool(value)
        case .int(let value): writer.int(value)
        case .float(let value): writer.float(bitPattern: value.bitPattern)
        case .string(let value): writer.string(value)
        case .bytes(let bytes):
            // Protocol 2 has no bytes: Latin-1 text, encoded on loading (CPython, Modules/_pickle.c, save_bytes).
            writer.global("_codecs", "encode")
            writer.mark()
            writer.string(String(String.UnicodeScalarView(bytes.map { Unicode.Scalar($0) })))
            writer.string("latin1")
            writer.tuple()
            writer.reduce()
        case .list(let values):
            writer.emptyList()
            writer.mark()
            for value in values { try write(value) }
            writer.appends()
        case .tuple(let values):
            if values.isEmpty { return writer.emptyTuple() }
            writer.mark()
            for value in values { try write(value) }
            writer.tuple()
        case .dict(let pairs):
            writer.emptyDict()
            try write(pairs)
        case .orderedDict(let pairs):
            emptyOrderedDict()
            try write(pairs)
        case .tensor(let tensor): try write(tensor)
        }
    }

    private mutating func write(_ pairs: [(key: StateValue, value: StateValue)]) throws(ClientError) {
        writer.mark()
        for pair in pairs {
            try write(pair.key)
            try write(pair.value)
        }
        writer.setItems()
    }

    private mutating func emptyOrderedDict() {
        writer.global("collections", "OrderedDict")
        writer.emptyTuple()
        writer.reduce()
    }

    /// As torch/_tensor.py, `_reduce_ex_internal`, at 2.13.
    private mutating func write(_ tensor: Tensor) throws(ClientError) {
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

    private mutating func writeStorage(_ tensor: Tensor) throws(ClientError) {
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
