// SPDX-License-Identifier: Apache-2.0
import Dispatch
import Foundation
import Synchronization
import Testing

@testable import NoetherWriterClient

@Suite struct TensorTests {
    @Test(arguments: [
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [2, 4]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [6], offset: 1),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [], offset: .max),
        Tensor(
            TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [2, 2], strides: [5, 2]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [2], strides: [1, 1]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [-1]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [.max, .max]),
        Tensor(TensorStorage([UInt8](repeating: 0, count: 6)), dtype: .float32, shape: [1]),
    ])
    func tensorOutsideItsStorageIsRefused(tensor: Tensor) {
        #expect(throws: NoetherWriterError.self) { try StatePickle(.tensor(tensor)) }
    }

    @Test(arguments: [
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [2, 3]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [100], strides: [0]),
        Tensor(TensorStorage([Float]()), dtype: .float32, shape: [0, 9]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [], offset: 5),
    ])
    func tensorInsideItsStorageIsTaken(tensor: Tensor) throws {
        #expect(try StatePickle(.tensor(tensor)).storages.count == 1)
    }

    @Test func oneStorageIsStoredOnceAndHasOneType() throws {
        let storage = TensorStorage([Float](repeating: 0, count: 6))
        let view = Tensor(storage, dtype: .float32, shape: [6])
        let pickle = try StatePickle(.list([.tensor(view), .tensor(view)]))
        #expect(pickle.storages.count == 1)
        let other = Tensor(storage, dtype: .int32, shape: [6])
        #expect(throws: NoetherWriterError.self) { try StatePickle(.list([.tensor(view), .tensor(other)])) }
    }

    private func refusal(_ value: StateValue) -> String? {
        do throws(NoetherWriterError) {
            _ = try StatePickle(value)
            return nil
        } catch { return error.code == .unsupportedValue ? "\(error)" : "another error" }
    }

    @Test func elementsThatDoNotFillTheShapeAreRefused() {
        let tensor = Tensor([Float](repeating: 0, count: 100), shape: [2])
        #expect(
            refusal(.tensor(tensor))
                == "100 elements of type float32 do not fill the shape [2], which has 2: nothing was saved")
        #expect(refusal(.tensor(Tensor([Float](repeating: 0, count: 1), shape: [2]))) != nil)
        #expect(refusal(.tensor(Tensor([Float](repeating: 0, count: 1), shape: [-1]))) != nil)
        #expect(refusal(.tensor(Tensor([UInt8](repeating: 0, count: 9), dtype: .float32, shape: [2]))) != nil)
        #expect(refusal(.tensor(Tensor([UInt8](repeating: 0, count: 8), dtype: .float32, shape: [2]))) == nil)
    }

    @Test func elementsOfAnotherTypeAreRefused() {
        #expect(
            refusal(.tensor(Tensor([1.5, 2.5] as [Double], dtype: .float32, shape: [2])))
                == "elements of type Double are no float32: nothing was saved")
        #expect(refusal(.tensor(Tensor([1, 2] as [Double], dtype: .int64, shape: [2]))) != nil)
        #expect(refusal(.tensor(Tensor([1, 2] as [Int32], dtype: .float32, shape: [2]))) != nil)
        // Bits.
        #expect(refusal(.tensor(Tensor([1, 2] as [UInt16], dtype: .bfloat16, shape: [2]))) == nil)
    }

    @Test func theTypeIsThatOfTheElements() {
        #expect(Tensor([1, 2], shape: [2]).dtype == .int64)
        #expect(Tensor([1.5, 2], shape: [2]).dtype == .float64)
        #expect(Tensor([Float(1)], shape: [1]).dtype == .float32)
        #expect(Tensor([true], shape: [1]).dtype == .bool)
        #expect(Tensor([Int8(1)], shape: [1]).dtype == .int8)
        #expect(Tensor([Float16(1)], shape: [1]).dtype == .float16)
    }

    @Test(arguments: [[1, .max, .max], [.max, .max, 1], [2, .max], [0, .max, .max]])
    func aShapeThatOverflowsIsRefusedAndTrapsNothing(shape: [Int]) {
        #expect(refusal(.tensor(Tensor([Float](), shape: shape))) != nil)
        let storage = TensorStorage([Float](repeating: 0, count: 6))
        #expect(refusal(.tensor(Tensor(storage, dtype: .float32, shape: shape))) != nil)
    }

    @Test func aViewWhoseElementsCannotBeCountedIsRefused() {
        let storage = TensorStorage([Float](repeating: 0, count: 6))
        let view = Tensor(storage, dtype: .float32, shape: [.max, .max], strides: [0, 0])
        #expect(refusal(.tensor(view)) != nil)
    }

    @Test func aStateThatIsNestedTooDeepIsRefused() {
        func nested(_ levels: Int) -> StateValue {
            (0..<levels).reduce(StateValue.int(1)) { value, _ in .list([value]) }
        }
        #expect(refusal(nested(1000)) == nil)
        #expect(
            refusal(nested(20_000)) == "the state is nested deeper than 1000 levels: nothing was saved")
        let keys = (0..<20_000).reduce(StateValue.int(1)) { value, _ in .tuple([value]) }
        #expect(refusal(.dict([(key: keys, value: .none)])) != nil)
    }

    @Test func whatPythonTakesAsNoKeyIsRefused() {
        #expect(refusal(.dict([(key: .list([]), value: 1)])) != nil)
        #expect(refusal(.dict([(key: .tuple([.dict([])]), value: 1)])) != nil)
        #expect(refusal(["a": 1, "a": 2]) == "the key \"a\" is twice in a dict: nothing was saved")
        #expect(refusal(.stateDict(["w": Tensor([1], shape: [1]), "w": Tensor([2], shape: [1])])) != nil)
    }

    @Test func aCopyOfManyBytesIsOne() {
        let elements = [Float](repeating: 7, count: 3 << 20)
        let storage = TensorStorage(elements)
        #expect(storage.byteCount == 12 << 20)
        storage.withUnsafeBytes { bytes in
            #expect(bytes.withMemoryRebound(to: Float.self) { $0.allSatisfy { $0 == 7 } })
        }
        #expect(elements.span.bytes.byteCount == TensorStorage(copying: elements.span.bytes).byteCount)
    }

    @Test func aSpanIsBorrowedForTheTimeOfAClosure() throws {
        let elements = (0..<6).map { Float($0) }
        let (pickle, escaped) = try Tensor.borrowing(elements.span, shape: [2, 3]) { tensor in
            tensor.storage.withUnsafeBytes { bytes in
                // The same memory, and no copy.
                elements.withUnsafeBytes { #expect($0.baseAddress == bytes.baseAddress) }
            }
            return (try StatePickle(.tensor(tensor)), tensor)
        }
        #expect(pickle.storages.count == 1)
        #expect(throws: NoetherWriterError.self) { try StatePickle(.tensor(escaped)) }
        #expect(throws: NoetherWriterError.self) { try escaped.elements(as: Float.self) }
        #expect(escaped != escaped)
        #expect(throws: NoetherWriterError.self) {
            try Tensor.borrowing(elements.span, shape: [7]) { try StatePickle(.tensor($0)) }
        }
    }

    /// A task that has taken the tensor out of the closure reads what is there, or is refused.
    @Test func aLoanEndsOnlyWhenNobodyReads() {
        let isReading = DispatchSemaphore(value: 0)
        let hasRead = Mutex(false)
        let isDone = DispatchSemaphore(value: 0)
        let elements = [Float](repeating: 1, count: 6)
        Tensor.borrowing(elements.span, shape: [6]) { tensor in
            Thread.detachNewThread {
                tensor.storage.withUnsafeBytes { _ in
                    isReading.signal()
                    // The closure has come to its end.
                    while tensor.storage.problem == nil { sched_yield() }
                    for _ in 0..<1000 { sched_yield() }
                    hasRead.withLock { $0 = true }
                }
                isDone.signal()
            }
            isReading.wait()
        }
        #expect(hasRead.withLock { $0 })
        isDone.wait()
    }

    /// A stride of 0 makes any number of elements of one, and that of a dimension of one element may be anything.
    @Test func noShapeThatFitsItsStorageCrashesAProgram() throws {
        let (one, other) = (TensorStorage([1 as Float]), TensorStorage([2 as Float]))
        for count in [1 << 45, 1 << 61, 1 << 62] {
            let tensor = Tensor(one, dtype: .float32, shape: [count], strides: [0])
            #expect(throws: NoetherWriterError.self) { try tensor.elements(as: Float.self) }
            #expect(tensor == Tensor(TensorStorage([1 as Float]), dtype: .float32, shape: [count], strides: [0]))
            #expect(tensor != Tensor(other, dtype: .float32, shape: [count], strides: [0]))
        }
        let ones = [Int](repeating: 1, count: 1_000_000)
        #expect(Tensor(one, dtype: .float32, shape: ones) != Tensor(other, dtype: .float32, shape: ones))
        let six = TensorStorage((0..<6).map { Float($0) })
        let odd = Tensor(six, dtype: .float32, shape: [1, 2], strides: [.max, 3], offset: 1)
        #expect(try odd.elements() == [1, 4] as [Float])
        #expect(odd == Tensor([1, 4] as [Float], shape: [1, 2]))
        let rows = Tensor(six, dtype: .float32, shape: [2, 2], strides: [3, 1])
        #expect(rows == Tensor([0, 1, 3, 4] as [Float], shape: [2, 2]))
        #expect(rows != Tensor([0, 1, 3, 5] as [Float], shape: [2, 2]))
        let spread = Tensor(six, dtype: .float32, shape: [2, 3], strides: [0, 1])
        #expect(spread == Tensor([0, 1, 2, 0, 1, 2] as [Float], shape: [2, 3]))
        #expect(spread != Tensor([0, 1, 2, 0, 1, 3] as [Float], shape: [2, 3]))
    }

    @Test(
        arguments: [
            [.int(0), .int(0)], [.bool(true), .int(1)], [.float(1), .int(1)], [.float(0.5), .float(0.5)],
            [.float(-0.0), .float(0)], [.none, .none], [.bytes([1]), .bytes([1])],
            [.tuple([1, "x"]), .tuple([true, "x"])], ["x", "x"],
        ] as [[StateValue]])
    func aKeyThatComesTwiceIsRefused(keys: [StateValue]) {
        // Python's dict would hold one of them, and the other's value would be lost.
        #expect(throws: NoetherWriterError.self) { try StatePickle(.dict(keys.map { ($0, "value") })) }
    }

    @Test(
        arguments: [
            [.int(0), .string("0")], [.float(.nan), .float(.nan)], [.int(.max), .float(0x1p63)], [.none, .int(0)],
            [.bytes([97]), "a"], [.tuple([1]), .int(1)],
        ] as [[StateValue]])
    func keysThatPythonTellsApartAreTaken(keys: [StateValue]) throws {
        _ = try StatePickle(.dict(keys.map { ($0, "value") }))
    }

    @Test func anErrorSaysItsWordsToWhoeverShowsIt() {
        let error: any Error = NoetherWriterError.runClosed
        #expect((error as? any LocalizedError)?.errorDescription == "\(error)")
        #expect(NoetherWriterError.refused(code: "bad-name", message: "").code == .refusedName)
        #expect(NoetherWriterError.timeout(waitingFor: "x", stalled: "full").code == .checkpointStalled)
    }
}
