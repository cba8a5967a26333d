// SPDX-License-Identifier: Apache-2.0
/// Fuzz target: the pickle of a log that the command line tool is asked about. What it reads belongs to keys that it
/// names.
import RunFiles

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzEntries(_ data: UnsafePointer<UInt8>?, _ size: Int) -> CInt {
    var reader = EntriesReader(UnsafeRawBufferPointer(start: data, count: size))
    var seen: Set<String> = []
    var texts = 0
    let keys = try? reader.read { key, _, value in
        seen.insert(key)
        texts += value.text.utf8.count
    }
    if let keys { precondition(seen.isSubset(of: keys), "a value of a key that is not there") }
    return 0
}
