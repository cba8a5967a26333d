// SPDX-License-Identifier: Apache-2.0
// A program whose top level waits: it compiles without a warning.
import NoetherWriterClient

let run = try await Run(outputRoot: CommandLine.arguments[1], runID: "r", resume: .auto)
let subscription = try await Subscription(run: "r")
let connection = try await DaemonConnection.open()
try run.log(["loss": Float(0.5), "epoch": 3])
let ticket = try run.save("net", tag: "t", ["a": 1])
try await ticket.waitUntilDurable(timeout: .seconds(1))
for await progress in ticket.progress { print(progress.bytesDone) }
print(try await run.values("loss").count, try await connection.status().runs.count)
if let event = try await subscription.next() { print(event) }
let entries = try await run.finish()
print(entries?.path() ?? "none")
