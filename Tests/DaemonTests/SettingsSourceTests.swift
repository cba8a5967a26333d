// SPDX-License-Identifier: Apache-2.0
import Foundation
import Testing

@testable import Daemon

/// A daemon that a service manager keeps starts whatever its settings are.
@Suite struct SettingsSourceTests {
    private let folder = FileManager.default.temporaryDirectory.path + "/nw-settings-\(UInt64.random(in: 0 ... .max))"

    private func source(_ text: String?, _ variables: [String: String] = [:]) throws -> SettingsSource {
        try FileManager.default.createDirectory(atPath: folder, withIntermediateDirectories: true)
        let file = folder + "/settings.yaml"
        if let text { try text.write(toFile: file, atomically: true, encoding: .utf8) }
        let places = ["STATE_DIRECTORY": folder + "/state", "XDG_RUNTIME_DIR": "/tmp/u"]
        return SettingsSource(config: file, socket: nil, exitIdle: nil) { variables[$0] ?? places[$0] }
    }

    @Test func rightSettingsAreTakenAndHaveNoProblem() throws {
        defer { try? FileManager.default.removeItem(atPath: folder) }
        let found = try source("keep_last: 7").readOrFallBack()
        #expect(found.settings.keepLast == 7 && found.problem == nil)
    }

    @Test(arguments: [
        ("keep_last: two", [:]), (nil, [:]), ("keep_last: 9", ["NOETHER_WRITER_SETTING_KEEP_EVERY": "x"]),
    ])
    func theLastOnesThatWereRightStandIn(text: String?, variables: [String: String]) throws {
        defer { try? FileManager.default.removeItem(atPath: folder) }
        try source("keep_last: 7").keepCopy()
        if text == nil { try FileManager.default.removeItem(atPath: folder + "/settings.yaml") }
        let found = try source(text, variables).readOrFallBack()
        #expect(found.settings.keepLast == 7)
        #expect(found.settings.socket == "/tmp/u/noether-writer/socket")
        #expect(found.problem?.contains("the last ones that were right") == true)
    }

    @Test(arguments: [
        ("keep_last: two", [:], "the default of each setting"),
        ("keep_last: 7", ["NOETHER_WRITER_SETTING_KEEP_EVERY": "x"], "the defaults are used for everything"),
    ])
    func withoutACopyTheDefaultsStandIn(text: String, variables: [String: String], words: String) throws {
        defer { try? FileManager.default.removeItem(atPath: folder) }
        let found = try source(text, variables).readOrFallBack()
        #expect(found.settings.keepLast == 0 && found.settings.stateDirectory == folder + "/state")
        #expect(found.problem?.contains(words) == true)
    }
}
