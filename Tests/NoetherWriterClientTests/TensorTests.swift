// SPDX-License-Identifier: Apache-2.0
import Testing

@testable import NoetherWriterClient

@Suite struct TensorTests {
    @Test(arguments: [
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [2, 4]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [6], offset: 1),
        Tensor(
            TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [2, 2], strides: [5, 2]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [2], strides: [1, 1]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [-1]),
        Tensor(TensorStorage([Float](repeating: 0, count: 6)), dtype: .float32, shape: [.max, .max]),
        Tensor(TensorStorage([UInt8](repeating: 0, count: 6)), dtype: .float32, shape: [1]),
    ])
    func tensorOutsideItsStorageIsRefused(tensor: Tensor) {
        #expect(throws: ClientError.self) { try StatePickle(.tensor(tensor)) }
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
        #expect(throws: ClientError.self) { try StatePickle(.list([.tensor(view), .tensor(other)])) }
    }
}
