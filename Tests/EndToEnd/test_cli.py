"""noether-writer, the command line tool, against a real daemon and real files."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import noether_writer
import torch
from conftest import DAEMON

CLI = str(Path(DAEMON).parent / "noether-writer")


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLI, *arguments], capture_output=True, text=True, timeout=60)


def test_status_runs_and_wait(daemon: Any, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "r") as run:
        run.log({"loss": 1.0}, update=7)
        run.save("net", "E1", {"w": torch.ones(1000)}).wait(30)
        assert cli("wait", "r", "--timeout", "30").returncode == 0
        status = json.loads(cli("status", "--json").stdout)
        assert status["pid"] == daemon.process.pid and status["socket"] == daemon.socket
        [entry] = status["runs"]
        assert (entry["run_id"], entry["last_update"], entry["state"]) == ("r", 7, "running")
        assert (entry["checkpoints"]["durable"], entry["checkpoints"]["in_flight"]) == (1, 0)
    assert "finished" in cli("runs").stdout
    assert "1 ended" in cli("status").stdout


def test_no_daemon_says_so(short_directory: Path) -> None:
    result = cli("status", "--socket", str(short_directory / "none"))
    assert result.returncode != 0 and "no daemon answers" in result.stderr


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
