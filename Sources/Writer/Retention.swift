// SPDX-License-Identifier: Apache-2.0
/// Which older checkpoints of a run are removed when a newer one is durable: those whose tag has a number (`E1_U200_S800`,
/// `step-1000`, `0042`), of the same name, info, kind and scheme. Any other tag is kept for ever. Off by default.
package import Posix
package import RunFiles
import TorchFile
import Wire

public struct Retention: Sendable, Equatable {
    /// How many are kept, the newest ones; 0 keeps all.
    public var keepLast: Int
    /// Beyond these, those whose update (else epoch, else sample) is a multiple of this; 0 for none.
    public var keepEvery: Int

    public init(keepLast: Int, keepEvery: Int) {
        self.keepLast = keepLast
        self.keepEvery = keepEvery
    }

    /// Tags without a number that mean what they say: nobody expects that such a checkpoint is removed.
    static let names: Set<String> = ["latest", "last", "best", "final"]

    /// A checkpoint that is durable, and what is known of the older ones of its name, info and kind.
    package struct Newest: Sendable {
        package let fileName: String
        let tag: String
        /// The file's name is `<beginning><tag><end>`.
        let beginning: String
        let end: String
        /// Tags of older files that stay, whatever their number.
        let kept: [String]
        /// nil: whatever the file has.
        let byteCount: UInt64?

        init(_ target: Snapshot.Target) {
            (fileName, tag, beginning, end) = (target.fileName, target.tag, target.beginning, target.end)
            (kept, byteCount) = (target.kept, target.byteCount)
        }

        /// The newest checkpoint for each combination of name, info, kind and scheme of tags.
        /// - Parameter kept: tags of files that stay, whatever their number.
        package static func all(among files: [CheckpointFile], keeping kept: [String]) -> [Newest] {
            var found: [[ByteName]: (newest: CheckpointFile, progress: Progress)] = [:]
            for file in files where !file.kind.isEmpty {
                guard let progress = Progress(file.tag) else { continue }
                let family = [ByteName(file.name), ByteName(file.kind), ByteName(progress.scheme)]
                if let known = found[family], !known.progress.isBefore(progress) { continue }
                found[family] = (file, progress)
            }
            return found.values.map { Newest($0.newest, kept) }
                .sorted { ByteName($0.fileName) < ByteName($1.fileName) }
        }

        private init(_ file: CheckpointFile, _ kept: [String]) {
            (fileName, tag, beginning, end) = (file.file, file.tag, "\(file.name)_cp=", "_\(file.kind).th")
            (self.kept, byteCount) = (kept, nil)
        }
    }

    /// Whether a tag has numbers that say which checkpoint is older: of others none is removed.
    package static func understands(_ tag: String) -> Bool { Progress(tag) != nil }

    /// What a run brings, and of the rest these.
    func with(_ run: RunIdentity) -> Retention {
        Retention(keepLast: max(0, run.keepLast ?? keepLast), keepEvery: max(0, run.keepEvery ?? keepEvery))
    }

    /// A tag as numbers, in the order in which they are compared. Of `E1_U200_S800` or `epoch=3-step=100` those count that
    /// a word of progress names: the update first. Of a tag without such a word all do, from left to right.
    struct Progress: Equatable {
        /// The tag without these numbers: only tags of one scheme are compared. What has a decimal point was measured,
        /// and is no part of it.
        var scheme: String
        var numbers: [UInt64]
        /// What `keepEvery` counts.
        var counted: UInt64

        private enum Word: Int { case update, sample, epoch }

        private struct Part {
            var text: [UInt8]
            var digits: ArraySlice<UInt8>
            var number: UInt64
            var word: Word?
        }

        init?(_ tag: some StringProtocol) {
            let bytes = Array(tag.utf8)
            var parts: [Part] = []
            var text: [UInt8] = []
            var at = 0
            while at < bytes.count {
                guard Self.isDigit(bytes[at]) else {
                    text.append(bytes[at])
                    at += 1
                    continue
                }
                let start = at
                at = bytes[at...].firstIndex { !Self.isDigit($0) } ?? bytes.count
                if at + 1 < bytes.count, bytes[at] == UInt8(ascii: "."), Self.isDigit(bytes[at + 1]) {
                    at = bytes[at...].firstIndex { !Self.isDigit($0) && $0 != UInt8(ascii: ".") } ?? bytes.count
                    text.append(Self.measured)
                    continue
                }
                let digits = bytes[start..<at]
                guard let number = UInt64(String(decoding: digits, as: UTF8.self)) else { return nil }
                let word = Self.word(before: text, isFirst: parts.isEmpty)
                parts.append(Part(text: text, digits: digits, number: number, word: word))
                text = []
            }
            let hasWords = parts.contains { $0.word != nil }
            let counting = hasWords ? parts.filter { $0.word != nil } : parts
            guard let first = counting.first else { return nil }
            func number(_ word: Word) -> UInt64? { counting.first { $0.word == word }?.number }
            counted = number(.update) ?? number(.epoch) ?? first.number
            let order = counting.enumerated().sorted {
                let (one, other) = ($0.element.word?.rawValue ?? 0, $1.element.word?.rawValue ?? 0)
                return (one, $0.offset) < (other, $1.offset)
            }
            numbers = order.map(\.element.number)
            let named = parts.flatMap { part in
                part.text + (hasWords && part.word == nil ? Array(part.digits) : [Self.counts])
            }
            scheme = String(decoding: named + text, as: UTF8.self)
        }

        /// In the place of numbers in a scheme; no name holds these bytes.
        private static let counts: UInt8 = 0
        private static let measured: UInt8 = 1

        private static func isDigit(_ byte: UInt8) -> Bool { (UInt8(ascii: "0")...UInt8(ascii: "9")).contains(byte) }

        private static func isLetter(_ byte: UInt8) -> Bool { byte >= 0x80 || (byte | 0x20) &- UInt8(ascii: "a") < 26 }

        /// `E`, `U` and `S` stand directly before their number, and longer words may be followed by `=`, `-` and such.
        private static func word(before text: [UInt8], isFirst: Bool) -> Word? {
            let letters = text.reversed().drop { !isLetter($0) }.prefix(while: isLetter)
            let word = String(decoding: letters.reversed(), as: UTF8.self)
            let isBeginning = text.count == word.utf8.count
            if word.utf8.count == 1 {
                guard text.last.map(isLetter) == true, isFirst || !isBeginning else { return nil }
                return ["U": .update, "S": .sample, "E": .epoch][word]
            }
            switch word.lowercased() {
            case "update", "updates", "step", "steps", "iter", "iteration", "iterations": return .update
            case "sample", "samples": return .sample
            case "epoch", "epochs", "ep": return .epoch
            default: return nil
            }
        }

        func isBefore(_ other: Progress) -> Bool { numbers.lexicographicallyPrecedes(other.numbers) }
    }

    /// - Parameter names: in the directory of the file that is durable now.
    /// - Returns: which of them go, the oldest first.
    package func removable(behind file: Newest, among names: [String]) -> [String] {
        let kept = Set(file.kept.map(ByteName.init))
        guard keepLast > 0, let newest = Progress(file.tag) else { return [] }
        var older: [(name: String, tag: String, progress: Progress)] = []
        for name in names where name.begins(with: file.beginning) && name.ends(with: file.end) {
            guard name.utf8.count > file.beginning.utf8.count + file.end.utf8.count else { continue }
            let tag = String(name.dropping(first: file.beginning.utf8.count, last: file.end.utf8.count))
            guard let progress = Progress(tag),
                // guard: own-scheme-only (always: progress.scheme == newest.scheme)
                // guard: older-only (always: progress.isBefore(newest))
                progress.scheme == newest.scheme, progress.isBefore(newest)
            else { continue }
            older.append((name, tag, progress))
        }
        older.sort { $0.progress.isBefore($1.progress) }
        return older.dropLast(keepLast - 1).filter {
            // guard: every-kth-stays (always: keepEvery == 0)
            // guard: kept-tag-stays (always: !kept.contains(ByteName($0.tag)))
            (keepEvery == 0 || $0.progress.counted % UInt64(keepEvery) != 0) && !kept.contains(ByteName($0.tag))
        }.map(\.name)
    }

    /// On a disk queue, behind the moment at which the successor is durable: reads it back from the disk with all its checksums, and
    /// only then removes what has had its time.
    /// - Returns: what was removed, and why the rest was not.
    package func apply(behind target: Newest, in directory: Directory) -> (removed: [String], problem: String?) {
        var removed: [String] = []
        do throws(PosixError) {
            let names = removable(behind: target, among: try directory.names())
            guard !names.isEmpty else { return ([], nil) }
            Faults.interrupt(at: "retention.verify")
            if let damage = try damage(of: target, in: directory) {  // guard: successor-verified (never)
                return ([], "\(target.fileName) does not verify (\(damage)): nothing older is removed")
            }
            Faults.interrupt(at: "retention.verified")
            for name in names where try directory.isOwnFile(name) {  // guard: removes-own-files-only (always)
                try directory.remove(name)
                removed.append(name)
                Faults.interrupt(at: "retention.removed")
            }
            try directory.sync()
            return (removed, nil)
        } catch { return (removed, "older checkpoints were not removed: \(error)") }
    }

    private func damage(
        of target: Newest, in directory: Directory
    ) throws(PosixError) -> ArchiveDamage? {
        let file = try ReadFile(target.fileName, in: directory)
        guard file.byteCount == target.byteCount ?? file.byteCount else {
            return ArchiveDamage(place: target.fileName, problem: "has \(file.byteCount) bytes")
        }
        var failure: PosixError?
        let verifier = ArchiveVerifier(byteCount: file.byteCount) { offset, buffer in
            do throws(PosixError) { try file.read(at: offset, into: buffer) } catch { failure = error }
            return failure == nil
        }
        do throws(ArchiveDamage) {
            _ = try verifier.verify()
            return nil
        } catch {
            if let failure { throw failure }
            return error
        }
    }
}
