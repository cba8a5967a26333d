// SPDX-License-Identifier: Apache-2.0
import Glibc
import Posix
import SimulatedMachine
import Testing
import Wire

@testable import Writer

@Test func `A second process is refused while the first one lives and let in when it has ended`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let first = try scenario.open(session: "a", pid: 100)
            let start = scenario.schedule.now
            let second = try scenario.open(session: "b", pid: 101)
            try scenario.require(second.refusal == .runInUse, "two processes have one run")
            try scenario.require(scenario.schedule.now - start > 2, "it was not waited for the first one")
            let third = try scenario.open(session: "c", pid: 102, waits: false)
            scenario.pass(seconds: 1)
            scenario.endProcess(100)
            try first.leave(clean: false)
            try scenario.until("it is let in") { third.opened != nil }
            try scenario.require(third.refusal == nil, "the run of a dead process is refused")
        }
    }
}

@Test func `A session that connects again finds its own rows`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let first = try scenario.open()
            for update in 1...3 { try first.log(Int64(update)) }
            try scenario.until("they are acknowledged") { first.acks.last?.sequence == 3 }
            try first.leave(clean: false)
            let again = try scenario.open()
            guard case .success(let opened) = again.opened else { throw Unmet(words: "it is refused") }
            try scenario.require(opened.lastSequence == 3, "the daemon knows \(opened.lastSequence) of 3 updates")
            // What it sends again is dropped.
            try again.log(3)
            try again.log(4)
            try scenario.until("the next one is acknowledged") { again.acks.last?.sequence == 4 }
            try scenario.require(try again.run.log.rowCount == 4, "a row is there twice")
        }
    }
}

@Test func `A run whose trainer does not come back after the daemon's death ends`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            try trainer.log(1)
            try scenario.until("it is acknowledged") { trainer.acks.last?.sequence == 1 }
            try scenario.killDaemon()
            let start = scenario.schedule.now
            try scenario.require(scenario.store.all.map(\.isLive) == [true], "it is not waited for the trainer")
            try scenario.until("the log has become a file") { scenario.has("tracker/entries.th") }
            let waited = scenario.schedule.now - start
            try scenario.require(waited >= RunStore.reconnectSeconds, "it was waited for \(waited) s only")
        }
    }
}

@Test func `A daemon that finds no journal leaves the note of a run that it serves`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let registry = RunRegistry(path: SimulatedDisk.aloneDirectory + "/runs")
            let registration = Registration(registry)
            try registration.add("/data/r/tracker")
            // As a recovery does that has taken long to list what a daemon before this one has left.
            try registry.removeUnlessWanted("/data/r/tracker")
            try scenario.require(try registry.all().found == ["/data/r/tracker"], "the note of a living run is gone")
            let next = Registration(registry)
            try next.add("/data/r/tracker")
            registration.want(false)
            registration.removeUnlessWanted("/data/r/tracker")
            try scenario.require(try registry.all().found.count == 1, "one run has removed the note of another one")
            next.want(false)
            next.removeUnlessWanted("/data/r/tracker")
            try scenario.require(try registry.all().found.isEmpty, "the note stays")
            try registry.add("/data/r/tracker")
            try registry.removeUnlessWanted("/data/r/tracker")
            try scenario.require(try registry.all().found.isEmpty, "the note of a dead daemon stays")
        }
    }
}

@Test func `Storage that does not say what has a name is not taken for one that has nothing`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            scenario.disk.makeSafeDirectory("/data/r/tracker")
            let home = try Directory.open("/data/r")
            try scenario.require(try home.identity(below: "nothing") == nil, "a name that nothing has")
            try scenario.require(try home.identity(below: "tracker") != nil, "a name that a directory has")
            let (reference, device) = (try home.child("gone", create: true).reference, home.device)
            scenario.refuse([.status], EIO)
            do throws(PosixError) {
                _ = try home.identity(below: "tracker")
                throw PosixError(0, "it is taken for removed")
            } catch { try scenario.require(error.errno == EIO, "\(error)") }
            scenario.takeAll()
            scenario.disk.remove("/data/r/gone")
            try scenario.require(try reference.find(on: device, creates: false) == nil, "it was removed")
            scenario.refuse([.status], EIO)
            do throws(PosixError) {
                _ = try reference.find(on: device, creates: false)
                throw PosixError(0, "it is taken for removed")
            } catch { try scenario.require(error.errno == EIO, "\(error)") }
        }
    }
}

@Test func `What a daemon before had accepted is not restored as long as storage refuses its run`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            var identity = OpenRun(
                outputRoot: "/data", runID: "r", stageName: nil, debug: false,
                session: String(repeating: "a", count: 32), log: true, node: "node")
            identity.rank = 0
            let payload = SavePayload(
                sequence: 1, storageLengths: [64], storagesLength: 64, buffer: 1, logUpdate: nil,
                targets: [
                    SavePayload.Target(
                        kind: .model, name: "net", tag: "U1", info: nil, pickleOffset: 64, pickleLength: 20)
                ])
            let memory = try SharedMemory(capacity: 84)
            memory.bytes.initializeMemory(as: UInt8.self, repeating: 1)
            let snapshot = try Snapshot(payload, in: "/data/r", fd: memory.fd)
            let peer = PeerCredentials(process: PeerProcess(pid: 100, startTicks: 100), uid: ThisProcess.userID)
            scenario.refuse([.open, .mkdir], EIO)
            scenario.store.restore(snapshot, of: RunIdentity(identity), root: nil, peer: peer) { _ in }
            var restored: [String] = []
            scenario.store.whenRestored(runID: nil) { restored.append("all") }
            scenario.store.whenRestored(runID: "r") { restored.append("r") }
            scenario.store.whenRestored(runID: "another") { restored.append("another") }
            scenario.pass(seconds: 30)
            try scenario.require(restored == ["another"], "\(restored) are said to be restored")
            let missing = scenario.store.notRestored(runID: "r")
            try scenario.require(missing.map(\.path) == ["/data/r"], "\(missing)")
            try scenario.require(missing.first?.errno == EIO, "the reason is \(missing)")
            scenario.takeAll()
            try scenario.until("all is restored") { restored.count == 3 }
            try scenario.until("it is written") { scenario.saved("net_cp=U1_model.th") == 1 }
        }
    }
}
