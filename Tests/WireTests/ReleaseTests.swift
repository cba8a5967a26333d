// SPDX-License-Identifier: Apache-2.0
import Testing

@testable import Wire

@Suite struct ReleaseTests {
    @Test(arguments: [
        ("0.1.0", "0.1.1", true), ("0.9.0", "0.10.0", true), ("1.2.3", "2.0.0", true), ("0.1.0", "0.1.0", false),
        ("0.2.0", "0.1.9", false), ("1.0.0rc1", "1.0.0", false), ("1.0.0", "1.0.1.dev3", true),
        ("", "1.0.0", false), ("1.0", "2.0.0", false), ("1.x.0", "2.0.0", false), ("1..0", "2.0.0", false),
    ])
    func olderIsWhatHasSmallerNumbers(version: String, other: String, isOlder: Bool) {
        #expect(Release.isOlder(version, than: other) == isOlder)
    }

    @Test func thisReleaseHasNumbers() {
        #expect(Release.isOlder("0.0.0", than: Release.version))
    }
}
