// SPDX-License-Identifier: Apache-2.0
// A program of the first version: it compiles with warnings that name the newer names. Names that an asynchronous call
// has now (Run.init, finish, values, status, metrics, Subscription.init and next) have no blocking form any more: the
// compiler would choose it at the top level of a program, where the new ones are awaited.
import Dispatch
import NoetherWriterClient

func train(_ run: Run) throws -> Ticket {
    do {
        try run.log(["loss": 0.5], update: 1)
        try run.log([("a", 1)], update: 2, epoch: 1, sample: 8)
    } catch let error as ClientError {
        print(error.description)
        throw error
    }
    let weights = Tensor([Float](repeating: 1, count: 4), dtype: .float32, shape: [2, 2])
    let ticket = try run.save("net", tag: "t", ["state_dict": .stateDict(["w": weights])], kind: .model)
    try ticket.wait(timeout: .seconds(1))
    try run.wait(timeout: .seconds(1))
    return ticket
}

func isDurable(_ ticket: Ticket) async throws -> Bool {
    try await ticket.durable()
    return ticket.isDurable && ticket.stalled == nil && ticket.bytesDone == ticket.bytesTotal
}

func follow(_ subscription: Subscription) throws -> Bool {
    let (event, isOver) = try subscription.next(until: .now() + 1)
    if case .report(let report)? = event { look(report) }
    return isOver
}

func look(_ report: Subscription.Report) {
    for run: Subscription.Report.Run in report.runs where run.state == Subscription.Report.Run.State.running {
        let checkpoints: Subscription.Report.Run.Checkpoints = run.checkpoints
        print(run.runID, checkpoints.durable)
    }
}
