// SPDX-License-Identifier: Apache-2.0
/// What the daemon counts of itself.
internal import Wire

extension DaemonConnection {
    /// OpenMetrics text (https://prometheus.io/docs/specs/om/open_metrics_spec/).
    /// - Throws: ``ClientError``; `unknown-type` if the daemon is older than this.
    public func metrics() throws(ClientError) -> String {
        let answer = try request(.metrics, Array("{}".utf8), timeout: Self.answerTime)
        return String(decoding: answer.payload, as: UTF8.self)
    }
}
