// SPDX-License-Identifier: Apache-2.0
/// What was written, read again without a daemon and without torch: a trainer in Swift resumes.
internal import Posix
internal import RunFiles
internal import TorchFile

extension Checkpoint {
    /// Loads a checkpoint that this library, the Python library or torch.save has written: plain values and tensors, as
    /// a state dict holds them. Nothing in the file is executed. The tensors' bytes stay in the mapped file until they
    /// are read; a save that replaces the file leaves them as they are.
    /// - Parameters:
    ///   - path: of the file.
    ///   - verify: whether the checksum of every record is compared first, which reads the whole file.
    /// - Throws: ``NoetherWriterError/storage(path:message:errno:)`` if there is no such file, or it is broken, or it
    ///   holds something else.
    public static func load(_ path: String, verify: Bool = false) throws(NoetherWriterError) -> StateValue {
        try load(path, from: path, verify: verify)
    }

    /// - Parameter place: what is read: the path, or another file with the same bytes.
    static func load(_ path: String, from place: String, verify: Bool) throws(NoetherWriterError) -> StateValue {
        let file: MappedFile
        do throws(PosixError) { file = try MappedFile(place) } catch {
            throw .storage(path: path, message: "\(error)", errno: error.errno)
        }
        do {
            let records = try ArchiveVerifier(file.bytes).records(checksSums: verify)
            func bytes(_ name: String) -> UnsafeRawBufferPointer? {
                records[name].map {
                    UnsafeRawBufferPointer(rebasing: file.bytes[Int($0.lowerBound)..<Int($0.upperBound)])
                }
            }
            if let order = bytes("byteorder"), !order.elementsEqual("little".utf8) {
                throw StateReader.Problem(description: "its bytes are not in little-endian order")
            }
            guard let pickle = bytes("data.pkl") else {
                throw StateReader.Problem(description: "data.pkl is missing")
            }
            let owner = Mapping(file)
            var reader = StateReader(pickle) { name in
                bytes("data/\(name)").map { TensorStorage(borrowing: $0, owner: owner) }
            }
            return try reader.read()
        } catch {
            throw .storage(
                path: path, message: "\(path) can't be loaded: \(error)",
                errno: PosixError.inputOutput(path).errno)
        }
    }

    /// Keeps a file mapped for as long as a tensor looks at it.
    private final class Mapping {
        let file: MappedFile
        init(_ file: MappedFile) { self.file = file }
    }
}

extension StateValue {
    /// The value that a dict holds under a text key. It is nil if this is not a dict, or if the dict has no such key.
    public subscript(_ key: String) -> StateValue? {
        guard case .dict(let pairs) = self else {
            guard case .orderedDict(let pairs) = self else { return nil }
            return Self.value(key, pairs)
        }
        return Self.value(key, pairs)
    }

    private static func value(_ key: String, _ pairs: [(key: StateValue, value: StateValue)]) -> StateValue? {
        pairs.first { pair in
            if case .string(let name) = pair.key { name.utf8.elementsEqual(key.utf8) } else { false }
        }?.value
    }

    /// The tensor, if it is one.
    public var tensorValue: Tensor? { if case .tensor(let tensor) = self { tensor } else { nil } }
    /// The integer, if it is one.
    public var intValue: Int64? { if case .int(let number) = self { number } else { nil } }
    /// The number, if it is a float or an integer.
    public var doubleValue: Double? {
        switch self {
        case .float(let number): number
        case .int(let number): Double(number)
        default: nil
        }
    }
    /// The text, if it is one.
    public var stringValue: String? { if case .string(let text) = self { text } else { nil } }
}

extension Tensor {
    /// A copy of the elements, in row-major order, whatever the strides.
    /// - Throws: ``NoetherWriterError/unsupportedValue(_:)`` if they are of another type, or lie outside the storage.
    public func elements<Element: TensorElement>(
        as _: Element.Type = Element.self
    ) throws(NoetherWriterError) -> [Element] {
        guard Element.dtype == dtype else {
            throw .unsupportedValue("the tensor holds \(dtype.rawValue), and \(Element.dtype.rawValue) is wanted")
        }
        try validate()
        if shape.contains(0) { return [] }
        let size = MemoryLayout<Element>.size
        let count = shape.reduce(1, *)
        // A stride of 0 makes any number of elements of one.
        let (byteCount, overflow) = count.multipliedReportingOverflow(by: size)
        guard !overflow, byteCount <= ThisProcess.physicalMemoryByteCount else {
            throw .unsupportedValue(
                "a tensor of shape \(shape) has \(count) elements, and this machine has no memory for an array of them; "
                    + "its storage has \(storage.byteCount) bytes")
        }
        let isContiguous = Self.contiguousStrides(shape) == strides
        return try storage.reading { (source) throws(NoetherWriterError) in
            [Element](unsafeUninitializedCapacity: count) { target, initialized in
                if isContiguous {
                    UnsafeMutableRawBufferPointer(target).copyMemory(
                        from: UnsafeRawBufferPointer(rebasing: source[offset * size..<(offset + count) * size]))
                } else {
                    var walk = Walk(self)
                    for element in 0..<count {
                        target.initializeElement(
                            at: element,
                            to: source.loadUnaligned(fromByteOffset: walk.place * size, as: Element.self))
                        walk.advance()
                    }
                }
                initialized = count
            }
        }
    }
}

/// Goes through a tensor's elements in row-major order.
private struct Walk {
    let shape: [Int]
    let strides: [Int]
    /// The position of the element, counted in elements of the storage.
    private(set) var place: Int
    private var index: [Int]

    /// - Parameter dimensions: so many, from the first; nil: all.
    init(_ tensor: Tensor, dimensions: Int? = nil) {
        shape = Array(tensor.shape.prefix(dimensions ?? tensor.shape.count))
        strides = tensor.strides
        place = tensor.offset
        index = Array(repeating: 0, count: shape.count)
    }

    /// - Returns: whether there was a next one.
    @discardableResult
    mutating func advance() -> Bool {
        for dimension in shape.indices.reversed() {
            index[dimension] += 1
            // The stride of a dimension of one element may be anything; what it adds is taken away again.
            place &+= strides[dimension]
            if index[dimension] < shape[dimension] { return true }
            place &-= index[dimension] &* strides[dimension]
            index[dimension] = 0
        }
        return false
    }
}

extension StateValue: Equatable {
    /// Whether torch.load would give the same: the same values in the same order, and tensors of the same type, shape
    /// and elements. NaN differs from itself, as in Python, but not in a tensor, whose bits are compared.
    public static func == (first: StateValue, second: StateValue) -> Bool {
        switch (first, second) {
        case (.none, .none): true
        case (.bool(let a), .bool(let b)): a == b
        case (.int(let a), .int(let b)): a == b
        case (.float(let a), .float(let b)): a == b
        case (.string(let a), .string(let b)): a.utf8.elementsEqual(b.utf8)
        case (.bytes(let a), .bytes(let b)): a == b
        case (.list(let a), .list(let b)), (.tuple(let a), .tuple(let b)): a == b
        case (.dict(let a), .dict(let b)), (.orderedDict(let a), .orderedDict(let b)):
            a.elementsEqual(b) { $0.key == $1.key && $0.value == $1.value }
        case (.tensor(let a), .tensor(let b)): a == b
        default: false
        }
    }
}

extension Tensor: Equatable {
    /// Whether type, shape and the elements' bits are the same, and both are parameters or neither.
    public static func == (first: Tensor, second: Tensor) -> Bool {
        guard first.dtype == second.dtype, first.shape == second.shape,
            first.isParameter == second.isParameter, first.requiresGrad == second.requiresGrad,
            (try? first.validate()) != nil, (try? second.validate()) != nil
        else { return false }
        if first.storage === second.storage, first.offset == second.offset, first.strides == second.strides {
            return true
        }
        return first.hasSameElements(as: second)
    }

    /// Whether the bits of all elements are the same, of tensors of one type and shape.
    private func hasSameElements(as other: Tensor) -> Bool {
        if shape.contains(0) { return true }
        var (first, second) = (self, other)
        // An element that is there many times, in both, is compared once.
        for dimension in shape.indices where strides[dimension] == 0 && other.strides[dimension] == 0 {
            first.shape[dimension] = 1
            second.shape[dimension] = 1
        }
        // The last dimensions, as far as they lie in one piece in both, are compared together.
        var (run, outer) = (1, shape.count)
        while outer > 0,
            first.shape[outer - 1] == 1 || first.strides[outer - 1] == run && second.strides[outer - 1] == run
        {
            outer -= 1
            run *= first.shape[outer]
        }
        let size = dtype.byteCount
        let isSame = try? storage.reading { (bytes) throws(NoetherWriterError) in
            try other.storage.reading { (otherBytes) throws(NoetherWriterError) in
                var (walk, otherWalk) = (Walk(first, dimensions: outer), Walk(second, dimensions: outer))
                repeat {
                    let piece = bytes[walk.place * size..<(walk.place + run) * size]
                    let otherPiece = otherBytes[otherWalk.place * size..<(otherWalk.place + run) * size]
                    if !piece.elementsEqual(otherPiece) { return false }
                    otherWalk.advance()
                } while walk.advance()
                return true
            }
        }
        return isSame ?? false
    }
}

/// The log of a run as its file holds it, without a daemon.
public struct RunLog: Sendable {
    /// All keys, in their order.
    public let keys: [String]
    /// The last update, or nil if nothing was logged.
    public let lastUpdate: Int64?
    private let data: RunLogData

    /// Reads `tracker/entries.th` of a run's directory; a run without one has an empty log. The log of a run that has
    /// not ended is with its daemon: see ``Subscription``.
    /// - Throws: ``NoetherWriterError/storage(path:message:errno:)`` if it is no run's directory, or its log is broken.
    public static func read(_ directory: String) throws(NoetherWriterError) -> RunLog {
        do throws(RunFilesError) { return RunLog(try RunFiles(directory).log()) } catch {
            throw .storage(
                path: directory, message: "\(error)", errno: PosixError.inputOutput(directory).errno)
        }
    }

    private init(_ data: RunLogData) {
        self.data = data
        keys = data.keys
        lastUpdate = data.lastUpdate
    }

    /// A key's values, by ascending updates; empty if it has none.
    public func values(_ key: String) -> [(update: Int64, value: Scalar)] {
        guard let series = data.series(key) else { return [] }
        return zip(series.updates, series.values).map { ($0, Scalar($1)) }
    }
}
