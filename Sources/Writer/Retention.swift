// SPDX-License-Identifier: Apache-2.0
/// Which older checkpoints of a run are removed when a newer one is durable: those with a tag of progress (`E1_U200_S800`, or
/// some of the three, as Noether names them), of the same name, info, kind and letters. Any other tag is kept for ever. Off by default.
import Posix
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

    /// What a run brings, and of the rest these.
    func with(_ run: RunIdentity) -> Retention {
        Retention(keepLast: max(0, run.keepLast ?? keepLast), keepEvery: max(0, run.keepEvery ?? keepEvery))
    }

    /// A tag of progress, as numbers in the order in which they are compared.
    struct Progress: Equatable {
        /// Those of E, U, S that the tag has, in this order.
        var letters: String
        var numbers: [UInt64]

        init?(_ tag: some StringProtocol) {
            let order = "EUS"
            letters = ""
            numbers = []
            for part in tag.split(separator: "_", omittingEmptySubsequences: false) {
                let digits = part.dropFirst()
                guard let letter = part.first, let place = order.firstIndex(of: letter),
                    letters.last.map({ order.firstIndex(of: $0)! < place }) ?? true,
                    !digits.isEmpty, digits.allSatisfy({ $0.isASCII && $0.isNumber }),
                    digits == "0" || digits.first != "0", let number = UInt64(digits)
                else { return nil }
                letters.append(letter)
                numbers.append(number)
            }
        }

        func number(_ letter: Character) -> UInt64? {
            zip(letters, numbers).first { $0.0 == letter }?.1
        }

        var counted: UInt64 { number("U") ?? number("E") ?? numbers[0] }

        func isBefore(_ other: Progress) -> Bool {
            for letter in "USE" {
                guard let own = number(letter), let others = other.number(letter), own != others else {
                    continue
                }
                return own < others
            }
            return false
        }
    }

    /// - Parameters:
    ///   - successor: of the file that is durable now: `<beginning><tag><end>`.
    ///   - names: in its directory.
    /// - Returns: which of them go, the oldest first.
    func removable(
        behind tag: String, beginning: String, end: String, among names: [String]
    ) -> [String] {
        guard keepLast > 0, let newest = Progress(tag) else { return [] }
        var older: [(name: String, progress: Progress)] = []
        for name in names where name.begins(with: beginning) && name.ends(with: end) {
            guard name.utf8.count > beginning.utf8.count + end.utf8.count,
                let progress = Progress(
                    name.dropping(first: beginning.utf8.count, last: end.utf8.count)),
                // guard: own-letters-only (always: progress.letters == newest.letters)
                // guard: older-only (always: progress.isBefore(newest))
                progress.letters == newest.letters, progress.isBefore(newest)
            else { continue }
            older.append((name, progress))
        }
        older.sort { $0.progress.isBefore($1.progress) }
        return older.dropLast(keepLast - 1).filter {
            // guard: every-kth-stays (always: keepEvery == 0)
            keepEvery == 0 || $0.progress.counted % UInt64(keepEvery) != 0
        }.map(\.name)
    }

    /// On a disk queue, behind the moment at which the successor is durable: reads it back from the disk with all its checksums, and
    /// only then removes what has had its time.
    /// - Returns: what was removed, and why the rest was not.
    func apply(
        behind target: Snapshot.Target, in directory: Directory
    ) -> (removed: [String], problem: String?) {
        var removed: [String] = []
        do throws(PosixError) {
            let names = removable(
                behind: target.tag, beginning: target.beginning, end: target.end,
                among: try directory.names())
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
        of target: Snapshot.Target, in directory: Directory
    ) throws(PosixError) -> ArchiveDamage? {
        let file = try ReadFile(target.fileName, in: directory)
        guard file.byteCount == target.byteCount else {
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
