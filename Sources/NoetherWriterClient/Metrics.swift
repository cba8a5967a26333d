// SPDX-License-Identifier: Apache-2.0
/// What the daemon counts of itself.
internal import Wire

/// The text forms that metrics come in.
public enum MetricsFormat: String, Sendable {
    /// https://prometheus.io/docs/specs/om/open_metrics_spec/
    case openMetrics = "openmetrics"
    /// Version 0.0.4 of https://prometheus.io/docs/instrumenting/exposition_formats/, which node_exporter's textfile
    /// collector and `promtool check metrics` read.
    case prometheus
}

extension DaemonConnection {
    /// - Parameter format: of the text; a daemon of version 0.1.0 or older knows OpenMetrics alone.
    /// - Throws: ``NoetherWriterError``; `unknown-type` if the daemon is older than this. `CancellationError`.
    public func metrics(_ format: MetricsFormat = .openMetrics) async throws -> String {
        let frame = try await answer(.metrics, Self.payload(format), timeout: Self.answerTime)
        return String(decoding: frame.payload, as: UTF8.self)
    }

    /// As `metrics(_:)`, and blocks this thread.
    /// - Throws: ``NoetherWriterError``.
    @available(*, noasync, message: "it blocks a thread of the tasks: await metrics(_:)")
    public func metricsBlocking(_ format: MetricsFormat = .openMetrics) throws(NoetherWriterError) -> String {
        let answer = try request(.metrics, Self.payload(format), timeout: Self.answerTime)
        return String(decoding: answer.payload, as: UTF8.self)
    }

    private static func payload(_ format: MetricsFormat) -> [UInt8] { Array(#"{"format":"\#(format.rawValue)"}"#.utf8) }
}
