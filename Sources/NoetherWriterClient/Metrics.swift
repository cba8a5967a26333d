// SPDX-License-Identifier: Apache-2.0
/// What the daemon counts of itself.
internal import Wire

extension DaemonConnection {
    /// OpenMetrics text (https://prometheus.io/docs/specs/om/open_metrics_spec/).
    /// - Throws: ``NoetherWriterError``; `unknown-type` if the daemon is older than this. `CancellationError`.
    public func metrics() async throws -> String {
        let frame = try await answer(.metrics, Array("{}".utf8), timeout: Self.answerTime)
        return String(decoding: frame.payload, as: UTF8.self)
    }

    /// As `metrics()`, and blocks this thread.
    /// - Throws: ``NoetherWriterError``.
    @available(*, noasync, message: "it blocks a thread of the tasks: await metrics()")
    public func metricsBlocking() throws(NoetherWriterError) -> String {
        let answer = try request(.metrics, Array("{}".utf8), timeout: Self.answerTime)
        return String(decoding: answer.payload, as: UTF8.self)
    }
}
