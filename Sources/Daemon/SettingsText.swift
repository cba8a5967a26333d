// SPDX-License-Identifier: Apache-2.0
/// `name: value` lines of a YAML file: what a settings file may hold, each with its line.
import YAML

struct SettingsLine: Equatable {
    var name: String
    /// Nil where the file has a list or a mapping.
    var value: String?
    /// From 1.
    var line: Int
}

/// - Throws: SettingsError that says what is wrong with the text, and in which line.
func settingsLines(_ text: String, _ file: String) throws(SettingsError) -> [SettingsLine] {
    let document: YAMLDocument
    do { document = try YAMLDocument(text, isOnly: true) } catch {
        let place = error.line.map { "\(file), line \($0)" } ?? file
        throw SettingsError(description: "\(place): \(error.problem)")
    }
    // No document at all, or an empty one.
    guard let root = document.root, document[root].text != "" else { return [] }
    guard case .mapping(let pairs) = document[root].content else {
        throw SettingsError(description: "\(file): settings are `name: value` lines")
    }
    var found: [SettingsLine] = []
    for pair in pairs {
        let (name, line) = (document[pair.key].text, document[pair.key].line)
        guard let name else {
            throw SettingsError(description: "\(file), line \(line): settings are `name: value` lines")
        }
        guard !found.contains(where: { $0.name == name }) else {
            throw SettingsError(description: "\(file), line \(line): \(name) is set a second time")
        }
        found.append(SettingsLine(name: name, value: document[pair.value].text, line: line))
    }
    return found
}
