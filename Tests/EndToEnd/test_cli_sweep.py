# SPDX-License-Identifier: Apache-2.0
"""Many runs at once, from their files: `runs DIR` and `compare`. No daemon is asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import RunningDaemon, logging_trainer
from harness import until
from noether_writer.config_file import config_yaml
from test_cli import CLI
from test_cli_odd import cli


def filed(folder: Path, entries: dict[str, dict[int, Any]] | None = None, **config: Any) -> Path:
    """An ended run, as its files are."""
    (folder / "tracker").mkdir(parents=True)
    if entries is not None:
        torch.save(entries, folder / "tracker/entries.th")
    if config:
        (folder / "tracker/config.yaml").write_text(config_yaml(config, folder.name, None, 1))
    return folder


@pytest.fixture
def sweep(daemon: RunningDaemon, tmp_path: Path) -> Path:
    """Three runs of a real daemon, which is gone."""
    for name, lr, best in (("a", 0.1, 0.5), ("b", 1e-05, 0.25), ("c", 0.01, 0.75)):
        config = {"lr": lr, "model": {"depth": 4, "name": name}, "seed": 1, "betas": [0.9, 0.99]}
        with noether_writer.open_run(tmp_path / "sweep", name, config=config) as run:
            for update, loss in ((10, 1.0), (20, best), (30, float("nan")), (40, 0.875)):
                run.log({"loss/val": loss, "accuracy": 1 - loss}, update=update)
    assert daemon.stop() == 0
    return tmp_path / "sweep"


def rows(*arguments: str) -> list[dict[str, Any]]:
    result = cli("runs", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, list)
    return found


def test_the_table_of_a_sweep(sweep: Path) -> None:
    result = cli("runs", str(sweep), "--key", "loss/val", "--sort", "loss/val")
    assert (result.returncode, result.stderr) == (0, "")
    table = [line.split() for line in result.stdout.splitlines()]
    # The title of each key's columns has two words.
    assert table[0] == ["RUN", "STATE", "UPDATE", "min", "loss/val", "last", "loss/val", "lr", "model.name"]
    assert table[1:] == [
        ["b", "ended", "40", "0.25", "0.875", "1e-05", "b"],
        ["a", "ended", "40", "0.5", "0.875", "0.1", "a"],
        ["c", "ended", "40", "0.75", "0.875", "0.01", "c"],
    ]


def test_the_same_as_json(sweep: Path) -> None:
    [a, b, c] = rows(str(sweep), "--key", "loss/val", "--key", "accuracy")
    assert [row["run"] for row in (a, b, c)] == ["a", "b", "c"]
    assert (b["run_directory"], b["state"], b["last_update"]) == (str(sweep / "b"), "ended", 40)
    loss = {"mode": "min", "best": 0.25, "best_update": 20, "last": 0.875, "last_update": 40}
    # As in tracker/summary.yaml: accuracy is better if it is higher.
    assert b["keys"] == {"loss/val": loss, "accuracy": {**loss, "mode": "max", "best": 0.75, "last": 0.125}}
    config = {"lr": 1e-05, "model.depth": 4, "model.name": "b", "seed": 1, "betas.0": 0.9, "betas.1": 0.99}
    assert b["config"] == config and b["differing"] == {"lr": 1e-05, "model.name": "b"}
    assert "problems" not in b


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        ([], "abc"),
        (["--reverse"], "cba"),
        (["--sort", "loss/val"], "bac"),
        (["--sort", "loss/val", "--reverse"], "cab"),
        (["--sort", "loss/val", "--max", "loss/val"], "abc"),
        (["--sort", "accuracy"], "bac"),
        (["--sort", "lr"], "bca"),
        (["--sort", "model.name", "--reverse"], "cba"),
        (["--sort", "update"], "abc"),
        (["--sort", "run", "--reverse"], "cba"),
    ],
    ids=str,
)
def test_sorted(sweep: Path, arguments: list[str], order: str) -> None:
    assert "".join(row["run"] for row in rows(str(sweep), *arguments)) == order


def test_what_a_run_lacks_comes_last(tmp_path: Path) -> None:
    filed(tmp_path / "a")
    filed(tmp_path / "b", {"loss": {1: 2.0}})
    filed(tmp_path / "c", {"loss": {1: float("nan"), 2: "x"}})
    filed(tmp_path / "d", {"loss": {1: 1.0}})
    for more, order in (([], "dbac"), (["--reverse"], "bdac")):
        assert "".join(row["run"] for row in rows(str(tmp_path), "--sort", "loss", *more)) == order
    table = cli("runs", str(tmp_path), "-k", "loss").stdout.splitlines()
    assert [line.split()[3:] for line in table[1:]] == [["-", "-"], ["2.0", "2.0"], ["-", "x"], ["1.0", "1.0"]]


def test_a_name_that_nothing_has(sweep: Path) -> None:
    for arguments in (["--key", "los/val"], ["--sort", "los/val"]):
        result = cli("runs", str(sweep), *arguments)
        assert result.returncode == 4 and "close to it: loss/val" in result.stderr and "accuracy" in result.stderr
    assert cli("runs", str(sweep / "nowhere")).returncode == 4
    assert cli("runs", "--key", "loss").returncode == 64


def test_live_and_unfinished_runs(daemon: RunningDaemon, tmp_path: Path) -> None:
    with logging_trainer(tmp_path, config={"lr": 1}):
        [row] = rows(str(tmp_path), "--key", "loss")
        assert (row["state"], row["last_update"], row["config"]) == ("live", 99, {"lr": 1})
        assert row["keys"]["loss"]["last"] == 99 / 7
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait()
    [row] = rows(str(tmp_path), "--key", "loss")
    assert (row["state"], row["last_update"], row["keys"]["loss"]["last"]) == ("unfinished", 99, 99 / 7)


def test_looking_at_a_run_is_in_nobodys_way(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The locks are asked for by sharing them for a moment: runs are opened, and recovered, all the same."""
    code = (
        "import noether_writer, sys\n"
        "run = noether_writer.open_run(sys.argv[1], 'left')\n"
        "run.log({'loss': 0.5}, update=int(sys.argv[2]))\n"
        "run.flush(30)\n"
        "print('logged', flush=True)\n"
        "sys.stdin.read()\n"
    )
    entries = tmp_path / "left/tracker/entries.th"
    command = f"while :; do '{CLI}' runs '{tmp_path}' >/dev/null; done"
    with subprocess.Popen(["sh", "-c", command], start_new_session=True) as looking:
        try:
            for number in range(20):
                with noether_writer.open_run(tmp_path, f"r{number % 2}") as run:
                    run.log({"loss": 1.0}, update=1)
            for number in range(10):
                left = [sys.executable, "-c", code, str(tmp_path), str(number)]
                with subprocess.Popen(left, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
                    assert trainer.stdout is not None and trainer.stdout.readline() == "logged\n"
                    # Both at once: the next daemon has nothing but the journal.
                    daemon.hold()
                    trainer.kill()
                    trainer.wait()
                    daemon.process.kill()
                    daemon.process.wait()
                daemon.process = RunningDaemon(daemon.socket).process
                until(lambda number=number: entries.exists() and number in torch.load(entries)["loss"])
        finally:
            os.killpg(looking.pid, signal.SIGKILL)


def test_where_runs_are_found(tmp_path: Path) -> None:
    log = {"loss": {1: 1.0}}
    filed(tmp_path / "plain", log)
    filed(tmp_path / "staged", log)
    filed(tmp_path / "staged/train", log)
    filed(tmp_path / "debug/deep/er/run", log)
    filed(tmp_path / ".hidden/run", log)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "plain/checkpoints/sharded/tracker").mkdir(parents=True)
    (tmp_path / "again").symlink_to(tmp_path / "plain")
    (tmp_path / "plain/loop").symlink_to(tmp_path)
    found = [row["run"] for row in rows(str(tmp_path))]
    assert found == ["debug/deep/er/run", "plain", "staged", "staged/train"]
    # A link on the command line is followed; a run is itself found.
    assert [row["run"] for row in rows(str(tmp_path / "again"))] == ["again"]
    both = [row["run"] for row in rows(str(tmp_path / "staged/train"), str(tmp_path / "staged"))]
    assert both == [str(tmp_path / "staged/train"), str(tmp_path / "staged")]
    assert cli("runs", str(tmp_path / "empty")).stdout == f"no runs below {tmp_path / 'empty'}\n"
    assert rows(str(tmp_path / "empty")) == []


def test_runs_without_log_or_configuration(tmp_path: Path) -> None:
    filed(tmp_path / "nothing")
    (tmp_path / "weights/checkpoints").mkdir(parents=True)
    filed(tmp_path / "empty", {})
    filed(tmp_path / "other", {"loss": {-5: 1.0}}, lr=None)
    assert [(row["run"], row["state"], row.get("last_update")) for row in rows(str(tmp_path))] == [
        ("empty", "ended", None),
        ("nothing", "ended", None),
        ("other", "ended", -5),
        ("weights", "ended", None),
    ]
    [*_, other, _] = rows(str(tmp_path))
    assert other["differing"] == {"lr": None}
    assert "no hyperparameters are known" in cli("compare", str(tmp_path / "empty"), str(tmp_path / "nothing")).stdout


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    filed(tmp_path / "good", {"loss": {1: 1.0}}, lr=1)
    filed(tmp_path / "torn", {"loss": {1: 1.0}}, lr=2)
    (tmp_path / "torn/tracker/entries.th").write_bytes(b"PK")
    filed(tmp_path / "wrong", {"loss": {1: 3.0}})
    (tmp_path / "wrong/tracker/config.yaml").write_text("hp:\n  lr: [1, 2\n")
    filed(tmp_path / "huge", {"loss": {1: 4.0}})
    with open(tmp_path / "huge/tracker/config.yaml", "wb") as file:
        file.truncate(1 << 40)
    result = cli("runs", str(tmp_path), "--json", "--key", "loss")
    assert result.returncode == 1
    found = {row["run"]: row for row in json.loads(result.stdout)}
    assert {name for name, row in found.items() if "problems" in row} == {"torn", "wrong", "huge"}
    assert found["torn"]["config"] == {"lr": 2} and found["wrong"]["keys"]["loss"]["best"] == 3.0
    for words in ("torn/tracker/entries.th", "wrong/tracker/config.yaml: line", "huge/tracker/config.yaml"):
        assert words in result.stderr
    compared = cli("compare", str(tmp_path / "good"), str(tmp_path / "torn"))
    assert compared.returncode == 1 and "torn/tracker/entries.th" in compared.stderr and "lr" in compared.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_directories_of_others(tmp_path: Path) -> None:
    filed(tmp_path / "mine", {"loss": {1: 1.0}})
    filed(tmp_path / "theirs", {"loss": {1: 1.0}})
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(path.stat().st_mode | 0o055)
        if path.parent.parent == path.parent:
            break
    (tmp_path / "theirs").chmod(0o700)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", CLI, "runs", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": "/"})
    assert result.returncode == 1 and "mine" in result.stdout and "theirs" in result.stderr


def test_configurations_that_lead_nowhere(tmp_path: Path) -> None:
    """Aliases: what is in itself, and what is a great many."""
    filed(tmp_path / "a", {})
    (tmp_path / "a/tracker/config.yaml").write_text("hp: &x\n  lr: 1\n  self: *x\n")
    filed(tmp_path / "b", {})
    bomb = "hp:\n  a0: &a0 {x: 1}\n"
    for level in range(1, 40):
        bomb += f"  a{level}: &a{level} {{x: *a{level - 1}, y: *a{level - 1}}}\n"
    (tmp_path / "b/tracker/config.yaml").write_text(bomb)
    filed(tmp_path / "c", {})
    (tmp_path / "c/tracker/config.yaml").write_text("hp: &x\n- *x\n- 1\n")
    filed(tmp_path / "d", {})
    shared = "hp:\n  first: &id001 {lr: 1}\n  second: *id001\n  tuple: !!python/tuple [1, 'a']\n"
    (tmp_path / "d/tracker/config.yaml").write_text(shared)
    result = cli("runs", str(tmp_path), "--json")
    assert result.returncode == 1 and "without end" in result.stderr
    *_, last = json.loads(result.stdout)
    assert last["config"] == {"first.lr": 1, "second.lr": 1, "tuple": "[1, a]"}


def test_a_configuration_that_holds_nothing_else(tmp_path: Path) -> None:
    """What the Swift library writes is what it is given."""
    for name, text in (
        ("a", "lr: 0.5\nmodel:\n  depth: 3\n"),
        ("b", "hp:\n  lr: 0.25\nmore: 1\n"),
        ("c", "run_name: c\nstage_name: x\n"),
        ("d", "- 1\n"),
        ("e", ""),
    ):
        filed(tmp_path / name, {})
        (tmp_path / name / "tracker/config.yaml").write_text(text)
    assert [row["config"] for row in rows(str(tmp_path))] == [{"lr": 0.5, "model.depth": 3}, {"lr": 0.25}, {}, {}, {}]


def test_values_keep_their_types(tmp_path: Path) -> None:
    config = {
        "text": "1",
        "yes": "yes",
        "flag": True,
        "none": None,
        "large": 2**70,
        "small": 5e-324,
        "nan": float("nan"),
        "inf": -float("inf"),
        "empty": {},
        "nothing": "",
        "list": [[1, 2], []],
        "od'd \x1b ä": "li\nne",
        "e\u0301": 1,
        "\u00e9": 2,
    }
    filed(tmp_path / "a", {}, **config)
    [row] = rows(str(tmp_path))
    assert row["config"] == {
        **{key: config[key] for key in ("text", "yes", "flag", "none", "small", "nothing")},
        "large": float(2**70),
        "nan": "nan",
        "inf": "-inf",
        "empty": "{}",
        "list.0": "[1, 2]",
        "list.1": "[]",
        "od'd \x1b ä": "li\nne",
        "e\u0301": 1,
        "\u00e9": 2,
    }
    assert isinstance(row["config"]["text"], str) and row["config"]["flag"] is True


def test_names_that_would_steer_the_terminal(tmp_path: Path) -> None:
    filed(tmp_path / "a\x1b[31m", {"lo\u202ess": {1: 1.0}}, **{"l\x07r": "v\x1b"})
    filed(tmp_path / "b\n", {"lo\u202ess": {1: 1.0}})
    for command in (["runs", str(tmp_path)], ["compare", str(tmp_path / "a\x1b[31m"), str(tmp_path / "b\n")]):
        result = cli(*command, "--key", "lo\u202ess")
        assert result.returncode == 0 and not {"\x1b", "\x07", "\u202e"} & set(result.stdout)
        assert "lo\\u{202e}ss" in result.stdout
    assert {row["run"] for row in rows(str(tmp_path))} == {"a\x1b[31m", "b\n"}


def test_thousands_of_runs_and_a_long_log(tmp_path: Path) -> None:
    filed(tmp_path / "first", {"loss": {1: 1.0}}, lr=0.5)
    for number in range(3000):
        shutil.copytree(tmp_path / "first", tmp_path / f"r{number:04}", copy_function=os.link)
    filed(tmp_path / "long", {f"k{key}": dict.fromkeys(range(100_000), 0.5) for key in range(10)})
    found = rows(str(tmp_path), "--sort", "update")
    assert len(found) == 3002 and found[-1]["run"] == "long" and found[-1]["last_update"] == 99_999


def test_readers_that_leave_and_a_full_disk(tmp_path: Path) -> None:
    filed(tmp_path / "first", {"loss": {1: 1.0}}, lr=0.5)
    for number in range(2000):
        shutil.copytree(tmp_path / "first", tmp_path / f"r{number:04}", copy_function=os.link)
    for command in (["runs", str(tmp_path)], ["compare", *map(str, list(tmp_path.iterdir())[:200])]):
        for more in ([], ["--json"]):
            with open("/dev/full", "w") as full:
                result = subprocess.run([CLI, *command, *more], stdout=full, stderr=subprocess.PIPE, text=True)
            assert result.returncode == 1 and "No space left" in result.stderr
            with subprocess.Popen([CLI, *command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as leaving:
                assert leaving.stdout is not None and leaving.stderr is not None
                leaving.stdout.read(1)
                leaving.stdout.close()
                assert leaving.wait(60) == 0 and leaving.stderr.read() == b""


# compare


def test_compare(sweep: Path) -> None:
    result = cli("compare", *(str(sweep / name) for name in "ab"))
    assert (result.returncode, result.stderr) == (0, "")
    table = [line.split() for line in result.stdout.splitlines()]
    assert table == [
        ["a", "b"],
        ["state", "ended", "ended"],
        ["last", "update", "40", "40"],
        [],
        ["HYPERPARAMETERS"],
        ["lr", "0.1", "1e-05"],
        ["model.name", "a", "b"],
        [],
        ["KEYS"],
        ["min", "loss/val", "0.5", "0.25"],
        ["last", "loss/val", "0.875", "0.875"],
        ["max", "accuracy", "0.5", "0.75"],
        ["last", "accuracy", "0.125", "0.125"],
        [],
        ["4", "hyperparameters", "are", "the", "same"],
    ]
    chosen = cli("compare", str(sweep / "a"), str(sweep / "b"), "--min", "accuracy").stdout.splitlines()
    assert [line.split() for line in chosen[-4:-2]] == [["min", "accuracy", "0.0", "0.0"], table[-3]]


def test_compare_as_json(sweep: Path) -> None:
    result = json.loads(cli("compare", *(str(sweep / name) for name in "cab"), "--json").stdout)
    assert result["differing"] == {"lr": [0.01, 0.1, 1e-05], "model.name": ["c", "a", "b"]}
    assert [(row["run"], row["keys"]["loss/val"]["best"]) for row in result["runs"]] == [
        ("c", 0.75),
        ("a", 0.5),
        ("b", 0.25),
    ]


def test_compare_what_cannot_be_compared(sweep: Path) -> None:
    assert cli("compare", str(sweep / "a")).returncode == 64
    assert cli("compare", str(sweep / "a"), str(sweep / "nobody")).returncode == 4
    unknown = cli("compare", str(sweep / "a"), str(sweep / "b"), "--key", "acuracy")
    assert unknown.returncode == 4 and "close to it: accuracy" in unknown.stderr
    # One run, twice.
    assert cli("compare", str(sweep / "a"), f"{sweep}/./a").returncode == 64
    shutil.copytree(sweep / "a", sweep / "copy")
    same = cli("compare", str(sweep / "a"), str(sweep / "copy"))
    assert same.returncode == 0 and "no hyperparameter differs; 6 hyperparameters are the same" in same.stdout


def test_compare_runs_that_the_daemon_knows(daemon: RunningDaemon, tmp_path: Path) -> None:
    with (
        noether_writer.open_run(tmp_path, "first", config={"lr": 1}) as one,
        noether_writer.open_run(tmp_path, "second", config={"lr": 2}) as other,
    ):
        for run in (one, other):
            run.log({"loss": 0.5}, update=1)
            run.flush(30)
        result = subprocess.run([CLI, "compare", "first", "second"], capture_output=True, text=True)
        assert result.returncode == 0 and result.stdout.count("live") == 2 and "0.5" in result.stdout
