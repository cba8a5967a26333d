// SPDX-License-Identifier: Apache-2.0
/// Pickle protocol 2, the opcodes that torch.load(weights_only=True) knows: no frames, no memo, no STACK_GLOBAL.
/// Source: CPython Lib/pickletools.py; torch/_weights_only_unpickler.py.

public struct PickleWriter: Sendable {
    public private(set) var bytes: [UInt8] = []

    public init() {}

    private mutating func op(_ code: Character) { bytes.append(code.asciiValue!) }
    private mutating func little(_ value: some FixedWidthInteger) {
        withUnsafeBytes(of: value.littleEndian) { bytes.append(contentsOf: $0) }
    }

    public mutating func proto() { bytes += [0x80, 2] }
    public mutating func stop() { op(".") }
    public mutating func emptyDict() { op("}") }
    public mutating func emptyList() { op("]") }
    public mutating func emptyTuple() { op(")") }
    public mutating func mark() { op("(") }
    public mutating func setItems() { op("u") }
    public mutating func appends() { op("e") }
    public mutating func tuple() { op("t") }
    public mutating func reduce() { op("R") }
    public mutating func binPersistentID() { op("Q") }
    public mutating func none() { op("N") }
    public mutating func bool(_ value: Bool) { bytes += [0x80 + (value ? 8 : 9)] }

    public mutating func global(_ module: String, _ name: String) {
        op("c")
        bytes += Array("\(module)\n\(name)\n".utf8)
    }

    public mutating func string(_ value: String) {
        op("X")
        little(UInt32(value.utf8.count))
        bytes += value.utf8
    }

    public mutating func int(_ value: Int64) {
        switch value {
        case 0...0xFF:
            op("K")
            bytes.append(UInt8(value))
        case 0...0xFFFF:
            op("M")
            little(UInt16(value))
        case Int64(Int32.min)...Int64(Int32.max):
            op("J")
            little(Int32(value))
        default:
            var digits = withUnsafeBytes(of: value.littleEndian) { Array($0) }
            // Minimal two's complement, as Python writes it.
            while digits.count > 1, let last = digits.last,
                (last == 0 && digits[digits.count - 2] < 0x80)
                    || (last == 0xFF && digits[digits.count - 2] >= 0x80)
            { digits.removeLast() }
            bigInt(littleEndian: digits)
        }
    }

    /// - Parameter littleEndian: two's complement, at most 255 bytes (LONG1).
    public mutating func bigInt(littleEndian: [UInt8]) {
        precondition(littleEndian.count <= 255, "LONG1 takes at most 255 bytes")
        bytes += [0x8A, UInt8(littleEndian.count)] + littleEndian
    }

    /// From IEEE 754 bits: NaN payloads and -0.0 stay as they are.
    public mutating func float(bitPattern: UInt64) {
        op("G")
        withUnsafeBytes(of: bitPattern.bigEndian) { bytes.append(contentsOf: $0) }
    }
}
