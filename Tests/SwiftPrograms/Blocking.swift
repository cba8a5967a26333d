// SPDX-License-Identifier: Apache-2.0
// What blocks a thread is refused where tasks would wait: each line marked so is an error.
import NoetherWriterClient

func block(_ run: Run, _ ticket: Ticket, _ events: Subscription, _ daemon: DaemonConnection) async throws {
    _ = try Run.openBlocking(outputRoot: "runs", runID: "r")  // error
    try ticket.waitBlocking()  // error
    try run.waitBlocking()  // error
    try run.finishBlocking()  // error
    try run.flushBlocking()  // error
    _ = try run.valuesBlocking("loss")  // error
    _ = try events.nextBlocking()  // error
    _ = try Subscription.openBlocking(run: "r")  // error
    _ = try daemon.statusBlocking()  // error
    _ = try daemon.metricsBlocking()  // error
    _ = try DaemonConnection()  // error
    _ = try Files.waitBlocking()  // error
}
