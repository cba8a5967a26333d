// SPDX-License-Identifier: Apache-2.0
/// The checkpoints of a run, found in its files: what is there, what is newest, what is best. The rules are those of
/// the Python library (`noether_writer.latest`).
internal import Posix
internal import RunFiles
internal import TorchFile
internal import Wire

/// One file in the directory `checkpoints` of a run.
public struct SavedCheckpoint: Sendable, Equatable, Encodable {
    /// Absolute.
    public var path: String
    /// The model's name. If the file has lost its extended attributes, it ends with `_<info>`.
    public var name: String
    /// `model`, `optim` or `trainer`.
    public var kind: String
    /// As it was given to `save`.
    public var info: String?
    /// As it was given to `save`, such as `E1_U200_S800` or `latest`.
    public var tag: String
    /// The update of the training at which it was saved. It is nil if neither the file nor its tag says so.
    public var update: Int64?
    /// As the file or its tag says.
    public var epoch: Int64?
    /// As the file or its tag says.
    public var sample: Int64?
    /// The size of the file.
    public var byteCount: UInt64
    /// When the file was written, in seconds since 1970.
    public var durableAt: Double

    fileprivate var hasAttribute: Bool

    private enum CodingKeys: String, CodingKey {
        case path, name, kind, info, tag, update, epoch, sample
        case byteCount = "bytes"
        case durableAt = "durable_at"
    }

    fileprivate init?(_ file: CheckpointFile, in directory: String) {
        guard !file.kind.isEmpty, !file.tag.isEmpty, !file.name.isEmpty else { return nil }
        path = "\(directory)/checkpoints/\(file.file)"
        (name, info) = (file.name, nil)
        if let found = file.info, !found.isEmpty, file.name.ends(with: "_\(found)") {
            (name, info) = (file.name.dropping(first: 0, last: found.utf8.count + 1), found)
        }
        kind = file.kind
        tag = file.tag
        let inside = kind == "model" ? Self.iteration(of: path) : [:]
        update = inside["update"] ?? file.trainingUpdate
        epoch = inside["epoch"] ?? file.number("E")
        sample = inside["sample"] ?? file.number("S")
        byteCount = file.byteCount
        durableAt = file.modifiedAt
        hasAttribute = file.logUpdate != nil
    }

    /// `training_iteration` of a file that holds it, as Noether's models do. Whether the file is damaged is asked
    /// elsewhere, with all of its checksums.
    private static func iteration(of path: String) -> [String: Int64] {
        guard let content = try? Checkpoint.load(path), let iteration = content["training_iteration"] else {
            return [:]
        }
        var numbers: [String: Int64] = [:]
        for key in ["epoch", "update", "sample"] { numbers[key] = iteration[key]?.intValue }
        return numbers
    }
}

extension Checkpoint {
    /// Which value of a key is the best.
    public enum Best: String, Sendable, CaseIterable {
        /// The lowest.
        case min
        /// The highest.
        case max
    }

    /// Returns the checkpoints of a run, the newest last. The newest is the one that was written last. If a file has
    /// lost the extended attributes that noether-writer gives it, the files were copied, and the times of copies say
    /// nothing: then the highest update is the newest.
    /// - Parameter directory: `<output_root>[/debug]/<run_id>[/<stage_name>]`.
    /// - Returns: none if there is no such directory: the run has not begun.
    /// - Throws: ``NoetherWriterError/storage(path:message:errno:)`` if it is not the directory of a run.
    public static func all(in directory: String) throws(NoetherWriterError) -> [SavedCheckpoint] {
        guard FileFacts(directory) != nil else { return [] }
        let found: [SavedCheckpoint]
        do throws(RunFilesError) {
            let files = try RunFiles(directory)
            found = try files.checkpoints().compactMap { SavedCheckpoint($0, in: files.directory) }
        } catch {
            throw .storage(
                path: directory, message: "\(error)", errno: PosixError.inputOutput(directory).errno)
        }
        if found.allSatisfy(\.hasAttribute) || !found.allSatisfy({ $0.update != nil }) { return found }
        return found.sorted { ($0.update ?? 0, $0.durableAt) < ($1.update ?? 0, $1.durableAt) }
    }

    /// Returns the newest checkpoint of a run that is whole, or nil. A damaged file is left out, and the next older one
    /// is taken.
    /// - Parameters:
    ///   - directory: as for ``all(in:)``.
    ///   - name: only those of this model.
    ///   - kind: only `model`, `optim` or `trainer`; nil: any.
    ///   - info: only those with this info. Nil: those without one, or all if each has one.
    ///   - update: only those of this update.
    ///   - verify: whether the whole file is read and its checksums are compared.
    ///   - damaged: gets each file that is left out, and why.
    /// - Throws: as ``all(in:)``.
    public static func latest(
        in directory: String, name: String? = nil, kind: String? = "model", info: String? = nil,
        update: Int64? = nil, verify: Bool = true, damaged: (SavedCheckpoint, String) -> Void = { _, _ in }
    ) throws(NoetherWriterError) -> SavedCheckpoint? {
        for found in wanted(try all(in: directory), name, kind, info).reversed()
        where update == nil || found.update == update {
            if !verify || isWhole(found, damaged) { return found }
        }
        return nil
    }

    /// Returns the checkpoint at which a key of the log had its best value, or nil. The value of a checkpoint is the
    /// last one up to its update, and after the update of the checkpoint before it. NaN is never the best.
    /// - Parameters:
    ///   - directory: as for ``all(in:)``.
    ///   - values: of the key, by ascending updates; see ``RunLog/values(_:)``.
    ///   - best: whether the lowest or the highest value is the best.
    ///   - name: only those of this model.
    ///   - kind: only `model`, `optim` or `trainer`; nil: any.
    ///   - info: only those with this info. Nil: those without one, or all if each has one.
    ///   - verify: whether the whole file is read and its checksums are compared.
    ///   - damaged: gets each file that is left out, and why.
    /// - Throws: as ``all(in:)``.
    public static func best(
        in directory: String, by values: [(update: Int64, value: Double)], _ best: Best = .min,
        name: String? = nil, kind: String? = "model", info: String? = nil, verify: Bool = true,
        damaged: (SavedCheckpoint, String) -> Void = { _, _ in }
    ) throws(NoetherWriterError) -> SavedCheckpoint? {
        let found = wanted(try all(in: directory), name, kind, info)
        let all = Dictionary(grouping: found, by: { [ByteName($0.name), ByteName($0.kind)] }).values
            .flatMap { rated($0, by: values, best) }
        return all.sorted { $0.isBetter(than: $1) }.first { !verify || isWhole($0.found, damaged) }?.found
    }

    private struct Rated {
        var value: Double
        var update: Int64
        var place: Int
        var found: SavedCheckpoint

        func isBetter(than other: Rated) -> Bool {
            (value, update, place) < (other.value, other.update, other.place)
        }
    }

    /// Checkpoints of which the value of a key is known, and that value, lower if it is better.
    /// - Parameters:
    ///   - series: whose updates follow one another.
    ///   - values: of the key, by ascending updates.
    private static func rated(
        _ series: [SavedCheckpoint], by values: [(update: Int64, value: Double)], _ best: Best
    ) -> [Rated] {
        var before = Int64.min
        var rated: [Rated] = []
        for update in Set(series.compactMap(\.update)).sorted() {
            let value = values.last { $0.update <= update && $0.update > before }?.value
            before = update
            guard let value, !value.isNaN else { continue }
            for (place, each) in series.enumerated() where each.update == update {
                rated.append(Rated(value: best == .min ? value : -value, update: update, place: -place, found: each))
            }
        }
        return rated
    }

    /// Tags of all checkpoints of a run of which the value of a key is known, the best one first: those that
    /// `keep_best` of the Python library keeps are at the beginning.
    package static func tags(
        in directory: String, by values: [(update: Int64, value: Double)], _ best: Best
    ) throws(NoetherWriterError) -> [String] {
        var seen: Set<ByteName> = []
        return rated(try all(in: directory), by: values, best).sorted { $0.isBetter(than: $1) }.map(\.found.tag)
            .filter { seen.insert(ByteName($0)).inserted }
    }

    /// Returns the update at which a run can be resumed, or nil if it has no checkpoint: the newest one of which all
    /// files are whole, and of which another update has no file (by name and kind) beyond those. A crash may leave a
    /// new file of the model beside an old one of its optimizer.
    static func resumableUpdate(in directory: String) throws(NoetherWriterError) -> Int64? {
        let found = try all(in: directory)
        var members: [(update: Int64, files: [SavedCheckpoint])] = []
        for each in found.reversed() {
            guard let update = each.update else { continue }
            if let place = members.firstIndex(where: { $0.update == update }) {
                members[place].files.append(each)
            } else {
                members.append((update, [each]))
            }
        }
        let series = members.map { Set($0.files.map { [ByteName($0.name), ByteName($0.kind)] }) }
        for (place, member) in members.enumerated() {
            if series.contains(where: { series[place].isStrictSubset(of: $0) }) { continue }
            if member.files.allSatisfy({ isWhole($0) { _, _ in } }) { return member.update }
        }
        let entries = "\(directory)/tracker/entries.th"
        guard found.isEmpty || !members.isEmpty || FileFacts(entries) == nil else {
            throw .unsupportedValue(
                "resume: .auto: none of the checkpoints in \(directory)/checkpoints says its update (their extended "
                    + "attributes are lost, and their tags hold none), so nobody knows which part of the log \(entries) "
                    + "belongs to them. Nothing was changed; open the run with resumeAt:, the last update to keep")
        }
        return nil
    }

    /// Waits until the daemon, if one is there, has written what an earlier process of this run has handed to it.
    static func waitForRun(_ runID: String, socket: String, _ speaker: Speaker) {
        do throws(NoetherWriterError) {
            let connection = try DaemonConnection(socket: socket, startsDaemon: false, Variables()) { _, _ in }
            defer { connection.close() }
            let seconds = Patience.stallSeconds
            let waited = try connection.ask(
                .wait, WaitRequest(runID: runID, timeoutSeconds: seconds), Waited.self, fd: nil,
                timeout: .seconds(seconds) + DaemonConnection.answerTime)
            for failure in waited.stalled ?? [] {
                speaker.warn("\(failure.path) of an earlier process is not written yet: \(failure.message)")
            }
        } catch {
            if error.code == .daemonNotFound || error.code == .unknownRun { return }
            speaker.warn("whether the last checkpoints of run \(runID) are written is not known: \(error)")
        }
    }

    private static func wanted(
        _ all: [SavedCheckpoint], _ name: String?, _ kind: String?, _ info: String?
    ) -> [SavedCheckpoint] {
        let found = all.filter { each in
            (name.map { each.name.isSame(as: $0) } ?? true) && (kind.map { each.kind == $0 } ?? true)
        }
        let exact = found.filter { $0.info.map(ByteName.init) == info.map(ByteName.init) }
        return exact.isEmpty && info == nil ? found : exact
    }

    private static func isWhole(_ found: SavedCheckpoint, _ damaged: (SavedCheckpoint, String) -> Void) -> Bool {
        do {
            let file = try MappedFile(found.path)
            defer { withExtendedLifetime(file) {} }
            _ = try ArchiveVerifier(file.bytes).verify()
            return true
        } catch {
            damaged(found, "\(error)")
            return false
        }
    }
}
