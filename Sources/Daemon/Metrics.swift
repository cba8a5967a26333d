// SPDX-License-Identifier: Apache-2.0
/// The daemon's metrics: what the Writer and the connections count, with names as Prometheus' conventions have them
/// (https://prometheus.io/docs/practices/naming/). Made when asked for. How many series there are is bounded, whatever
/// runs come: a few living runs are told apart, the others are in the sums. Owned by the daemon's queue.
import Posix
import Wire
import Writer

@DaemonActor
final class Metrics {
    /// Living runs that are told apart: those that are silent longest.
    private static let runs = 50
    /// Of their labels, once: each name stands in some seven samples, and all of it in one frame.
    private static let labelBytes = 64 << 10
    private static let prefix = "noether_writer_"

    private let startedAt = Clock.wallSeconds
    private var connections: UInt64 = 0
    private var refusals = Dictionary(
        uniqueKeysWithValues: WireError.Code.allCases.map { ($0.rawValue, UInt64(0)) })

    func accepted() { connections += 1 }
    func refused(_ code: WireError.Code) { refusals[code.rawValue, default: 0] += 1 }

    /// Several users' daemons may be told apart by nothing else.
    private let user = ThisProcess.userName
    private let space = DiskSpace()

    func text(_ format: MetricsText.Format, of daemon: Daemon) -> String {
        var text = MetricsText(format, labels: [("user", user)])
        let runs = daemon.runs.all
        aboutDaemon(daemon, &text)
        aboutLogs(daemon.runs.measures, runs, &text)
        aboutCheckpoints(daemon.runs, runs, &text)
        aboutRuns(runs, opened: daemon.runs.measures.runs, &text)
        text.end()
        return text.text
    }

    private func aboutDaemon(_ daemon: Daemon, _ text: inout MetricsText) {
        text.info(Self.prefix + "build", "The daemon's version.", [("version", Release.version)])
        text.gauge(Self.prefix + "start_time_seconds", "When the daemon started, since 1970.", startedAt)
        if let lifetime = daemon.lifetime.counts {
            text.counter(
                Self.prefix + "starts", "Starts of this user's daemon on this host, also before this one.",
                lifetime.starts)
            text.counter(
                Self.prefix + "files_lost",
                "Files that were accepted and are lost: when a daemon stopped, or because the next one could not restore them.",
                by: "at", ["start": lifetime.lostAtStart, "stop": lifetime.lostAtStop])
        }
        text.gauge(
            Self.prefix + "settings_wrong",
            "1 if the settings cannot be read, and older ones or the defaults are used.",
            daemon.settingsProblem == nil ? 0 : 1)
        let memory = ThisProcess.memory
        text.gauge(
            Self.prefix + "memory_bytes",
            "Resident memory: the daemon's own, and what it shares with trainers whose checkpoints it holds.",
            [([("kind", "own")], Double(memory.own)), ([("kind", "shared")], Double(memory.shared))])
        text.counter(
            Self.prefix + "cpu_seconds", "Of all threads.", [(labels: [], value: ThisProcess.cpuSeconds)])
        text.gauge(Self.prefix + "connections", "Open connections.", Double(daemon.connectionCount))
        text.gauge(
            Self.prefix + "subscriptions", "Streams that are open: of runs, and of the daemon.",
            Double(daemon.subscriptionCount))
        text.counter(Self.prefix + "connections_accepted", "Connections taken.", connections)
        text.gauge(
            Self.prefix + "connection_buffers_bytes",
            "What connections hold of unfinished and unread frames.",
            Double(daemon.heldByteCount))
        text.counter(
            Self.prefix + "refusals",
            "Frames that were refused, by the error's code (docs/PROTOCOL.md, section 7).",
            by: "code", refusals)
    }

    private func aboutLogs(_ measures: Measures, _ runs: [Run], _ text: inout MetricsText) {
        let logs = runs.map(\.log)
        text.counter(Self.prefix + "log_updates", "Updates of logs taken.", measures.updates)
        text.counter(Self.prefix + "log_scalars", "Values in them.", measures.scalars)
        text.counter(Self.prefix + "journal_bytes", "Bytes written to journals.", measures.journalBytes)
        text.gauge(
            Self.prefix + "log_memory_bytes", "What logs take in memory, about.",
            Double(logs.reduce(0) { $0 + $1.columns.byteCount }))
        text.gauge(
            Self.prefix + "journal_lag_updates",
            "Updates that are in no journal yet: they are lost if the daemon dies.",
            Double(logs.reduce(0) { $0 + $1.rowsNotWritten }))
        text.gauge(
            Self.prefix + "durable_lag_updates", "Updates that power loss would take.",
            Double(logs.reduce(0) { $0 + $1.rowsNotDurable }))
        text.histogram(
            Self.prefix + "journal_write_seconds",
            "From an update's arrival until it survives the daemon; the oldest of each group.",
            measures.journaled)
        text.histogram(
            Self.prefix + "journal_durable_seconds",
            "From an update's arrival until it survives power loss; the oldest of each group.",
            measures.synced)
        text.counter(Self.prefix + "log_files", "Times that an entries.th became durable.", measures.logFiles)
    }

    private func aboutCheckpoints(_ store: RunStore, _ runs: [Run], _ text: inout MetricsText) {
        let measures = store.measures
        let statuses = runs.map(\.status.checkpoints) + [store.paths.status?.checkpoints].compactMap { $0 }
        text.counter(
            Self.prefix + "saves_accepted", "Snapshots taken, each of one file or several.", measures.saves)
        text.gauge(
            Self.prefix + "checkpoints_in_flight", "Files accepted, and neither durable nor failed.",
            Double(statuses.reduce(0) { $0 + $1.inFlight }))
        text.gauge(
            Self.prefix + "checkpoints_in_flight_bytes", "Their bytes, all of them in memory.",
            Double(statuses.reduce(0) { $0 + $1.bytesInFlight }))
        text.gauge(
            Self.prefix + "checkpoints_in_flight_written_bytes", "Of these, what the file system has.",
            Double(statuses.reduce(0) { $0 + ($1.bytesWritten ?? 0) }))
        text.counter(Self.prefix + "checkpoints_durable", "Files that became durable.", measures.checkpoints)
        text.counter(
            Self.prefix + "checkpoint_written_bytes", "Bytes of files that became durable.",
            measures.checkpointBytes)
        text.counter(
            Self.prefix + "checkpoints_removed", "Files removed by keep_last.", measures.removedCheckpoints)
        text.histogram(
            Self.prefix + "checkpoint_durable_seconds", "From a save's acceptance to a durable file.",
            measures.durable)
        text.histogram(
            Self.prefix + "checkpoint_write_seconds", "Of writing one file, to durable.", measures.writing)
        text.histogram(
            Self.prefix + "checkpoint_size_bytes", "Sizes of files that became durable.", measures.sizes)
        text.counter(
            Self.prefix + "file_failures", "Files given up, by reason.", by: "reason", measures.failures)
        text.counter(
            Self.prefix + "file_stalls", "Times that storage refused a file for now, by reason.",
            by: "reason",
            measures.stalls)
        text.gauge(
            Self.prefix + "snapshot_budget_bytes", "The setting snapshot_bytes.", Double(store.budget.limit))
        text.gauge(
            Self.prefix + "snapshot_free_bytes", "What is left of it for new checkpoints.",
            Double(store.budget.limit - min(store.budget.held, store.budget.limit)))
        let vault = store.vault
        text.gauge(
            Self.prefix + "restore_held_bytes",
            "What durable files take in memory, for whoever loads them on this node.",
            Double(vault.byteCount))
        text.counter(
            Self.prefix + "restores", "Questions for a file in memory, by the answer.", by: "answer",
            ["given": vault.given, "missed": vault.missed])
        text.counter(
            Self.prefix + "restore_given_up", "Files that left memory because it was short.", vault.givenUp)
        text.gauge(
            Self.prefix + "disk_progress_timestamp_seconds",
            "When the running work of a disk queue that has been silent longest last moved, since 1970; now if none runs.",
            store.queueDepths.map { depth in
                let last = depth.oldestProgressSeconds ?? Clock.monotonicSeconds
                return (labels: [("queue", depth.name)], value: Self.wall(last))
            })
        text.gauge(
            Self.prefix + "disk_queue_depth", "Pieces of work for the disk queues.",
            store.queueDepths.flatMap { depth in
                [
                    (labels: [("queue", depth.name), ("state", "running")], value: Double(depth.running)),
                    (labels: [("queue", depth.name), ("state", "waiting")], value: Double(depth.waiting)),
                ]
            })
    }

    private func aboutRuns(_ runs: [Run], opened: UInt64, _ text: inout MetricsText) {
        let live = runs.filter(\.isLive)
        text.gauge(Self.prefix + "runs_live", "Runs that a trainer has open.", Double(live.count))
        text.gauge(
            Self.prefix + "runs_stalled", "Runs that storage refuses now.",
            Double(runs.filter { $0.stalled != nil }.count))
        text.counter(
            Self.prefix + "runs_opened", "Runs that came, also those brought back after a crash.", opened)
        let shown = shown(live)
        text.gauge(
            Self.prefix + "runs_left_out", "Live runs that are not told apart below.",
            Double(live.count - shown.count))
        func each(_ name: String, _ help: String, _ value: (Run) -> Double?) {
            text.gauge(
                Self.prefix + "run_" + name, help,
                shown.compactMap { run in value(run).map { (labels: Self.labels(run), value: $0) } })
        }
        each("last_update", "Its number.") { $0.log.columns.lastUpdate.map(Double.init) }
        each("last_update_timestamp_seconds", "When an update came, since 1970.") { run in
            run.log.lastUpdateAgeSeconds.map { Self.wall(Clock.monotonicSeconds - $0) }
        }
        each("journal_lag_updates", "Updates that are in no journal yet.") { Double($0.log.rowsNotWritten) }
        each("durable_lag_updates", "Updates that power loss would take.") { Double($0.log.rowsNotDurable) }
        each("checkpoints_in_flight_bytes", "Bytes of files that are neither durable nor failed.") {
            Double($0.status.checkpoints.bytesInFlight)
        }
        each("last_checkpoint_timestamp_seconds", "When a file became durable, since 1970.") { run in
            run.outcomes.lastDurableSeconds.map(Self.wall)
        }
        let free = space.free(Array(shown))
        each("disk_free_bytes", "What its file system has left for this user.") {
            free[$0.name.directory].map { Double($0.free) }
        }
        each("disk_free_timestamp_seconds", "When its file system said so, since 1970.") { free[$0.name.directory]?.at }
        each("stalled", "1 if storage refuses.") { $0.stalled == nil ? 0 : 1 }
    }

    /// A time on the monotonic clock as one since 1970, to a hundredth: the two clocks do not stay together exactly.
    private static func wall(_ seconds: Double) -> Double {
        ((Clock.wallSeconds - Clock.monotonicSeconds + seconds) * 100).rounded() / 100
    }

    private func shown(_ live: [Run]) -> ArraySlice<Run> {
        let silent = live.map { (run: $0, age: $0.log.lastUpdateAgeSeconds ?? 0) }.sorted { $0.age > $1.age }
        var bytes = 0
        return silent.prefix(Self.runs).map(\.run).prefix { run in
            bytes += Self.labels(run).reduce(0) { $0 + $1.value.utf8.count }
            return bytes <= Self.labelBytes
        }
    }

    /// The id is what people know it by, the directory what tells it from all others.
    private static func labels(_ run: Run) -> MetricsText.Labels {
        [("run_id", run.name.runID), ("directory", run.name.directory)]
    }
}
