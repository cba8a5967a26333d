// SPDX-License-Identifier: Apache-2.0
import Testing
import Wire

@testable import Daemon

@Suite struct ServiceManagerTests {
    @Test func theCommandsAreThoseOfTheUnit() {
        let own = ServiceManager.commands(
            cgroup: "0::/user.slice/user-1000.slice/user@1000.service/app.slice/noether-writer.service\n",
            isUsers: true)
        #expect(own.restart == "systemctl --user restart noether-writer.service")
        #expect(own.stop == "systemctl --user stop noether-writer.socket noether-writer.service")
        let template = ServiceManager.commands(
            cgroup: "1:name=x:/y\n0::/system.slice/system-noether\\x2dwriter.slice/noether-writer@alice.service/a\n",
            isUsers: false)
        #expect(template.restart == "systemctl restart noether-writer@alice.service")
        #expect(template.stop == "systemctl stop noether-writer@alice.socket noether-writer@alice.service")
    }

    @Test(arguments: ["", "0::/\n", "0::/user.slice/user@1000.service/init.scope\n", "4:memory:/a.service\n"])
    func anUnknownUnitHasNone(cgroup: String) {
        let commands = ServiceManager.commands(cgroup: cgroup, isUsers: true)
        #expect(commands.restart == nil && commands.stop == nil)
    }
}
