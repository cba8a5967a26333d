// SPDX-License-Identifier: Apache-2.0
/// Tensors as a checkpoint holds them: bytes, and how they are looked at. This library computes nothing with them.
internal import Dispatch
internal import Synchronization

/// An element type, by the name that torch gives it.
public enum DType: String, Sendable, CaseIterable {
    /// A truth value of one byte.
    case bool
    /// Unsigned, of 8 bits.
    case uint8
    /// Signed, of 8 bits.
    case int8
    /// Signed, of 16 bits.
    case int16
    /// Signed, of 32 bits.
    case int32
    /// Signed, of 64 bits.
    case int64
    /// Unsigned, of 16 bits.
    case uint16
    /// Unsigned, of 32 bits.
    case uint32
    /// Unsigned, of 64 bits.
    case uint64
    /// IEEE 754 half precision.
    case float16
    /// The upper half of a `float32`.
    case bfloat16
    /// IEEE 754 single precision.
    case float32
    /// IEEE 754 double precision.
    case float64
    /// Two `float16`.
    case complex32
    /// Two `float32`.
    case complex64
    /// Two `float64`.
    case complex128
    /// 8 bits: 4 of exponent, 3 of mantissa, without infinities.
    case float8E4M3FN = "float8_e4m3fn"
    /// 8 bits: 5 of exponent, 2 of mantissa.
    case float8E5M2 = "float8_e5m2"
    /// As `float8E4M3FN`, without a negative zero.
    case float8E4M3FNUZ = "float8_e4m3fnuz"
    /// As `float8E5M2`, without infinities and a negative zero.
    case float8E5M2FNUZ = "float8_e5m2fnuz"
    /// 8 bits of exponent, for scales.
    case float8E8M0FNU = "float8_e8m0fnu"

    /// Bytes of one element.
    public var byteCount: Int {
        switch self {
        case .bool, .uint8, .int8, .float8E4M3FN, .float8E5M2, .float8E4M3FNUZ, .float8E5M2FNUZ,
            .float8E8M0FNU:
            1
        case .int16, .uint16, .float16, .bfloat16: 2
        case .int32, .uint32, .float32, .complex32: 4
        case .int64, .uint64, .float64, .complex64: 8
        case .complex128: 16
        }
    }

    /// The class that torch.save names for a storage of this type; nil for the newer types, which go as untyped
    /// storages with the type beside them (torch/storage.py, `_new_dtypes`).
    var storageClass: String? {
        switch self {
        case .bool: "BoolStorage"
        case .uint8: "ByteStorage"
        case .int8: "CharStorage"
        case .int16: "ShortStorage"
        case .int32: "IntStorage"
        case .int64: "LongStorage"
        case .float16: "HalfStorage"
        case .bfloat16: "BFloat16Storage"
        case .float32: "FloatStorage"
        case .float64: "DoubleStorage"
        case .complex64: "ComplexFloatStorage"
        case .complex128: "ComplexDoubleStorage"
        default: nil
        }
    }
}

/// A type of Swift that is a ``DType`` as it lies in memory.
public protocol TensorElement: BitwiseCopyable, Sendable {
    /// As torch calls it.
    static var dtype: DType { get }
}

extension Bool: TensorElement { public static var dtype: DType { .bool } }
extension UInt8: TensorElement { public static var dtype: DType { .uint8 } }
extension UInt16: TensorElement { public static var dtype: DType { .uint16 } }
extension UInt32: TensorElement { public static var dtype: DType { .uint32 } }
extension UInt64: TensorElement { public static var dtype: DType { .uint64 } }
extension Int8: TensorElement { public static var dtype: DType { .int8 } }
extension Int16: TensorElement { public static var dtype: DType { .int16 } }
extension Int32: TensorElement { public static var dtype: DType { .int32 } }
extension Int64: TensorElement { public static var dtype: DType { .int64 } }
extension Int: TensorElement { public static var dtype: DType { .int64 } }
extension Float: TensorElement { public static var dtype: DType { .float32 } }
extension Double: TensorElement { public static var dtype: DType { .float64 } }
#if !((os(macOS) || targetEnvironment(macCatalyst)) && arch(x86_64))
    extension Float16: TensorElement { public static var dtype: DType { .float16 } }
#endif

/// A flat run of bytes that one or more tensors look at. Two tensors with the same `TensorStorage` share it in the file
/// too, as tied weights do.
public final class TensorStorage: @unchecked Sendable {
    // Unchecked: the bytes are read only inside `save`, which the caller makes while nothing writes to them, as with
    // any tensor of a training loop.
    private let memory: UnsafeRawBufferPointer
    private let owner: AnyObject?
    private let isOwned: Bool
    /// The state of a storage that borrows memory for the time of a closure.
    private let loan = Mutex(Loan())

    private struct Loan {
        /// That time has ended.
        var isOver = false
        var readers = 0
        /// Tells the closure's end that the last of them is done.
        var isRead: DispatchSemaphore?
    }

    /// What is wrong with it, or nil.
    var problem: String? { loan.withLock { $0.isOver } ? Self.isOverWords : nil }

    private static let isOverWords = "a tensor's memory was borrowed for the time of a closure, which has ended"

    /// The bytes, which stay in place until `endReading`: a closure that has lent them ends only then.
    func beginReading() throws(NoetherWriterError) -> UnsafeRawBufferPointer {
        let isOver = loan.withLock { loan in
            if !loan.isOver { loan.readers += 1 }
            return loan.isOver
        }
        if isOver { throw .unsupportedValue("\(Self.isOverWords): nothing was saved") }
        return memory
    }

    func endReading() {
        loan.withLock { loan in
            loan.readers -= 1
            return loan.readers == 0 ? loan.isRead : nil
        }?.signal()
    }

    /// The loan ends. Another thread may be reading, to which a task has taken the tensor: it is waited for.
    private func takeBack() {
        let isRead = loan.withLock { loan -> DispatchSemaphore? in
            loan.isOver = true
            if loan.readers > 0 { loan.isRead = DispatchSemaphore(value: 0) }
            return loan.isRead
        }
        isRead?.wait()
    }

    func reading<Result: ~Copyable>(
        _ body: (UnsafeRawBufferPointer) throws(NoetherWriterError) -> Result
    ) throws(NoetherWriterError) -> Result {
        let bytes = try beginReading()
        defer { endReading() }
        return try body(bytes)
    }

    private init(_ memory: UnsafeRawBufferPointer, owner: AnyObject?, isOwned: Bool) {
        self.memory = memory
        self.owner = owner
        self.isOwned = isOwned
    }

    /// Bytes that lie elsewhere. They must stay in place until `save` has returned.
    /// - Parameters:
    ///   - bytes: whole elements.
    ///   - owner: kept alive for as long as this storage.
    public convenience init(borrowing bytes: UnsafeRawBufferPointer, owner: AnyObject? = nil) {
        self.init(bytes, owner: owner, isOwned: false)
    }

    /// Borrows bytes for the time of `body`, without a copy: a storage cannot hold a span, which may not leave its
    /// scope. A tensor of this storage that `body` lets out cannot be saved later: the save throws. If another thread
    /// is reading it at the end of `body`, that is waited for.
    public static func borrowing<Result: ~Copyable, Failure: Error>(
        _ bytes: RawSpan, _ body: (TensorStorage) throws(Failure) -> Result
    ) throws(Failure) -> Result {
        try bytes.withUnsafeBytes { (pointer) throws(Failure) in
            let storage = TensorStorage(borrowing: pointer)
            defer { storage.takeBack() }
            return try body(storage)
        }
    }

    /// A copy of the array's elements, in this machine's byte order.
    public convenience init<Element: BitwiseCopyable>(_ elements: [Element]) {
        self.init(elements.withUnsafeBytes { MemoryCopy.copy(of: $0) }, owner: nil, isOwned: true)
    }

    /// A copy of bytes that lie elsewhere.
    public convenience init(copying bytes: RawSpan) {
        self.init(bytes.withUnsafeBytes { MemoryCopy.copy(of: $0) }, owner: nil, isOwned: true)
    }

    deinit { if isOwned { memory.deallocate() } }

    /// Of the whole storage.
    public var byteCount: Int { memory.count }

    /// Calls `body` with the bytes of the storage, which stay in place for that time.
    public func withUnsafeBytes<Result: ~Copyable, Failure: Error>(
        _ body: (UnsafeRawBufferPointer) throws(Failure) -> Result
    ) throws(Failure) -> Result {
        // Empty if they were borrowed and the time is over.
        guard let bytes = try? beginReading() else { return try body(UnsafeRawBufferPointer(start: nil, count: 0)) }
        defer { endReading() }
        return try body(bytes)
    }
}

/// A view of a storage.
public struct Tensor: Sendable {
    /// What it looks at.
    public var storage: TensorStorage
    /// Of its elements.
    public var dtype: DType
    /// In elements; [] is a tensor of one element without dimensions.
    public var shape: [Int]
    /// In elements, one a dimension.
    public var strides: [Int]
    /// Of the first element, in elements.
    public var offset: Int
    /// As torch's `requires_grad`.
    public var requiresGrad: Bool
    /// Loaded as a torch.nn.Parameter.
    public var isParameter: Bool
    /// What was wrong when it was made; the save throws it.
    private var problem: String?

    /// - Parameters:
    ///   - storage: what it looks at.
    ///   - dtype: of its elements.
    ///   - shape: in elements.
    ///   - strides: in elements; nil for a contiguous tensor in row-major order.
    ///   - offset: of the first element, in elements.
    ///   - requiresGrad: as torch's `requires_grad`.
    ///   - isParameter: loaded as a torch.nn.Parameter.
    public init(
        _ storage: TensorStorage, dtype: DType, shape: [Int], strides: [Int]? = nil, offset: Int = 0,
        requiresGrad: Bool = false, isParameter: Bool = false
    ) {
        self.storage = storage
        self.dtype = dtype
        self.shape = shape
        let contiguous = strides ?? Self.contiguousStrides(shape)
        self.strides = contiguous ?? Array(repeating: 1, count: shape.count)
        if contiguous == nil { problem = "a tensor of shape \(shape) has more elements than can be counted" }
        self.offset = offset
        self.requiresGrad = requiresGrad
        self.isParameter = isParameter
    }

    /// A copy of `elements` as a contiguous tensor of their own type. Elements that do not fill the shape exactly are
    /// refused by the save.
    public init<Element: TensorElement>(_ elements: [Element], shape: [Int]) {
        self.init(elements, dtype: Element.dtype, shape: shape)
    }

    /// Borrows elements for the time of `body`, as a contiguous tensor, without a copy: a save in `body` copies them
    /// once. A tensor that `body` lets out cannot be saved later: the save throws. Elements that do not fill the shape
    /// exactly are refused by the save.
    public static func borrowing<Element: TensorElement, Result: ~Copyable, Failure: Error>(
        _ elements: Span<Element>, shape: [Int], _ body: (Tensor) throws(Failure) -> Result
    ) throws(Failure) -> Result {
        let problem = Self.problem(of: elements.count, Element.self, Element.dtype, shape)
        return try TensorStorage.borrowing(elements.bytes) { (storage) throws(Failure) in
            var tensor = Tensor(storage, dtype: Element.dtype, shape: shape)
            tensor.problem = tensor.problem ?? problem
            return try body(tensor)
        }
    }

    /// A copy of `elements` as a contiguous tensor of another type: of their bits, if they are unsigned integers of
    /// that size, or of their bytes. Elements that do not fill the shape exactly, or that are no bits of `dtype`, are
    /// refused by the save.
    public init<Element: BitwiseCopyable>(_ elements: [Element], dtype: DType, shape: [Int]) {
        self.init(TensorStorage(elements), dtype: dtype, shape: shape)
        problem = problem ?? Self.problem(of: elements.count, Element.self, dtype, shape)
    }

    private static func problem<Element>(
        of elementCount: Int, _: Element.Type, _ dtype: DType, _ shape: [Int]
    ) -> String? {
        let size = MemoryLayout<Element>.stride
        let isBytes = Element.self == UInt8.self
        let known = (Element.self as? any TensorElement.Type)?.dtype
        let isBits = known.map { $0 == dtype || Element.self is any UnsignedInteger.Type } ?? true
        guard isBytes || size == dtype.byteCount && isBits else {
            return "elements of type \(Element.self) are no \(dtype.rawValue)"
        }
        let perElement = isBytes ? dtype.byteCount : 1
        guard let wanted = count(shape).map({ $0.multipliedReportingOverflow(by: perElement) }), !wanted.overflow,
            wanted.partialValue == elementCount
        else {
            let found = elementCount / perElement
            return "\(found) element\(found == 1 ? "" : "s") of type \(dtype.rawValue) do not fill the shape "
                + "\(shape)\(count(shape).map { ", which has \($0)" } ?? "")"
        }
        return nil
    }

    /// How many elements a shape has; nil if it is no shape, or they can't be counted.
    private static func count(_ shape: [Int]) -> Int? {
        guard shape.allSatisfy({ $0 >= 0 }) else { return nil }
        if shape.contains(0) { return 0 }
        var count = 1
        for size in shape {
            let (product, overflow) = count.multipliedReportingOverflow(by: size)
            if overflow { return nil }
            count = product
        }
        return count
    }

    /// nil if they can't be counted.
    static func contiguousStrides(_ shape: [Int]) -> [Int]? {
        var strides = [Int](repeating: 1, count: shape.count)
        for index in shape.indices.dropLast().reversed() {
            let (stride, overflow) = strides[index + 1].multipliedReportingOverflow(by: max(1, shape[index + 1]))
            if overflow { return nil }
            strides[index] = stride
        }
        return strides
    }

    /// - Throws: `NoetherWriterError.unsupportedValue` if an element would lie outside the storage: torch.load would
    ///   refuse the file later, when the weights are gone.
    func validate() throws(NoetherWriterError) {
        if let problem = problem ?? storage.problem { throw .unsupportedValue("\(problem): nothing was saved") }
        guard shape.count == strides.count, shape.allSatisfy({ $0 >= 0 }), strides.allSatisfy({ $0 >= 0 }),
            offset >= 0
        else {
            throw .unsupportedValue(
                "a tensor of shape \(shape) with strides \(strides) and offset \(offset): one stride a dimension, "
                    + "none negative, is wanted")
        }
        guard storage.byteCount.isMultiple(of: dtype.byteCount) else {
            throw .unsupportedValue(
                "a storage of \(storage.byteCount) bytes is no whole number of \(dtype.rawValue)")
        }
        guard Self.count(shape) != nil else {
            throw .unsupportedValue("a tensor of shape \(shape) has more elements than can be counted")
        }
        if shape.contains(0) { return }
        var last = offset
        for (size, stride) in zip(shape, strides) {
            let (reach, overflow) = (size - 1).multipliedReportingOverflow(by: stride)
            let (sum, overflow2) = last.addingReportingOverflow(reach)
            guard !overflow, !overflow2 else {
                throw .unsupportedValue("a tensor of shape \(shape) overflows")
            }
            last = sum
        }
        guard last < storage.byteCount / dtype.byteCount else {
            throw .unsupportedValue(
                "a \(dtype.rawValue) tensor of shape \(shape), strides \(strides), offset \(offset) needs "
                    + "\(UInt(last) + 1) elements; its storage of \(storage.byteCount) bytes has "
                    + "\(storage.byteCount / dtype.byteCount)")
        }
    }
}
