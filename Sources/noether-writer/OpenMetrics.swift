// SPDX-License-Identifier: Apache-2.0
/// OpenMetrics text as families of samples, for `metrics --json`. It reads what the daemon writes, not all that the
/// format allows. Source: https://prometheus.io/docs/specs/om/open_metrics_spec/, "Text format".

struct MetricFamily: Encodable {
    struct Sample: Encodable {
        var name: String
        var labels: [String: String]
        /// nil if it is not a finite number, which JSON has no other word for.
        var value: Double?
    }

    var name: String
    var type = "unknown"
    var unit: String?
    var help = ""
    var samples: [Sample] = []

    /// In the text's order. A line that is not understood is left out.
    static func all(in text: String) -> [MetricFamily] {
        var families: [MetricFamily] = []
        for line in text.split(separator: "\n") {
            guard line.hasPrefix("# ") else {
                if let sample = Sample(line), !families.isEmpty {
                    families[families.count - 1].samples.append(sample)
                }
                continue
            }
            let words = line.dropFirst(2).split(separator: " ", maxSplits: 2).map(String.init)
            guard words.count == 3 else { continue }
            if families.last?.name != words[1] { families.append(MetricFamily(name: words[1])) }
            switch words[0] {
            case "TYPE": families[families.count - 1].type = words[2]
            case "UNIT": families[families.count - 1].unit = words[2]
            case "HELP": families[families.count - 1].help = words[2]
            default: break
            }
        }
        return families
    }
}

extension MetricFamily.Sample {
    /// `name{label="value",...} number`
    init?(_ line: Substring) {
        guard let end = line.firstIndex(where: { $0 == "{" || $0 == " " }) else { return nil }
        name = String(line[..<end])
        labels = [:]
        var rest = line[end...]
        if rest.hasPrefix("{") {
            rest.removeFirst()
            while !rest.hasPrefix("}") {
                guard let equals = rest.firstIndex(of: "=") else { return nil }
                let label = String(rest[..<equals])
                rest = rest[equals...].dropFirst()
                guard let value = Self.quoted(&rest) else { return nil }
                labels[label] = value
                if rest.hasPrefix(",") { rest.removeFirst() }
            }
            rest.removeFirst()
        }
        value = rest.split(separator: " ").first.flatMap { Double($0) }.flatMap { $0.isFinite ? $0 : nil }
    }

    /// Takes a label's value off: in quotes, with `\\`, `\"` and `\n`.
    private static func quoted(_ rest: inout Substring) -> String? {
        guard rest.popFirst() == "\"" else { return nil }
        var text = ""
        while let character = rest.popFirst() {
            switch character {
            case "\"": return text
            case "\\":
                guard let escaped = rest.popFirst() else { return nil }
                text.append(escaped == "n" ? "\n" : escaped)
            default: text.append(character)
            }
        }
        return nil
    }
}
