# SPDX-License-Identifier: Apache-2.0
"""noether-writer, the command line tool, against a real daemon and real files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from subprocess import PIPE
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon

CLI = str(Path(DAEMON).parent / "noether-writer")


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLI, *arguments], capture_output=True, text=True, timeout=60)


def test_status_runs_and_wait(daemon: Any, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 1.0}, update=7)
        run.save("net", "E1", {"w": torch.ones(1000)}).wait(30)
        assert cli("wait", "r", "--timeout", "30").stdout == "all durable\n"
        status = json.loads(cli("status", "--json").stdout)
        assert status["pid"] == daemon.process.pid and status["socket"] == daemon.socket
        [entry] = status["runs"]
        assert (entry["run_id"], entry["last_update"], entry["state"]) == ("r", 7, "running")
        assert (entry["checkpoints"]["durable"], entry["checkpoints"]["in_flight"]) == (1, 0)
    assert "finished" in cli("runs").stdout
    assert "1 ended" in cli("status").stdout


@pytest.mark.parametrize("command", ["status", "runs", "wait", "drain", "top", "stop"])
def test_no_daemon_says_so(short_directory: Path, command: str) -> None:
    result = cli(command, "--socket", str(short_directory / "none"))
    assert (result.returncode, result.stdout) == (3, "") and "no daemon listens" in result.stderr


def test_exit_codes_are_those_of_the_help(daemon: Any, tmp_path: Path) -> None:
    text = " ".join(cli("--help").stdout.split())
    for words in ("0 done", "1 something failed", "2 not done within", "3 no daemon", "4 there is no such", "64 wrong"):
        assert words in text
    assert cli("show", "nobody").returncode == 4
    assert cli("wait", "nobody").returncode == 4
    # Files alone have nothing in flight.
    (tmp_path / "old/tracker").mkdir(parents=True)
    assert cli("show", str(tmp_path / "old")).returncode == 0 and cli("wait", str(tmp_path / "old")).returncode == 4
    assert cli("plot", "nobody", "loss").returncode == 4
    assert cli("plot").returncode == 64 and cli("plot", "r", "loss", "--smooth", "1").returncode == 64
    assert cli("plot", "r", "loss", "--out", "x.gif").returncode == 64
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"loss": 1.0, "word": "a"}, update=1)
    assert run.values("loss") == [1.0]
    unknown = cli("plot", "r", "los")
    assert unknown.returncode == 4 and "it has loss, word" in unknown.stderr
    assert cli("plot", "r", "word").returncode == 4
    for command in (["export", "r", "-k", "los"], ["best", "r", "los"]):
        unknown = cli(*command)
        assert unknown.returncode == 4 and "close to it: loss; it has loss, word" in unknown.stderr
    run.close()


def test_wait_says_what_is_not_durable(daemon: Any, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        run.save("net", "E1", {"w": torch.ones(1000)})
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)
    result = cli("wait", str(tmp_path / "r"), "--json")
    whole = {"done": True, "failed": [], "pending": 0, "stalled": []}
    assert result.returncode == 0 and json.loads(result.stdout) == whole
    assert cli("drain", "--timeout", "30").stdout == "all durable\n"
    assert json.loads(cli("drain", "--json").stdout)["done"] is True
    run.close()


def test_wait_times_out_while_storage_refuses(daemon: Any, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    # No file can be renamed over a directory that is not empty: it fails for good.
    (tmp_path / "r/checkpoints/net_cp=E1_model.th/x").mkdir(parents=True)
    ticket = run.save("net", "E1", {"w": torch.ones(1000)})
    with pytest.raises(noether_writer.NoetherWriterError):
        ticket.wait(30)
    for command in ("wait", "drain"):
        result = cli(command)
        assert result.returncode == 1 and "failed  " in result.stdout and "net_cp=E1_model.th" in result.stdout
    assert "1 failed" in cli("status").stdout
    [row] = json.loads(cli("checkpoints", "r", "--json").stdout)
    assert (row["state"], row["tag"]) == ("failed", "E1") and row["error"]
    run.close()


def test_verify_names_the_broken_record(daemon: Any, tmp_path: Path) -> None:
    content = {"a": torch.arange(1000.0), "b": torch.ones(5)}
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 1.0}, update=1)
        ticket = run.save("net", "E1", content)
        ticket.wait(30)
    torch.save(content, tmp_path / "torch.th")
    ours = Path(ticket.paths[0])
    whole = cli("verify", str(ours), str(tmp_path / "torch.th"), str(tmp_path / "r/tracker/entries.th"))
    assert whole.returncode == 0, whole.stdout
    data = bytearray(ours.read_bytes())
    with zipfile.ZipFile(ours) as archive:
        [header] = [i.header_offset for i in archive.infolist() if i.filename.endswith("data/1")]
    payload = header + 30 + int.from_bytes(data[header + 26 : header + 28], "little")
    payload += int.from_bytes(data[header + 28 : header + 30], "little")
    data[payload] ^= 1
    broken = tmp_path / "broken.th"
    broken.write_bytes(data)
    result = cli("verify", str(broken))
    assert result.returncode == 1 and "data/1" in result.stdout
    broken.write_bytes(ours.read_bytes()[:-10])
    assert "end record" in cli("verify", str(broken)).stdout
    assert cli("verify", str(tmp_path / "missing")).returncode == 1


def test_verify_takes_a_whole_run(daemon: Any, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 1.0}, update=1)
        ticket = run.save("net", "E1", {"w": torch.ones(10)})
        ticket.wait(30)
    results = json.loads(cli("verify", str(tmp_path / "r"), "--json").stdout)
    assert [(Path(r["path"]).name, r["is_whole"]) for r in results] == [
        ("entries.th", True),
        ("net_cp=E1_model.th", True),
    ]
    Path(ticket.paths[0]).write_bytes(b"no zip")
    broken = cli("verify", str(tmp_path / "r"))
    assert broken.returncode == 1 and "net_cp=E1_model.th: BROKEN" in broken.stdout


def test_checkpoints_and_show_of_a_living_run(daemon: Any, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    for update in range(1, 51):
        run.log({"loss": 1 / update, "lr": 1e-5}, update=update)
    before = time.time()
    run.save("net", "E1_U40_S80", {"w": torch.ones(250_000)}).wait(30)
    run.save("net", "latest", {"w": torch.ones(10)}, kind="optim").wait(30)
    rows = json.loads(cli("checkpoints", "r", "--json").stdout)
    assert [(row["name"], row["tag"], row["kind"], row["state"]) for row in rows] == [
        ("net", "E1_U40_S80", "model", "durable"),
        ("net", "latest", "optim", "durable"),
    ]
    # The log's update, not the tag's.
    assert [row["update"] for row in rows] == [50, 50]
    assert rows[0]["bytes"] == (tmp_path / "r/checkpoints/net_cp=E1_U40_S80_model.th").stat().st_size
    assert before <= rows[0]["durable_at"] <= time.time() and 0 < rows[0]["seconds"] < 30
    text = cli("checkpoints", "r").stdout
    assert re.search(r"net +E1_U40_S80 +model +97\d\.\d KiB +50 +[\d.]+ m?s +20", text)
    shown = json.loads(cli("show", "r", "--json").stdout)
    assert (shown["run_id"], shown["state"], shown["last_update"]) == ("r", "running", 50)
    assert shown["run"]["pid"] == os.getpid() and before - 60 < shown["run"]["last_update_at"] <= time.time()
    assert shown["keys"] == [
        {"key": "loss", "values": 50, "last_update": 50, "last_value": "0.02"},
        {"key": "lr", "values": 50, "last_update": 50, "last_value": "1e-05"},
    ]
    assert len(shown["checkpoints"]) == 2
    text = cli("show", "r").stdout
    assert re.search(rf"process +{os.getpid()} on ", text) and re.search(r"last update +50, \d+ s ago", text)
    assert re.search(r"log is safe +to \d+ from power loss|log is safe +nothing yet", text)
    # Found by its directory too.
    assert json.loads(cli("show", str(tmp_path / "r"), "--json").stdout)["run"]["pid"] == os.getpid()
    run.finish()
    run.close()
    assert "all of it is in tracker/entries.th" in cli("show", "r").stdout


def test_show_says_what_of_the_log_is_safe(
    short_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The journal's file is made with what is there, and what is appended to it never reaches the disk.
    monkeypatch.setenv("NOETHER_WRITER_FAULTS", "journal.write=hang")
    running = RunningDaemon(str(short_directory / "d" / "socket"))
    # Not for the one that the trainer starts in its place.
    monkeypatch.delenv("NOETHER_WRITER_FAULTS")
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", running.socket)
    run = noether_writer.open_run(tmp_path, "r")
    try:
        run.log({"loss": 1.0}, update=1)
        run.flush(30)
        run.log({"loss": 1.0}, update=2)
        # Answered in order: the daemon has both.
        assert run.values("loss") == [1.0, 1.0]
        shown = json.loads(cli("show", "r", "--json").stdout)["run"]
        assert (shown["last_update"], shown["log_written_update"], shown["log_durable_update"]) == (2, 1, 1)
        assert "to 1 from power loss, to 1 from the daemon's death" in cli("show", "r").stdout
    finally:
        running.process.kill()
        running.process.wait()
        run.close()


def test_tail_follows_to_the_end(daemon: Any, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    for update in range(1, 21):
        run.log({"train/loss": 1 / 3, "val/acc": update / 100, "note": "a\x1b[2Jb"}, update=update)
    run.flush(30)
    tail = subprocess.Popen([CLI, "tail", "r", "-n", "2", "-k", "train/*", "-k", "note"], stdout=PIPE, text=True)
    try:
        assert tail.stdout is not None
        lines = [tail.stdout.readline() for _ in range(2)]
        assert [line.split()[1] for line in lines] == ["19", "20"]
        assert "train/loss=0.333333" in lines[0] and "val/acc" not in lines[0]
        # Nothing that was logged steers the terminal.
        assert "\x1b" not in lines[0] and "note=a\ufffd[2Jb" in lines[0]
        run.log({"train/loss": float("nan")}, update=21)
        assert "train/loss=nan" in tail.stdout.readline()
        run.save("net", "E1", {"w": torch.ones(10)}).wait(30)
        run.finish()
        run.close()
        rest = tail.stdout.read()
        assert re.search(r"durable net_cp=E1_model.th, [\d.]+ (KiB|B) in ", rest)
        assert rest.splitlines()[-1] == "run finished"
        assert tail.wait(30) == 0
    finally:
        tail.kill()
        tail.wait()
    # The same from its file.
    text = cli("tail", "r", "-n", "2", "-k", "val/acc").stdout
    assert text.splitlines()[:2] == ["20  val/acc=0.2", f"run finished, from {tmp_path}/r/tracker/entries.th"]


def test_tail_as_json(daemon: Any, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": float("inf"), "b": 0.1}, update=1)
    run.flush(30)
    [line] = cli("tail", "r", "--json", "--no-follow").stdout.splitlines()
    row = json.loads(line)
    assert (row["update"], row["values"]) == (1, {"a": "inf", "b": "0.1"}) and abs(row["wall_time"] - time.time()) < 60
    run.finish()
    run.close()


def test_top_without_a_terminal(daemon: Any, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"a": 1}, update=1)
    run.flush(30)
    text = cli("top", "--interval", "0.1").stdout
    assert text.startswith("noether-writerd ") and re.search(r"^r +running +1 +0.0 ", text, re.M) and "\x1b" not in text
    report = json.loads(cli("top", "--once", "--json").stdout)
    assert report["runs"][0]["run_id"] == "r" and report["memory_bytes"] > 0
    run.close()


def complete(*words: str) -> list[str]:
    """What bash offers behind these words, the last of which is typed in part."""
    script = cli("completions", "bash").stdout
    path = {**os.environ, "PATH": f"{Path(CLI).parent}:{os.environ['PATH']}"}
    line = " ".join(words)
    ask = (
        f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; COMP_POINT={len(line)}\n"
        f"_noether-writer noether-writer '{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, env=path)
    assert done.stderr == ""
    return done.stdout.split()


def test_completions(daemon: Any, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish"):
        script = cli("completions", shell).stdout
        assert "checkpoints" in script and "smooth" in script
    assert complete("noether-writer", "che") == ["checkpoints"]
    assert "--smooth" in complete("noether-writer", "plot", "--s")
    with noether_writer.open_run(tmp_path, "2026-01-01_abcde"):
        assert complete("noether-writer", "show", "2026") == ["2026-01-01_abcde"]
    directory = f"{tmp_path}/2026-01-01_abcde"
    assert complete("noether-writer", "show", f"{directory}/tr") == [f"{directory}/tracker/"]


def test_keys_are_completed_for_the_run_that_was_named(
    daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = noether_writer.open_run(tmp_path, "nothing")
    run = noether_writer.open_run(tmp_path, "2026-01-01_abcde")
    run.log({"train/loss": 1.0, "train/lr": 0.1, "val/acc": 0.5}, update=1)
    run.flush(30)
    for words in (
        ("tail", "2026-01-01_abcde", "-k", "train/l"),
        ("tail", "--no-follow", "2026-01-01_abcde", "--key", "train/l"),
        ("tail", "-n", "3", "2026-01-01_abcde", "-k", "val/acc", "-k", "train/l"),
        ("export", "2026-01-01_abcde", "-k", "train/l"),
        ("plot", "2026-01-01_abcde", "train/l"),
        ("plot", "--log", "--smooth", "0.5", "2026-01-01_abcde", "val/acc", "train/l"),
    ):
        assert complete("noether-writer", *words) == ["train/loss", "train/lr"], words
    # A run without a log, no run, no run named yet: nothing, and no error between the words that are typed.
    assert complete("noether-writer", "plot", "nothing", "t") == []
    assert complete("noether-writer", "plot", "nobody", "t") == []
    assert complete("noether-writer", "tail", "-k", "t") == []
    run.finish()
    run.close()
    nothing.close()
    # Ended, and with no daemon, and on another one's socket.
    assert complete("noether-writer", "plot", "2026-01-01_abcde", "v") == ["val/acc"]
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(tmp_path / "none"))
    assert complete("noether-writer", "plot", f"{tmp_path}/2026-01-01_abcde", "v") == ["val/acc"]
    assert complete("noether-writer", "plot", "--socket", daemon.socket, "2026-01-01_abcde", "v") == ["val/acc"]
    # By the index of opened runs.
    assert complete("noether-writer", "plot", "2026-01-01_abcde", "v") == ["val/acc"]


def test_every_command_has_json(daemon: Any, tmp_path: Path) -> None:
    run = noether_writer.open_run(tmp_path, "r")
    run.log({"loss": 1.0}, update=1)
    run.save("net", "E1", {"w": torch.ones(10)}).wait(30)
    run.wait(30)
    noether_writer.open_run(tmp_path, "other").close()
    arguments = {
        **{command: ["r"] for command in ("show", "checkpoints", "latest", "wait", "export")},
        "best": ["r", "loss"],
        "tail": ["r", "--no-follow"],
        "plot": ["r", "loss"],
        "compare": ["r", "other"],
        "prune": ["r", "--keep-last", "1", "--yes"],
        "rm": ["other", "--yes"],
        "top": ["--once"],
        "verify": [f"{tmp_path}/r"],
    }
    commands = re.findall(r"^  (\w+)  +", cli("--help").stdout.split("SUBCOMMANDS:")[1], re.M)
    assert len(commands) >= 12
    # A script is no JSON, nor is a page. The last one ends the daemon.
    others = ("completions", "report", "restart", "stop")
    commands = [command for command in commands if command not in others] + ["stop"]
    run.close()
    for command in commands:
        result = cli(command, *arguments.get(command, []), "--json")
        assert result.returncode == 0 and json.loads(result.stdout), (command, result.stderr)


def test_export_as_json(daemon: Any, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 0.1, "odd": float("inf")}, update=3)
    assert json.loads(cli("export", "r", "--json").stdout) == {"loss": {"3": 0.1}, "odd": {"3": "inf"}}
    assert cli("export", "r", "--json").stdout == cli("export", "r", "--format", "json").stdout
    assert cli("export", "r", "--json", "-f", "json").returncode == 0
    refused = cli("export", "r", "--json", "--format", "csv")
    assert refused.returncode == 64 and "give only one of them" in refused.stderr


@pytest.mark.parametrize(
    "command",
    [
        *("status", "runs", "show", "top", "tail", "plot", "export", "checkpoints", "verify", "wait", "drain"),
        *("stop", "restart", "metrics", "compare", "prune", "rm", "report"),
    ],
)
def test_help_has_an_example(command: str) -> None:
    text = cli(command, "--help").stdout
    [lines] = re.findall(r"^Examples:\n(.*?)\n\n", text, re.S | re.M)
    assert f"  noether-writer {command}" in lines
    # None was broken to fit into 80 columns: it can be copied.
    assert all(line.startswith("  ") for line in lines.splitlines()), lines


def test_the_man_page_names_every_command_and_exit_code() -> None:
    page = (Path(__file__).parents[2] / "config/man/noether-writer.1").read_text().replace("\\-", "-")
    commands = re.findall(r"^  (\w+)  +", cli("--help").stdout.split("SUBCOMMANDS:")[1], re.M)
    assert len(commands) >= 11
    for command in commands:
        assert f".B {command}\n" in page, command
    for code in (0, 1, 2, 3, 4, 64):
        assert f".B {code}\n" in page
