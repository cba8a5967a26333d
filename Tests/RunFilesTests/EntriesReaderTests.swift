// SPDX-License-Identifier: Apache-2.0
import RunFiles
import Testing

@Suite struct EntriesReaderTests {
    /// pickle.dumps({"loss": {1: 0.5, 2: nan, 300: -0.0, 70000: 1e300}, "n": {-1: 1 << 62, 5: True, 6: None,
    /// 7: 1 << 80, 8: "ä"}, "one": {1: "ä"}, "epoch": {0: 0, 1: 1, 2: 2}}, 2), of CPython: with memos, and an item
    /// alone.
    private static let pickle: [UInt8] = {
        let digits = Array(
            "80027d71002858040000006c6f737371017d7102284b01473fe00000000000004b02477ff80000000000004d2c014780"
                + "000000000000004a70110100477e37e43c8800759c7558010000006e71037d7104284affffffff8a0800000000000000"
                + "404b05884b064e4b078a0b00000000000000000000014b085802000000c3a471057558030000006f6e6571067d71074b"
                + "01680573580500000065706f636871087d7109284b004b004b014b014b024b0275752e"
        )
        return stride(from: 0, to: digits.count, by: 2).compactMap {
            UInt8(String(digits[$0...$0 + 1]), radix: 16)
        }
    }()

    private static func read(
        _ bytes: [UInt8], wants: (String) -> Bool = { _ in true }
    ) throws(EntriesError) -> (keys: [String], lines: [String]) {
        var lines: [String] = []
        var failure: EntriesError?
        let keys = bytes.withUnsafeBytes { buffer -> [String] in
            var reader = EntriesReader(buffer)
            do throws(EntriesError) {
                return try reader.read(wants: wants) { lines.append("\($0) \($1) \($2.text)") }
            } catch { failure = error }
            return []
        }
        if let failure { throw failure }
        return (keys, lines)
    }

    @Test func whatPythonWritesIsRead() throws {
        let (keys, lines) = try Self.read(Self.pickle)
        #expect(keys == ["loss", "n", "one", "epoch"])
        #expect(
            lines == [
                "loss 1 0.5", "loss 2 nan", "loss 300 -0.0", "loss 70000 1e+300", "n -1 4611686018427387904",
                "n 5 True",
                "n 6 None", "n 7 1208925819614629174706176", "n 8 ä", "one 1 ä", "epoch 0 0", "epoch 1 1",
                "epoch 2 2",
            ])
        #expect(try Self.read(Self.pickle, wants: { $0 == "one" }).lines == ["one 1 ä"])
    }

    /// Every cut is an error, and every changed byte an error or another log, but never a crash.
    @Test func damageIsAnError() {
        for count in 0..<Self.pickle.count {
            #expect(throws: EntriesError.self) { try Self.read(Array(Self.pickle[..<count])) }
        }
        for index in Self.pickle.indices {
            for change in UInt8(1)...255 {
                var bytes = Self.pickle
                bytes[index] ^= change
                _ = try? Self.read(bytes)
            }
        }
    }

    @Test(
        arguments: [
            ([0x00, 0x01], "256"), ([0xFF], "-1"), ([0x80], "-128"), ([], "0"),
            ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xC0, 0xFF], "-77371252455336267181195264"),
            ([0x00, 0xCA, 0x9A, 0x3B], "1000000000"),
            (
                [UInt8](repeating: 0xFF, count: 20) + [0x7F],
                "187072209578355573530071658587684226515959365500927"
            ),
        ] as [([UInt8], String)])
    func bigIntegersAreDecimal(digits: [UInt8], text: String) {
        #expect(EntryValue.bigInt(littleEndian: digits).text == text)
    }
}
