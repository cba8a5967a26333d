import Testing

@testable import Daemon

@Suite struct SettingsTests {
    @Test func laterSourcesWin() throws {
        let settings = try Settings(yaml: ("disk_queues: 3\ndrain_seconds: 5", "f")) {
            ["XDG_RUNTIME_DIR": "/run/u", "NOETHER_WRITERD_DISK_QUEUES": "4"][$0]
        }
        #expect(settings.diskQueues == 4)
        #expect(settings.drainSeconds == 5)
        #expect(settings.socket == "/run/u/noether-writer/socket")
    }

    @Test(arguments: [
        ("a: 1", "f, line 1"), ("disk_queues: [1]", "disk_queues"), ("drain_seconds: -1", "drain_seconds"),
        ("- 1", "f:"),
        ("socket: here", "absolute"),
    ])
    func wrongOnesAreNamed(yaml: String, words: String) {
        let error = #expect(throws: SettingsError.self) { try Settings(yaml: (yaml, "f")) { _ in nil } }
        #expect(error?.description.contains(words) == true)
    }
}
