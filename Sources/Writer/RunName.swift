// SPDX-License-Identifier: Apache-2.0
/// Who a run is, and where its files go. Names are checked here, once; the kernel checks again when they are opened
/// (`Directory.child`).
public import Posix
public import Wire

public struct RunName: Sendable, Hashable {
    public static func == (first: RunName, second: RunName) -> Bool { first.identity == second.identity }
    public func hash(into hasher: inout Hasher) { hasher.combine(identity) }
    private var identity: [ByteName] {
        ([outputRoot, anchor.map { "\($0.device) \($0.inode)" } ?? ""] + components).map(ByteName.init)
    }

    public let outputRoot: String
    public let runID: String
    public let stageName: String?
    public let debug: Bool
    /// The output root, if the daemon's own mount namespace has something else at its path.
    public var anchor: OwnedFD.Identity?

    public init(_ message: OpenRun) throws(WireError) { try self.init(RunIdentity(message)) }

    public init(_ run: RunIdentity) throws(WireError) {
        let root = run.outputRoot
        // guard: root-absolute (always: root.begins(with: "/"))
        // guard: root-length (always: root.utf8.count < Limits.pathBytes)
        // guard: root-nul (always: !root.utf8.contains(0))
        guard root.begins(with: "/"), root.utf8.count < Limits.pathBytes, !root.utf8.contains(0) else {
            throw WireError(
                .badPath,
                "output_root must be an absolute path below \(Limits.pathBytes) bytes, not "
                    + "\(String(root.prefix(64)).debugDescription) (\(root.utf8.count) bytes)"
            )
        }
        outputRoot = root.utf8.count > 1 && root.ends(with: "/") ? root.dropping(first: 0, last: 1) : root
        runID = try Self.component(run.runId, "run_id")
        stageName = try run.stageName.map { name throws(WireError) in
            try Self.component(name, "stage_name")
        }
        debug = run.debug ?? false
    }

    /// The same name in another mount namespace.
    func anchored(at root: OwnedFD?) -> RunName {
        var name = self
        name.anchor = root.flatMap { try? $0.status().identity }
        return name
    }

    func anchored(in home: Directory) -> RunName { anchored(at: home.anchor) }

    /// Components below the output root.
    public var components: [String] { (debug ? ["debug"] : []) + [runID] + (stageName.map { [$0] } ?? []) }
    public var directory: String {
        ([outputRoot == "/" ? "" : outputRoot] + components).joined(separator: "/")
    }

    /// One path component: not empty, no `/`, no NUL or other control character, not `.` or `..`, at most NAME_MAX.
    @discardableResult
    public static func component(_ name: String, _ what: String) throws(WireError) -> String {
        if let reason = PathComponent.problem(with: name) {
            throw WireError(
                .badName,
                "\(what) \(String(name.prefix(64)).debugDescription) \(reason); it becomes one path component"
            )
        }
        return name
    }
}
