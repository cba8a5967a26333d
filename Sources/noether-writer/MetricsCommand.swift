// SPDX-License-Identifier: Apache-2.0
/// `noether-writer metrics`: what the daemon counts of itself, as OpenMetrics.
import ArgumentParser
import NoetherWriterClient

struct MetricsCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "metrics",
        abstract: "Prints what the daemon counts, as OpenMetrics text.",
        discussion: """
            For Prometheus, set metrics_file in the daemon's settings: the daemon then writes a file for node_exporter's textfile \
            collector. config/grafana/noether-writer.json is a dashboard for it.

            """
                + examples(
                    "noether-writer metrics | grep failures",
                    "noether-writer metrics --json | jq '.[] | select(.type == \"gauge\")'"))
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption

    func run() throws {
        let text = try socket.connect().metricsBlocking()
        if try output.print(MetricFamily.all(in: text)) { return }
        print(text, terminator: "")
    }
}
