// SPDX-License-Identifier: Apache-2.0
import Testing

@testable import NoetherWriterClient

/// What the Python client takes, this one takes, and says of a mistyped one which it is.
@Suite struct VariablesTests {
    private static func read(_ variables: [Variable: String]) throws(NoetherWriterError) -> Variables {
        try Variables { name in Variable(rawValue: name).flatMap { variables[$0] } }
    }

    @Test func withoutThemDefaultsHold() throws {
        for variables in [try Self.read([:]), try Self.read([.queueBytes: "", .rank: "", .tensorboard: ""])] {
            #expect(variables.queueByteCount == 64 << 20)
            #expect(variables.whenAway == .keepTraining)
            #expect(variables.poolByteCount == nil && variables.keepLast == nil && variables.keepEvery == nil)
            #expect(variables.poolTimeoutSeconds == 600)
            #expect(variables.poolIdleSeconds == 300)
            #expect(variables.tensorboard == nil)
            #expect(variables.rank == 0 && variables.worldSize == 1)
        }
    }

    @Test func whatTheyHoldIsTaken() throws {
        let variables = try Self.read([
            .queueBytes: "20000", .whenAway: "raise", .poolBytes: "0", .poolTimeout: "0.5",
            .poolIdleSeconds: "1e3", .tensorboard: "1", .keepLast: "2", .keepEvery: "0", .rank: "3", .worldSize: "8",
        ])
        #expect(variables.queueByteCount == 20000)
        #expect(variables.whenAway == .raise)
        #expect(variables.poolByteCount == 0)
        #expect(variables.poolTimeoutSeconds == 0.5)
        #expect(variables.poolIdleSeconds == 1000)
        #expect(variables.tensorboard == true)
        #expect(variables.keepLast == 2 && variables.keepEvery == 0)
        #expect(variables.rank == 3 && variables.worldSize == 8)
        #expect(try Self.read([.tensorboard: "0"]).tensorboard == false)
    }

    @Test(arguments: [
        (Variable.queueBytes, "64M", "a number of bytes, in digits"),
        (.queueBytes, "-1", "a number of bytes, in digits"),
        (.whenAway, "wait", "keep-training or raise"),
        (.poolBytes, "1.5", "a number of bytes, in digits"),
        (.poolTimeout, "10 s", "a number of seconds"),
        (.poolTimeout, "nan", "a number of seconds"),
        (.poolIdleSeconds, "-0.1", "a number of seconds"),
        (.keepLast, "two", "a number of checkpoints, in digits"),
        (.rank, "first", "this process's number in its job"),
        (.worldSize, "1.0", "the number of processes of this job"),
    ])
    func aMistypedOneIsNamed(variable: Variable, value: String, wanted: String) {
        #expect(
            throws: NoetherWriterError.invalidVariable(name: variable.rawValue, value: value, wanted: wanted)
        ) { try Self.read([variable: value]) }
    }

    @Test(arguments: ["1e300", "inf", "99999999999999999999999999"])
    func moreSecondsThanCanBeCountedAreNoBound(value: String) throws {
        let pool = try BufferPool(Self.read([.poolTimeout: value, .poolIdleSeconds: value]))
        let buffer = try pool.reserve(1)
        pool.release(buffer.number)
    }
}
