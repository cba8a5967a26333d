// SPDX-License-Identifier: Apache-2.0
import Glibc
import Posix
import SimulatedMachine
import Testing
import Wire

@testable import Writer

@Test func `A save that comes again on another connection is written once`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let (first, second) = (try scenario.open(), try scenario.open())
            try first.save("latest", sequence: 1)
            try second.save("latest", sequence: 1)
            try scenario.until("the newer connection hears its end") { second.kinds.last == .released }
            try scenario.require(second.kinds.contains(.durable), "it heard only \(second.kinds)")
            try scenario.require(try second.run.outcomes.durableCount == 1, "it was written twice")
            // It has ended, and a third connection asks for it: the same events, and no second write.
            let third = try scenario.open()
            try third.save("latest", sequence: 1)
            scenario.pass(seconds: 10)
            try scenario.require(third.kinds == [.accepted, .durable, .released], "it heard \(third.kinds)")
            try scenario.require(try third.run.outcomes.durableCount == 1, "it was written again")
        }
    }
}

@Test func `A later save of one name stays when an earlier one is sent again`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            try trainer.save("latest", sequence: 2)
            try scenario.until("it is durable") { trainer.kinds.last == .released }
            try trainer.save("latest", sequence: 1)
            try scenario.until("the earlier one has ended") {
                trainer.events.last?.sequence == 1 && trainer.kinds.last == .released
            }
            try scenario.require(scenario.saved("net0_cp=latest_model.th") == 2, "an older save took the name")
        }
    }
}

@Test func `Files of two ranks are written at the same time and those of one in order`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let (first, second) = (try scenario.open(), try scenario.open(session: "b", rank: 1, pid: 101, log: false))
            try first.save("one", sequence: 1)
            try first.save("two", sequence: 2)
            try scenario.until("one file is on its way") { scenario.store.queueDepths[0].running == 1 }
            try scenario.require(scenario.store.queueDepths[0].waiting == 0, "a lane has two files on their way")
            try second.save("one", sequence: 1)
            try scenario.until("both ranks have one on its way") { scenario.store.queueDepths[0].running == 2 }
            try scenario.until("all are durable") {
                first.kinds.count { $0 == .released } == 2 && second.kinds.last == .released
            }
            let order = first.events.filter { $0.event == .durable }.map(\.sequence)
            try scenario.require(order == [1, 2], "a rank's files became durable in the order \(order)")
        }
    }
}

@Test func `A full disk is waited for and told to all who ask`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            scenario.refuse([.allocate, .write, .create], ENOSPC)
            try trainer.save("latest", sequence: 1)
            try scenario.until("the client hears why") { trainer.kinds.last == .stalled }
            let path = "/data/r/checkpoints/net0_cp=latest_model.th"
            try scenario.require(try trainer.run.stalledFiles.map(\.path) == [path], "the run does not say which file")
            try scenario.require(
                try trainer.run.status.stalled?.contains("No space left") == true, "the status says nothing")
            let isSaid = scenario.said.contains { if case .stalled(path, _) = $0 { true } else { false } }
            try scenario.require(isSaid, "the operator is not told")
            scenario.pass(seconds: 120)
            try scenario.require(!trainer.kinds.contains(.failed), "it was given up")
            scenario.takeAll()
            try scenario.until("it is durable") { trainer.kinds.last == .released }
            try scenario.require(try trainer.run.stalledFiles.isEmpty, "the run still says that storage refuses")
            try scenario.require(scenario.saved("net0_cp=latest_model.th") == 1, "the file is not there")
        }
    }
}

@Test func `A save that can never be written is given up aloud and counted`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            scenario.disk.makeSafeDirectory("/data/r/checkpoints/net0_cp=latest_model.th")
            try trainer.save("latest", sequence: 1)
            try scenario.until("it has ended") { trainer.kinds.last == .released }
            try scenario.require(trainer.kinds.contains(.failed), "it heard only \(trainer.kinds)")
            let outcomes = try trainer.run.outcomes
            try scenario.require(outcomes.failureCount == 1 && outcomes.durableCount == 0, "it is not counted")
            try scenario.require(try trainer.run.stalledFiles.isEmpty, "what was given up is still waited for")
            try trainer.save("next", sequence: 2)
            try scenario.until("the next one is durable") {
                trainer.events.last?.sequence == 2 && trainer.kinds.last == .released
            }
            try scenario.require(scenario.saved("net0_cp=next_model.th") == 2, "the next one did not get on")
        }
    }
}

@Test func `An older checkpoint is removed after a newer one is durable and never before`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open(keepLast: 1)
            let names = (1...2).map { "net0_cp=E1_U\($0)_S1_model.th" }
            try trainer.save("latest", sequence: 1)
            try trainer.save("E1_U1_S1", sequence: 2)
            try scenario.until("the first is durable") { trainer.kinds.count { $0 == .released } == 2 }
            scenario.refuse([.fdatasync], EIO)
            try trainer.save("E1_U2_S1", sequence: 3)
            scenario.pass(seconds: 20)
            try scenario.require(
                scenario.has("checkpoints/\(names[0])"), "it is gone, and the newer one is not durable")
            scenario.takeAll()
            try scenario.until("the older one is gone") { !scenario.has("checkpoints/\(names[0])") }
            try scenario.require(scenario.saved(names[1]) == 3, "the newer one is not there")
            try scenario.require(scenario.saved("net0_cp=latest_model.th") == 1, "a tag without a number is gone")
        }
    }
}

@Test func `An older checkpoint stays when the newer one does not read back whole`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open(keepLast: 1)
            try trainer.save("E1_U1_S1", sequence: 1)
            try scenario.until("the first is durable") { trainer.kinds.last == .released }
            scenario.damageFile(named: "net0_cp=E1_U2", filledWith: 2)
            try trainer.save("E1_U2_S1", sequence: 2)
            try scenario.until("the operator is warned") {
                scenario.said.contains {
                    if case .warning(let words) = $0 { words.contains("does not verify") } else { false }
                }
            }
            try scenario.require(scenario.saved("net0_cp=E1_U1_S1_model.th") == 1, "the only whole checkpoint is gone")
        }
    }
}

@Test func `Each try after a refusal waits longer than the one before and half a minute at most`() async {
    await #expect(processExitsWith: .success) {
        try await Scenario.run { scenario in
            let trainer = try scenario.open()
            scenario.refuse([.allocate, .write, .create], ENOSPC)
            try trainer.save("latest", sequence: 1)
            var times: [Double] = []
            try scenario.until("nine tries have failed") {
                if trainer.kinds.count(where: { $0 == .stalled }) > times.count { times.append(scenario.schedule.now) }
                return times.count == 9
            }
            let pauses = zip(times.dropFirst(), times).map { ($0 - $1).rounded(.down) }
            try scenario.require(pauses == [0, 1, 2, 4, 8, 15, 30, 30], "it waited \(pauses)")
        }
    }
}
