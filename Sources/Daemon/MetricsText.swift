// SPDX-License-Identifier: Apache-2.0
/// Writes metrics as text. A client that asks over the socket gets OpenMetrics. The file for node_exporter's textfile
/// collector has Prometheus' older format, because the collector reads no other. Pure.
/// https://prometheus.io/docs/specs/om/open_metrics_spec/
import Writer

struct MetricsText {
    enum Format {
        case openMetrics
        case prometheus
    }

    typealias Labels = [(name: String, value: String)]

    private let format: Format
    /// Labels that every sample has; the sample's own labels follow them.
    private let common: Labels
    private(set) var text = ""

    init(_ format: Format, labels common: Labels) {
        self.format = format
        self.common = common
    }

    /// - Parameter suffix: of the samples' name; in the older format the family has it too.
    private mutating func head(_ name: String, _ type: String, _ help: String, suffix: String = "") {
        let family = format == .openMetrics ? name : name + suffix
        let type = format == .prometheus && type == "info" ? "gauge" : type
        text += "# HELP \(family) \(help)\n# TYPE \(family) \(type)\n"
        // Where the name ends with one, OpenMetrics has the unit by itself too.
        if format == .openMetrics, let unit = ["seconds", "bytes"].first(where: { name.hasSuffix("_\($0)") }) {
            text += "# UNIT \(family) \(unit)\n"
        }
    }

    private mutating func sample(_ name: String, _ labels: Labels, _ value: String) {
        let inner = (common + labels).map { "\($0.name)=\"\(Self.escaped($0.value))\"" }.joined(separator: ",")
        text += name + (inner.isEmpty ? "" : "{\(inner)}") + " " + value + "\n"
    }

    mutating func info(_ name: String, _ help: String, _ labels: Labels) {
        head(name, "info", help, suffix: "_info")
        sample(name + "_info", labels, "1")
    }

    mutating func gauge(_ name: String, _ help: String, _ values: [(labels: Labels, value: Double)]) {
        head(name, "gauge", help)
        for (labels, value) in values { sample(name, labels, Self.number(value)) }
    }

    mutating func gauge(_ name: String, _ help: String, _ value: Double) {
        gauge(name, help, [(labels: [], value: value)])
    }

    /// - Parameter name: without `_total`.
    mutating func counter(_ name: String, _ help: String, _ values: [(labels: Labels, value: Double)]) {
        head(name, "counter", help, suffix: "_total")
        for (labels, value) in values { sample(name + "_total", labels, Self.number(value)) }
    }

    mutating func counter(_ name: String, _ help: String, _ value: UInt64) {
        counter(name, help, [(labels: [], value: Double(value))])
    }

    /// - Parameter values: by the value of `label`.
    mutating func counter(_ name: String, _ help: String, by label: String, _ values: [String: UInt64]) {
        counter(
            name, help,
            values.sorted { $0.key < $1.key }.map { (labels: [(label, $0.key)], value: Double($0.value)) })
    }

    mutating func histogram(_ name: String, _ help: String, _ values: Histogram) {
        head(name, "histogram", help)
        var count: UInt64 = 0
        for (bound, added) in zip(values.bounds, values.counts) {
            count += added
            sample(name + "_bucket", [("le", Self.bound(bound))], "\(count)")
        }
        sample(name + "_bucket", [("le", "+Inf")], "\(values.count)")
        sample(name + "_count", [], "\(values.count)")
        sample(name + "_sum", [], Self.number(values.sum))
    }

    mutating func end() { if format == .openMetrics { text += "# EOF\n" } }

    /// A bound is a label, and one bound is one text: always with a dot, an exponent behind a million.
    private static func bound(_ value: Double) -> String {
        guard value >= 1e6 else { return "\(value)" }
        let digits = "\(UInt64(value))"
        var fraction = String(digits.dropFirst())
        while fraction.hasSuffix("0") { fraction.removeLast() }
        let exponent = digits.count - 1
        return
            "\(digits.prefix(1)).\(fraction.isEmpty ? "0" : fraction)e+\(exponent < 10 ? "0" : "")\(exponent)"
    }

    private static func number(_ value: Double) -> String {
        if value.isNaN { return "NaN" }
        if value.isInfinite { return value < 0 ? "-Inf" : "+Inf" }
        if value == value.rounded(), abs(value) < 1e15 { return "\(Int64(value))" }
        return "\(value)"
    }

    private static func escaped(_ value: String) -> String {
        value.replacing("\\", with: "\\\\").replacing("\"", with: "\\\"").replacing("\n", with: "\\n")
    }
}
