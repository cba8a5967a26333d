// SPDX-License-Identifier: Apache-2.0
/// Fuzz target: a run's config.yaml, which anybody may have written: its hyperparameters have an end, whatever an alias
/// leads to, and each name has a value.
import Writer

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzConfig(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
    let text = String(decoding: UnsafeBufferPointer(start: data, count: size), as: UTF8.self)
    guard let found = try? Hyperparameters(ofConfig: text) else { return 0 }
    precondition(found.names.allSatisfy { found[$0] != nil }, "a name without a value")
    precondition(Hyperparameters.differing([found, found]).isEmpty, "a config that differs from itself")
    return 0
}
