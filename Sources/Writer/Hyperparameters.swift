// SPDX-License-Identifier: Apache-2.0
/// The hyperparameters of a run: `hp` of `tracker/config.yaml`, as names with values. What is within another is named
/// with points: `optimizer.lr`.
package import RunFiles
import Wire
import YAML

package struct Hyperparameters: Sendable {
    private static let countLimit = 65_536
    private static let depthLimit = 64

    /// In the file's order.
    package private(set) var names: [String] = []
    private var values: [ByteName: EntryValue] = [:]
    private var visits = 0

    package subscript(name: String) -> EntryValue? { values[ByteName(name)] }

    package struct Problem: Error, CustomStringConvertible { package let description: String }

    /// None.
    package init() {}

    /// - Parameter text: of a config.yaml.
    package init(ofConfig text: String) throws(Problem) {
        let document: YAMLDocument
        do { document = try YAMLDocument(text) } catch {
            throw Problem(description: (error.line.map { "line \($0): " } ?? "") + error.problem)
        }
        guard let root = document.root, case .mapping(let pairs) = document[root].content else { return }
        func value(of name: String) -> Int? { pairs.first { document[$0.key].text == name }?.value }
        // The Swift library writes what it is given; the Python library writes it as `hp`, beside the run's name.
        guard let found = value(of: "hp") ?? (value(of: "run_name") == nil ? root : nil) else { return }
        try add(found, of: document, as: "", depth: 0)
    }

    private mutating func add(_ node: Int, of document: YAMLDocument, as name: String, depth: Int) throws(Problem) {
        // An alias may lead back to what it is in, or to a great many.
        visits += 1
        guard depth < Self.depthLimit, visits <= Self.countLimit else {
            throw Problem(description: "it has more than \(Self.countLimit) hyperparameters, or some without end")
        }
        if case .mapping(let pairs) = document[node].content, !pairs.isEmpty || name.isEmpty {
            for pair in pairs {
                let key = Self.text(pair.key, of: document, depth: depth)
                try add(pair.value, of: document, as: name.isEmpty ? key : "\(name).\(key)", depth: depth + 1)
            }
            return
        }
        if values.updateValue(Self.value(node, of: document, depth: depth), forKey: ByteName(name)) == nil {
            names.append(name)
        }
    }

    private static func value(_ node: Int, of document: YAMLDocument, depth: Int) -> EntryValue {
        guard case .scalar(let text, let isPlain) = document[node].content, isPlain else {
            return .string(Self.text(node, of: document, depth: depth))
        }
        // The words of YAML 1.1 that PyYAML writes.
        switch text {
        case "null", "~", "": return .none
        case "true", "True": return .bool(true)
        case "false", "False": return .bool(false)
        case ".nan", ".NaN": return .float(Double.nan.bitPattern)
        case ".inf": return .float(Double.infinity.bitPattern)
        case "-.inf": return .float((-Double.infinity).bitPattern)
        default: break
        }
        guard text.utf8.allSatisfy({ "+-.0123456789eE".utf8.contains($0) }) else { return .string(text) }
        if let whole = Int64(text) { return .int(whole) }
        return Double(text).map { .float($0.bitPattern) } ?? .string(text)
    }

    private static let textLimit = 1000

    /// A list as YAML and JSON write it.
    private static func text(_ node: Int, of document: YAMLDocument, depth: Int) -> String {
        guard depth < depthLimit else { return "..." }
        switch document[node].content {
        case .scalar(let text, _): return text
        case .sequence(let items):
            var text = "["
            for (index, item) in items.enumerated() {
                guard text.utf8.count < textLimit else { return text + ", ...]" }
                text += (index == 0 ? "" : ", ") + Self.text(item, of: document, depth: depth + 1)
            }
            return text + "]"
        case .mapping(let pairs):
            var text = "{"
            for (index, pair) in pairs.enumerated() {
                guard text.utf8.count < textLimit else { return text + ", ...}" }
                text += (index == 0 ? "" : ", ") + Self.text(pair.key, of: document, depth: depth + 1)
                text += ": " + Self.text(pair.value, of: document, depth: depth + 1)
            }
            return text + "}"
        }
    }

    /// Names of which not all have the same value, or that some lack: in the order of the first that has them.
    package static func differing(_ all: [Hyperparameters]) -> [String] {
        var seen: Set<ByteName> = []
        return all.flatMap(\.names).filter { name in
            seen.insert(ByteName(name)).inserted && all.contains { $0[name] != all[0][name] }
        }
    }
}
