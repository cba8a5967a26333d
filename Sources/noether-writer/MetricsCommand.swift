// SPDX-License-Identifier: Apache-2.0
/// `noether-writer metrics`: what the daemon counts of itself, as OpenMetrics.
import ArgumentParser
import NoetherWriterClient

struct MetricsCommand: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "metrics",
        abstract: "What the daemon counts of itself, as OpenMetrics text.",
        discussion: """
            For Prometheus there is the setting metrics_file, which has the daemon write a file for node_exporter's textfile
            collector; config/grafana/noether-writer.json is a dashboard of it.

            """
                + examples(
                    "noether-writer metrics | grep failures",
                    "noether-writer metrics --json | jq '.[] | select(.type == \"gauge\")'"))
    @OptionGroup var socket: SocketOption
    @OptionGroup var output: JSONOption

    func run() throws {
        let text = try socket.connect().metrics()
        if try output.print(MetricFamily.all(in: text)) { return }
        print(text, terminator: "")
    }
}
