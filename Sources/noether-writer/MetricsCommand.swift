// SPDX-License-Identifier: Apache-2.0
/// `noether-writer metrics`: what the daemon counts of itself, in the format of its metrics_file or as OpenMetrics.
import ArgumentParser
import NoetherWriterClient

struct MetricsCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "metrics",
        abstract: "Prints what the daemon counts, as text for Prometheus.",
        discussion: """
            For Prometheus, set metrics_file in the daemon's settings: the daemon then writes the same text into a file for \
            node_exporter's textfile collector. There are alert rules and a dashboard for Grafana (see noether-writerd(8)).

            """
                + examples(
                    "noether-writer metrics | grep failures",
                    "noether-writer metrics --json | jq '.[] | select(.type == \"gauge\")'"))
    @Flag(help: "Print OpenMetrics, with units, in place of the format that promtool and node_exporter read.")
    var openmetrics = false
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption

    func run() throws {
        let connection = try socket.connect()
        // With units, and the families' own names.
        if output.json {
            _ = try output.print(MetricFamily.all(in: connection.metricsBlocking(.openMetrics)))
        } else {
            print(try connection.metricsBlocking(openmetrics ? .openMetrics : .prometheus), terminator: "")
        }
    }
}
