// SPDX-License-Identifier: Apache-2.0
/// What a file may hold: nothing of it crashes a trainer, and nothing is made that it did not ask for.
import Foundation
import Testing

@testable import NoetherWriterClient

@Suite struct StateReaderTests {
    private static let storage = TensorStorage([Float](repeating: 1, count: 6))
    private static let state: StateValue = [
        "state_dict": .stateDict([
            "weight": Tensor(storage, dtype: .float32, shape: [2, 3]),
            "tied": Tensor(storage, dtype: .float32, shape: [3, 2], strides: [1, 3], isParameter: true),
            "eight": Tensor([UInt8](repeating: 0, count: 6), dtype: .float8E4M3FN, shape: [6]),
        ]),
        "values": [nil, true, -1, 70_000, 5_000_000_000, 0.5, "ü", .bytes([0, 200]), .tuple([1, .tuple([])])],
        "empty": .orderedDict([]),
    ]

    private static func read(_ bytes: [UInt8], _ storages: [TensorStorage] = []) throws -> StateValue {
        try bytes.withUnsafeBytes { bytes in
            var reader = StateReader(bytes) { name in
                Int(name).flatMap { storages.indices.contains($0) ? storages[$0] : nil }
            }
            return try reader.read()
        }
    }

    @Test func whatIsWrittenIsRead() throws {
        let pickle = try StatePickle(Self.state)
        let found = try Self.read(pickle.bytes, pickle.storages)
        #expect(found == Self.state)
        let tied = try #require(found["state_dict"]?["tied"]?.tensorValue)
        #expect(tied.storage === found["state_dict"]?["weight"]?.tensorValue?.storage)
        #expect(tied.isParameter)
    }

    @Test func elementsComeInRowMajorOrder() throws {
        let storage = TensorStorage((0..<6).map { Float($0) })
        let turned = Tensor(storage, dtype: .float32, shape: [3, 2], strides: [1, 3])
        #expect(try turned.elements() == [0, 3, 1, 4, 2, 5] as [Float])
        #expect(
            try Tensor(storage, dtype: .float32, shape: [2], offset: 4).elements() == [4, 5] as [Float])
        #expect(try Tensor([Int64](), shape: [0, 3]).elements() == [Int64]())
        #expect(throws: NoetherWriterError.self) { try turned.elements(as: Double.self) }
        #expect(turned == Tensor([0, 3, 1, 4, 2, 5] as [Float], shape: [3, 2]))
        #expect(turned != Tensor([0, 3, 1, 4, 2, 6] as [Float], shape: [3, 2]))
    }

    @Test func aPickleThatIsChangedCrashesNothing() throws {
        let pickle = try StatePickle(Self.state)
        var random = SystemRandomNumberGenerator()
        for _ in 0..<20_000 {
            var bytes = pickle.bytes
            for _ in 0..<Int.random(in: 1...4, using: &random) {
                let place = Int.random(in: bytes.indices, using: &random)
                bytes[place] = UInt8.random(in: 0 ... .max, using: &random)
            }
            if Bool.random(using: &random) {
                bytes.removeLast(Int.random(in: 0..<bytes.count, using: &random))
            }
            _ = try? Self.read(bytes, pickle.storages)
        }
    }

    private static let begin: [UInt8] = [0x80, 2]

    @Test(arguments: [
        // os.system("x")
        Array("cos\nsystem\n(X\u{1}\0\0\0xtR.".utf8), Array("cbuiltins\neval\n.".utf8),
        // A list in itself.
        Array("]q\0h\0a.".utf8),
        // A dict with a key and no value, a mark that is left over, nothing at all.
        Array("}(K\u{1}u.".utf8), Array("(.".utf8), Array(".".utf8), Array("".utf8), Array("h\u{7}.".utf8),
        // A list as a key.
        Array("}(]K\u{1}u.".utf8),
    ])
    func whatIsNoStateIsRefused(bytes: [UInt8]) {
        #expect(throws: StateReader.Problem.self) { try Self.read(Self.begin + bytes) }
    }

    @Test func aFileOfManyLevelsIsRefused() {
        let levels = 500_000
        let deep = [UInt8](repeating: 0x5D, count: levels) + [UInt8](repeating: 0x61, count: levels - 1)
        #expect(throws: StateReader.Problem.self) { try Self.read(Self.begin + deep + Array(".".utf8)) }
    }

    @Test func aFileThatNamesOneValueManyTimesIsNoBomb() {
        // Each list holds the one before ten times.
        var bytes = Self.begin + Array("]q\0".utf8)
        for level in 0..<UInt8(30) {
            bytes += [0x5D, 0x71, level + 1, 0x28]
            for _ in 0..<10 { bytes += [0x68, level] }
            bytes += Array("e".utf8)
        }
        #expect(throws: StateReader.Problem.self) { try Self.read(bytes + Array(".".utf8)) }
    }

    @Test func aKeyThatComesAgainHasTheLaterValueAsInPython() throws {
        // {1: 2, 5: 6}, then the same dict's [True] = 3.
        let bytes = Self.begin + [0x7D, 0x28, 0x4B, 1, 0x4B, 2, 0x4B, 5, 0x4B, 6, 0x75, 0x88, 0x4B, 3, 0x73, 0x2E]
        #expect(try Self.read(bytes) == .dict([(1, 3), (5, 6)]))
    }

    @Test(.timeLimit(.minutes(1))) func aFileThatNobodyWritesIsNotWaitedFor() throws {
        let path = FileManager.default.temporaryDirectory.path + "/nw-fifo-\(UInt64.random(in: 0 ... .max))"
        #expect(mkfifo(path, 0o600) == 0)
        defer { unlink(path) }
        #expect(throws: NoetherWriterError.self) { try Checkpoint.load(path) }
    }

    /// In C a path ends at a NUL, and then names something else.
    @Test func aPathWithANULIsNotCutOff() throws {
        let path = FileManager.default.temporaryDirectory.path + "/nw-nul-\(UInt64.random(in: 0 ... .max))"
        #expect(FileManager.default.createFile(atPath: path, contents: Data("x".utf8)))
        defer { unlink(path) }
        for name in [path, path + "\0.th"] {
            do throws(NoetherWriterError) { _ = try Checkpoint.load(name) } catch {
                #expect("\(error)".contains("Invalid argument") == (name != path), "\(error)")
            }
        }
        do throws(NoetherWriterError) { _ = try DaemonConnection(socket: path + "-none\0") } catch {
            #expect(error.code == .wrongSocket, "\(error)")
        }
    }

    /// A long text, shape or list that a few bytes name again, to be copied each time.
    @Test func aFileThatAsksForManyCopiesIsNoBomb() {
        let times = 20_000
        let named = Self.begin + Array("]q\0c_codecs\nencode\nq\u{1}ctorch\nSize\nq\u{2}".utf8)
        let text = [0x58, 0, 0, 4, 0] + [UInt8](repeating: 0x61, count: 1 << 18) + [0x71, 3]
        let encoding: [UInt8] = [0x68, 1, 0x68, 3, 0x58, 6, 0, 0, 0] + Array("latin1".utf8) + [0x86, 0x52]
        let texts = named + text + [UInt8](([[UInt8]](repeating: encoding, count: times)).joined())
        #expect(throws: StateReader.Problem.self) { try Self.read(texts + Array(".".utf8)) }

        let list = [0x5D, 0x71, 3, 0x28] + [UInt8](repeating: 0x4E, count: 1 << 18) + [0x65]
        let growing: [UInt8] = [0x68, 2, 0x68, 3, 0x85, 0x52, 0x68, 3, 0x4E, 0x61]
        let sizes = named + list + [UInt8](([[UInt8]](repeating: growing, count: times)).joined())
        #expect(throws: StateReader.Problem.self) { try Self.read(sizes + Array(".".utf8)) }

        let ones = [0x28] + [UInt8]([[UInt8]](repeating: [0x4B, 1], count: 1 << 17).joined()) + [0x74, 0x71, 3]
        let storage =
            Array("(".utf8) + [0x58, 7, 0, 0, 0] + Array("storagectorch\nFloatStorage\n".utf8)
            + [0x58, 1, 0, 0, 0, 0x30, 0x4E, 0x4B, 6, 0x74, 0x51, 0x71, 4]
        let tensor = Array("ctorch._utils\n_rebuild_tensor_v2\n(h\u{4}K\0h\u{3}h\u{3}".utf8) + [0x89, 0x4E, 0x74, 0x52]
        let shapes = named + ones + storage + [UInt8](([[UInt8]](repeating: tensor, count: times)).joined())
        #expect(throws: StateReader.Problem.self) { try Self.read(shapes + Array(".".utf8), [Self.storage]) }
    }
}
