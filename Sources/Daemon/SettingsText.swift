// SPDX-License-Identifier: Apache-2.0
/// `name: value` lines of a YAML file, by libyaml: what a settings file may hold, each with its line. libyaml itself,
/// since a daemon that rests would keep twice its memory for the Foundation that Swift's YAML packages stand on.
import CYaml

struct SettingsLine: Equatable {
    var name: String
    /// Nil where the file has a list or a mapping.
    var value: String?
    /// From 1.
    var line: Int
}

/// - Throws: SettingsError that says what is wrong with the text, and in which line.
func settingsLines(_ text: String, _ file: String) throws(SettingsError) -> [SettingsLine] {
    var parser = yaml_parser_t()
    guard yaml_parser_initialize(&parser) == 1 else {
        throw SettingsError(description: "\(file): no memory to read it")
    }
    defer { yaml_parser_delete(&parser) }
    // The parser reads from it until it is deleted.
    let bytes = Array(text.utf8)
    var result: Result<[SettingsLine], SettingsError> = .success([])
    bytes.withUnsafeBufferPointer { buffer in
        yaml_parser_set_input_string(&parser, buffer.baseAddress, buffer.count)
        var document = yaml_document_t()
        guard yaml_parser_load(&parser, &document) == 1 else {
            let problem = parser.problem.map { String(cString: $0) } ?? "not YAML"
            // Of the context too, where the problem is what ended it.
            let line = max(parser.problem_mark.line, parser.context_mark.line) + 1
            result = .failure(SettingsError(description: "\(file), line \(line): \(problem)"))
            return
        }
        defer { yaml_document_delete(&document) }
        result = lines(&document, file)
    }
    return try result.get()
}

private func lines(_ document: inout yaml_document_t, _ file: String) -> Result<[SettingsLine], SettingsError> {
    // No document at all, or an empty one.
    guard let root = yaml_document_get_root_node(&document), scalar(root.pointee) != "" else {
        return .success([])
    }
    guard root.pointee.type == YAML_MAPPING_NODE else {
        return .failure(SettingsError(description: "\(file): settings are `name: value` lines"))
    }
    var found: [SettingsLine] = []
    var pair = root.pointee.data.mapping.pairs.start!
    while pair < root.pointee.data.mapping.pairs.top {
        let name = yaml_document_get_node(&document, pair.pointee.key)!.pointee
        let value = yaml_document_get_node(&document, pair.pointee.value)!.pointee
        let line = Int(name.start_mark.line) + 1
        guard let key = scalar(name) else {
            return .failure(
                SettingsError(description: "\(file), line \(line): settings are `name: value` lines"))
        }
        guard !found.contains(where: { $0.name == key }) else {
            return .failure(SettingsError(description: "\(file), line \(line): \(key) is set a second time"))
        }
        found.append(SettingsLine(name: key, value: scalar(value), line: line))
        pair += 1
    }
    return .success(found)
}

private func scalar(_ node: yaml_node_t) -> String? {
    guard node.type == YAML_SCALAR_NODE else { return nil }
    let text = UnsafeBufferPointer(start: node.data.scalar.value, count: node.data.scalar.length)
    return String(decoding: text, as: UTF8.self)
}
