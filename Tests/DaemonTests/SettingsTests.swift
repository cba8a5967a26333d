// SPDX-License-Identifier: Apache-2.0
import Testing

@testable import Daemon

@Suite struct SettingsTests {
    @Test func laterSourcesWin() throws {
        let settings = try Settings(yaml: ("disk_queues: 3\ndrain_seconds: 5", "f")) {
            ["XDG_RUNTIME_DIR": "/tmp/u", "NOETHER_WRITER_SETTING_DISK_QUEUES": "4"][$0]
        }
        #expect(settings.diskQueues == 4)
        #expect(settings.drainSeconds == 5)
        #expect(settings.socket == "/tmp/u/noether-writer/socket")
    }

    @Test(arguments: ["", "# nothing\n", "---\n", "{}"])
    func nothingIsSet(yaml: String) throws {
        #expect(try Settings(yaml: (yaml, "f")) { _ in nil } == Settings(yaml: nil) { _ in nil })
    }

    @Test(arguments: [
        ("a: 1", "f, line 1"), ("disk_queues: [1]", "disk_queues"), ("drain_seconds: -1", "drain_seconds"),
        ("- 1", "f:"), ("disk_queues: 1\ndisk_queues: 2", "f, line 2"),
        ("disk_queues: 1\n: : [", "f, line 2"),
        ("? [a]\n: 1", "f, line 1"),
        ("socket: here", "absolute"), ("socket: \"/a\\0b\"", "control characters"),
        ("disk_queues: 1\n---\ndisk_queues: 2", "f, line 3: a second document"),
        ("disk_queues: 1\n...\n[", "f, line 3"),
    ])
    func wrongOnesAreNamed(yaml: String, words: String) {
        let error = #expect(throws: SettingsError.self) { try Settings(yaml: (yaml, "f")) { _ in nil } }
        #expect(error?.description.contains(words) == true)
    }

    @Test func anOlderNameIsReadUnlessTheNewOneIsSet() throws {
        let older = ["NOETHER_WRITERD_DISK_QUEUES": "4", "NOETHER_WRITERD_KEEP_LAST": "2"]
        let settings = try Settings(yaml: nil) {
            older.merging(["NOETHER_WRITER_SETTING_DISK_QUEUES": "5"]) { $1 }[$0]
        }
        #expect(settings.diskQueues == 5 && settings.keepLast == 2)
        let error = #expect(throws: SettingsError.self) {
            try Settings(yaml: nil) { ["NOETHER_WRITERD_KEEP_LAST": "two"][$0] }
        }
        #expect(error?.description.contains("variable NOETHER_WRITERD_KEEP_LAST:") == true)
    }

    @Test func olderNamesAreSaidInOneLine() {
        let names = [
            "NOETHER_WRITERD_KEEP_LAST", "HOME", "NOETHER_WRITERD_CONFIG", "NOETHER_WRITER_SETTING_KEEP_EVERY",
        ]
        let warning = SettingVariable.warning(ofNames: names)
        #expect(warning?.contains("NOETHER_WRITERD_CONFIG is now NOETHER_WRITER_CONFIG, ") == true)
        #expect(warning?.hasSuffix("NOETHER_WRITERD_KEEP_LAST is now NOETHER_WRITER_SETTING_KEEP_LAST") == true)
        #expect(SettingVariable.warning(ofNames: ["NOETHER_WRITER_SETTING_KEEP_EVERY"]) == nil)
    }
}
