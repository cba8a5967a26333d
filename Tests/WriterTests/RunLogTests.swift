// SPDX-License-Identifier: Apache-2.0
import Glibc
import SimulatedMachine
import Testing
import Wire

@testable import Writer

@Test func `An update is acknowledged when the journal has it and durable about a second later`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            try trainer.log(1)
            try scenario.until("the journal is made, durably") { trainer.acks.last?.durableUpdate == 1 }
            try trainer.log(2)
            let logged = scenario.schedule.now
            try scenario.until("it is acknowledged") { trainer.acks.last?.sequence == 2 }
            try scenario.require(trainer.acks.last?.durableUpdate == 1, "it is called durable before it was synced")
            try scenario.until("it is durable") { trainer.acks.last?.durableUpdate == 2 }
            try scenario.require(scenario.schedule.now - logged < 1.5, "it took longer than about a second")
        }
    }
}

@Test func `Acknowledged updates survive the daemon and become a file when their trainer is dead too`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            for update in 1...5 { try trainer.log(Int64(update)) }
            try scenario.until("they are acknowledged") { trainer.acks.last?.sequence == 5 }
            try scenario.require(!scenario.has("tracker/entries.th"), "there is a file already")
            scenario.endProcess(trainer.pid)
            try scenario.killDaemon()
            try scenario.until("the journal has become a file") {
                scenario.has("tracker/entries.th") && !scenario.has("tracker/entries.journal")
            }
            let isWhole = scenario.said.contains { if case .recovered(rows: 5) = $0 { true } else { false } }
            try scenario.require(isWhole, "not all rows came back: \(scenario.said)")
        }
    }
}

@Test func `A journal whose sync fails is made anew and loses nothing`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            try trainer.log(1)
            try scenario.until("it is acknowledged") { trainer.acks.last?.sequence == 1 }
            scenario.refuse([.fdatasync], EIO)
            try trainer.log(2)
            try scenario.until("the run says why") { try trainer.run.stalledFiles.count == 1 }
            try scenario.require(trainer.acks.last?.durableUpdate == 1, "what was not synced is called durable")
            scenario.takeAll()
            try scenario.until("it is durable") { trainer.acks.last?.durableUpdate == 2 }
            try scenario.require(try trainer.run.stalledFiles.isEmpty, "the run still says that storage refuses")
        }
    }
}

@Test func `The newest connection of a session hears how far its log is safe`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let first = try scenario.open()
            let second = try scenario.open()
            // What is left of the first connection comes late.
            try second.run.log.acknowledge(on: first.token) { _ in fatalError("an older connection heard it") }
            try second.log(1)
            try scenario.until("it is acknowledged") { second.acks.last?.sequence == 1 }
            try scenario.require(first.acks.isEmpty, "an older connection heard it")
        }
    }
}

@Test func `A session whose log was taken over hears nothing of the next one`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let first = try scenario.open(session: "a")
            try first.log(1)
            try scenario.until("it is acknowledged") { first.acks.last?.sequence == 1 }
            let count = first.acks.count
            let second = try scenario.open(session: "b")
            for update in 1...3 { try second.log(Int64(update)) }
            try scenario.until("the second one's are acknowledged") { second.acks.last?.sequence == 3 }
            try scenario.require(first.acks.count == count, "the first session heard of another one's log")
        }
    }
}

@Test func `The run's directory is let go of when the log has ended and not before`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            try trainer.log(1)
            try scenario.until("it is acknowledged") { trainer.acks.last?.sequence == 1 }
            let run = try trainer.run
            scenario.refuse([.unlink], EIO)
            try trainer.leave()
            scenario.pass(seconds: 5)
            try scenario.require(run.directories != nil, "the directory is gone while the journal is there")
            scenario.takeAll()
            try scenario.until("the journal is gone") { !scenario.has("tracker/entries.journal") }
            try scenario.until("the directory is let go of") { run.directories == nil }
        }
    }
}

@Test func `Keys that come in many messages before one update survive the daemon`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            try trainer.log(1)
            try scenario.until("it is durable") { trainer.acks.last?.durableUpdate == 1 }
            // More than one record of the journal may hold.
            let keys = (0..<1200).map { String(repeating: "k", count: 1000) + "\($0)" }
            try trainer.log(2, newKeys: keys)
            try trainer.log(3)
            try scenario.until("they are durable") { trainer.acks.last?.durableUpdate == 3 }
            scenario.endProcess(trainer.pid)
            try scenario.killDaemon()
            try scenario.until("the journal has become a file") { !scenario.has("tracker/entries.journal") }
            let isWhole = scenario.said.contains { if case .recovered(rows: 3) = $0 { true } else { false } }
            try scenario.require(isWhole, "not all rows came back: \(scenario.said)")
        }
    }
}

@Test(arguments: [20, 24, 300, 301, 302, 330])
func `A journal that is damaged before its end is kept and said`(position: Int) async {
    await #expect(processExitsWith: .success) { [position] in
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            for update in 1...50 { try trainer.log(Int64(update)) }
            try scenario.until("they are durable") { trainer.acks.last?.durableUpdate == 50 }
            scenario.endProcess(trainer.pid)
            try scenario.flipBit(of: "tracker/entries.journal", at: position)
            let damaged = scenario.bytes(of: "tracker/entries.journal")
            try scenario.killDaemon()
            try scenario.until("the journal is gone") { !scenario.has("tracker/entries.journal") }
            try scenario.require(
                scenario.bytes(of: "tracker/entries.1.journal") == damaged, "what follows the damage is gone")
            let isSaid = scenario.said.contains { if case .warning = $0 { true } else { false } }
            try scenario.require(isSaid, "nobody hears of it: \(scenario.said)")
        }
    }
}

@Test func `A journal that ends in the middle of a record is read and nothing is kept beside`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            for update in 1...50 { try trainer.log(Int64(update)) }
            try scenario.until("they are durable") { trainer.acks.last?.durableUpdate == 50 }
            scenario.endProcess(trainer.pid)
            try scenario.cut("tracker/entries.journal", by: 7)
            try scenario.killDaemon()
            try scenario.until("the journal has become a file") { !scenario.has("tracker/entries.journal") }
            try scenario.require(!scenario.has("tracker/entries.1.journal"), "a torn end counts as damage")
            let isThere = scenario.said.contains { if case .recovered(rows: 49) = $0 { true } else { false } }
            try scenario.require(isThere, "not what is whole came back: \(scenario.said)")
        }
    }
}

@Test func `A daemon that dies while it keeps an older journal leaves a run that can be opened`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            // No log can become a file.
            scenario.disk.makeSafeDirectory("\(Scenario.directory)/tracker/entries.th")
            let first = try scenario.open(session: "a")
            try first.log(1)
            try scenario.until("it is durable") { first.acks.last?.durableUpdate == 1 }
            let second = try scenario.open(session: "b")
            scenario.pass(seconds: 5)
            scenario.refuse([.create], EIO)
            try second.log(1)
            try scenario.until("the first one's is kept") { scenario.has("tracker/entries.1.journal") }
            scenario.endProcess(second.pid)
            scenario.takeAll()
            try scenario.killDaemon()
            let third = try scenario.open(session: "c", pid: 300)
            try scenario.require(third.refusal == nil, "the run cannot be opened: \(String(describing: third.opened))")
        }
    }
}

@Test func `A journal is kept once however often its recovery fails`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            for update in 1...50 { try trainer.log(Int64(update)) }
            try scenario.until("they are durable") { trainer.acks.last?.durableUpdate == 50 }
            scenario.endProcess(trainer.pid)
            try scenario.flipBit(of: "tracker/entries.journal", at: 1000)
            let kept = "\(Scenario.directory)/tracker/entries.1.journal"
            scenario.disk.named = { [disk = scenario.disk] _, name, _, _ in
                // What comes after it is refused for a while.
                guard name == "entries.1.journal" else { return }
                disk.faults = [SimulatedDisk.Fault(calls: [.create], code: EIO, share: 1, until: .infinity)]
            }
            try scenario.killDaemon()
            try scenario.until("it is kept") { scenario.disk.find(kept) != nil }
            scenario.pass(seconds: 60)
            try scenario.require(scenario.has("tracker/entries.journal"), "nothing was refused")
            scenario.takeAll()
            try scenario.until("the journal has become a file") { !scenario.has("tracker/entries.journal") }
            try scenario.require(!scenario.has("tracker/entries.2.journal"), "it is kept twice")
        }
    }
}
