// SPDX-License-Identifier: Apache-2.0
/// A YAML text as a graph of plain nodes, by libyaml: settings, and the hyperparameters of a run. libyaml itself, since
/// a daemon that rests would keep twice its memory for the Foundation that Swift's YAML packages stand on.
import CYaml

public struct YAMLDocument: Sendable, Equatable {
    public struct Node: Sendable, Equatable {
        public enum Content: Sendable, Equatable {
            /// - Parameter isPlain: it was written without quotes, so that it may stand for a number or the like.
            case scalar(String, isPlain: Bool)
            case sequence([Int])
            case mapping([Pair])
        }

        public var content: Content
        /// From 1.
        public var line: Int

        /// nil if it is a list or a mapping.
        public var text: String? {
            if case .scalar(let text, _) = content { text } else { nil }
        }
    }

    public struct Pair: Sendable, Equatable {
        public var key: Int
        public var value: Int
    }

    /// By their numbers. An alias leads to the node that it names: whoever walks the graph has to expect a node twice,
    /// and within itself.
    public let nodes: [Node]
    /// nil if the text holds nothing.
    public let root: Int?

    /// The first document of the text.
    /// - Parameter isOnly: what follows it is an error. Without a look at that, nobody would know that it counts for
    ///   nothing.
    public init(_ text: String, isOnly: Bool = false) throws(YAMLError) {
        var parser = yaml_parser_t()
        guard yaml_parser_initialize(&parser) == 1 else { throw YAMLError(line: nil, problem: "no memory to read it") }
        defer { yaml_parser_delete(&parser) }
        // The parser reads from it until it is deleted.
        let bytes = Array(text.utf8)
        var result: Result<[Node], YAMLError> = .success([])
        bytes.withUnsafeBufferPointer { buffer in
            yaml_parser_set_input_string(&parser, buffer.baseAddress, buffer.count)
            var document = yaml_document_t()
            guard yaml_parser_load(&parser, &document) == 1 else { return result = .failure(Self.problem(of: parser)) }
            defer { yaml_document_delete(&document) }
            result = .success(Self.nodes(of: document))
            guard isOnly else { return }
            var next = yaml_document_t()
            guard yaml_parser_load(&parser, &next) == 1 else { return result = .failure(Self.problem(of: parser)) }
            defer { yaml_document_delete(&next) }
            if let line = Self.nodes(of: next).first?.line {
                result = .failure(YAMLError(line: line, problem: "a second document begins; there may be only one"))
            }
        }
        nodes = try result.get()
        root = nodes.isEmpty ? nil : 0
    }

    public subscript(_ number: Int) -> Node { nodes[number] }

    private static func problem(of parser: yaml_parser_t) -> YAMLError {
        let problem = parser.problem.map { String(cString: $0) } ?? "not YAML"
        // The problem may be reported at the line where its context began, so the later of both lines is named.
        let line = max(parser.problem_mark.line, parser.context_mark.line) + 1
        return YAMLError(line: Int(line), problem: problem)
    }

    private static func nodes(of document: yaml_document_t) -> [Node] {
        guard let start = document.nodes.start, let top = document.nodes.top else { return [] }
        return UnsafeBufferPointer(start: start, count: top - start).map { node in
            // libyaml counts from 1.
            let content: Node.Content =
                switch node.type {
                case YAML_SEQUENCE_NODE:
                    .sequence(items(node.data.sequence.items.start, node.data.sequence.items.top) { Int($0) - 1 })
                case YAML_MAPPING_NODE:
                    .mapping(
                        items(node.data.mapping.pairs.start, node.data.mapping.pairs.top) {
                            Pair(key: Int($0.key) - 1, value: Int($0.value) - 1)
                        })
                default:
                    .scalar(
                        String(
                            decoding: UnsafeBufferPointer(
                                start: node.data.scalar.value, count: node.data.scalar.length),
                            as: UTF8.self),
                        isPlain: node.data.scalar.style == YAML_PLAIN_SCALAR_STYLE)
                }
            return Node(content: content, line: Int(node.start_mark.line) + 1)
        }
    }

    private static func items<Item, Result>(
        _ start: UnsafeMutablePointer<Item>?, _ top: UnsafeMutablePointer<Item>?, _ transform: (Item) -> Result
    ) -> [Result] {
        guard let start, let top else { return [] }
        return UnsafeBufferPointer(start: start, count: top - start).map(transform)
    }
}

public struct YAMLError: Error, Sendable, Equatable {
    /// From 1; nil if it is about no line.
    public var line: Int?
    public var problem: String
}
