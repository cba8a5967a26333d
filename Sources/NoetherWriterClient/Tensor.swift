// SPDX-License-Identifier: Apache-2.0
/// Tensors as a checkpoint holds them: bytes, and how they are looked at. This library computes nothing with them.

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

/// A flat run of bytes that one or more tensors look at. Two tensors with the same `TensorStorage` share it in the file
/// too, as tied weights do.
public final class TensorStorage: @unchecked Sendable {
    // Unchecked: the bytes are read only inside `save`, which the caller makes while nothing writes to them, as with
    // any tensor of a training loop.
    let bytes: UnsafeRawBufferPointer
    private let owner: AnyObject?
    private let isOwned: Bool

    /// Bytes that lie elsewhere. They must stay in place until `save` has returned.
    /// - Parameters:
    ///   - bytes: whole elements.
    ///   - owner: kept alive for as long as this storage.
    public init(borrowing bytes: UnsafeRawBufferPointer, owner: AnyObject? = nil) {
        self.bytes = bytes
        self.owner = owner
        isOwned = false
    }

    /// A copy of the array's elements, in this machine's byte order.
    public init<Element: BitwiseCopyable>(_ elements: [Element]) {
        let copy = UnsafeMutableRawBufferPointer.allocate(
            byteCount: elements.count * MemoryLayout<Element>.stride, alignment: 64)
        elements.withUnsafeBytes { copy.copyMemory(from: $0) }
        bytes = UnsafeRawBufferPointer(copy)
        owner = nil
        isOwned = true
    }

    deinit { if isOwned { bytes.deallocate() } }

    /// Of the whole storage.
    public var byteCount: Int { bytes.count }
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
        self.strides = strides ?? Self.contiguousStrides(shape)
        self.offset = offset
        self.requiresGrad = requiresGrad
        self.isParameter = isParameter
    }

    /// A copy of `elements` as a contiguous tensor.
    public init<Element: BitwiseCopyable>(_ elements: [Element], dtype: DType, shape: [Int]) {
        self.init(TensorStorage(elements), dtype: dtype, shape: shape)
    }

    /// A copy of `elements` as a contiguous tensor of ``DType/float32``.
    public init(_ elements: [Float], shape: [Int]) { self.init(elements, dtype: .float32, shape: shape) }
    /// A copy of `elements` as a contiguous tensor of ``DType/float64``.
    public init(_ elements: [Double], shape: [Int]) { self.init(elements, dtype: .float64, shape: shape) }
    /// A copy of `elements` as a contiguous tensor of ``DType/int64``.
    public init(_ elements: [Int64], shape: [Int]) { self.init(elements, dtype: .int64, shape: shape) }

    static func contiguousStrides(_ shape: [Int]) -> [Int] {
        var strides = [Int](repeating: 1, count: shape.count)
        for index in shape.indices.dropLast().reversed() {
            strides[index] = strides[index + 1] * max(1, shape[index + 1])
        }
        return strides
    }

    /// - Throws: `ClientError.unsupportedValue` if an element would be outside of the storage: torch.load would refuse
    ///   the file later, when the weights are gone.
    func validate() throws(ClientError) {
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
                    + "\(last + 1) elements; its storage of \(storage.byteCount) bytes has "
                    + "\(storage.byteCount / dtype.byteCount)")
        }
    }
}
