// SPDX-License-Identifier: Apache-2.0
import Testing

@testable import Daemon

@Suite struct StatusLineTests {
    @Test func bytesAreSaidInTheUnitOfTheWhole() {
        #expect(StatusLine.bytes(1_503_238_553, of: 3_221_225_472) == "1.4 of 3.0 GiB")
        #expect(StatusLine.bytes(0, of: 900) == "0 of 900 B")
        #expect(StatusLine.bytes(1 << 19, of: 1 << 20) == "0.5 of 1.0 MiB")
    }

    @Test func timesGetCoarser() {
        #expect(
            [2.9, 12, 59, 61, 7300].map { StatusLine.duration($0) } == [
                "2 s", "10 s", "50 s", "1 min", "2 h",
            ])
    }
}
