// SPDX-License-Identifier: Apache-2.0
/// Fuzz target: a file that `noether-writer verify` is asked about. What verifies has records of different names that
/// all lie in the file.
import TorchFile

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzArchives(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
    let file = UnsafeRawBufferPointer(start: data, count: size)
    if let names = try? ArchiveVerifier(file).verify() {
        precondition(Set(names).count == names.count && names.contains { $0.hasSuffix("/data.pkl") })
    }
    return 0
}
