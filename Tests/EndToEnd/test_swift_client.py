# SPDX-License-Identifier: Apache-2.0
"""The Swift client library, through a trainer written with it: its files load in torch with the values it had."""

from __future__ import annotations

import math
import os
import shutil
import signal
import struct
import subprocess
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from harness import daemon_of, until

TRAINER = Path(DAEMON).parent / "SwiftTrainer"


@pytest.fixture
def output(daemon: Any, tmp_path: Path) -> Path:
    result = subprocess.run([TRAINER, tmp_path], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return tmp_path / "swift/train"


def test_files_of_the_swift_trainer_load_in_torch(output: Path) -> None:
    assert {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()} == {
        "checkpoints/net_cp=E10_U100_S400_model.th",
        "checkpoints/net_cp=latest_model.th",
        "checkpoints/big_cp=x_model.th",
        "checkpoints/net_cp=state_optim.th",
        "tracker/entries.th",
        "tracker/config.yaml",
        "tracker/summary.yaml",
    }
    for name in ("E10_U100_S400", "latest"):
        path = output / f"checkpoints/net_cp={name}_model.th"
        for arguments in ({"weights_only": True}, {"weights_only": False}, {"weights_only": True, "mmap": True}):
            check(torch.load(path, **arguments))
        subprocess.run(["unzip", "-tqq", path], check=True)
    big = torch.load(output / "checkpoints/big_cp=x_model.th")
    assert big.shape == (10_000_000,) and bool((big == 7).all())
    assert torch.load(output / "checkpoints/net_cp=state_optim.th") == {"lr": 0.1}
    assert (output / "tracker/config.yaml").read_text() == "lr: 0.1\n"


def check(loaded: dict[str, Any]) -> None:
    state = loaded["state_dict"]
    assert torch.equal(state["weight"], torch.tensor([[100.0, 1, 2], [3, 4, 5]]))
    assert torch.equal(state["view"], torch.arange(12.0).view(3, 4).t())
    assert torch.equal(state["tail"], torch.tensor([10.0, 11.0]))
    assert state["tail"].untyped_storage()._cdata == state["view"].untyped_storage()._cdata
    assert state["scalar"].shape == () and state["scalar"].item() == 2.5
    assert state["empty"].shape == (0, 3) and state["empty"].dtype == torch.int64
    assert isinstance(state["parameter"], torch.nn.Parameter) and state["parameter"].requires_grad
    for name, tensor in loaded["types"].items():
        assert tensor.dtype == getattr(torch, name) and tensor.shape == (2, 2)
        assert bytes(tensor.untyped_storage()) == bytes(i % 2 for i in range(4 * tensor.element_size()))
    assert loaded["training_iteration"] == {"epoch": 10, "update": 100, "sample": 400}
    assert loaded["values"] == [None, True, -1, 70_000, 5_000_000_000, 0.5, "ü", b"\0\xc8A", (1, ())]


def test_log_of_the_swift_trainer(output: Path) -> None:
    entries = torch.load(output / "tracker/entries.th")
    assert list(entries) == ["epoch", "sample", "loss", "nan", "step", "ok", "no", "word"]
    assert entries["loss"] == {u: 1 / u for u in range(1, 101)}
    assert all(math.isnan(value) for value in entries["nan"].values())
    assert entries["epoch"][25] == 2 and entries["step"][7] == 7 and type(entries["step"][7]) is int
    assert entries["ok"][1] is True and entries["no"][1] is None and entries["word"][1] == "ä"


def test_a_swift_trainer_starts_a_daemon(short_directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "d/socket"))
    result = subprocess.run([TRAINER, tmp_path], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    log = (short_directory / "d/daemon.log").read_text()
    assert "serving" in log
    # The lock names the daemon that was started: it is ended by hand, since it would idle for a minute.
    os.kill(daemon_of(short_directory / "d/socket"), signal.SIGTERM)


def test_a_swift_trainer_goes_on_over_many_daemons(daemon: RunningDaemon, tmp_path: Path) -> None:
    trainer = subprocess.Popen([TRAINER, tmp_path, "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    kills = 0
    for line in trainer.stdout:
        if int(line) % 400 == 0:
            os.kill(daemon_of(daemon.socket), signal.SIGKILL)
            kills += 1
            RunningDaemon(daemon.socket)
    _, error = trainer.communicate(timeout=60)
    assert trainer.returncode == 0, error
    assert kills == 5
    run = tmp_path / "long"
    assert torch.load(run / "tracker/entries.th")["loss"] == {u: 1 / u for u in range(1, 2001)}
    for update in range(100, 2001, 100):
        assert torch.load(run / f"checkpoints/net_cp=U{update}_model.th")["update"] == update
    assert torch.load(run / "checkpoints/net_cp=latest_model.th")["update"] == 2000
    assert not list(run.rglob(".noether-writer-*")) and not list(run.rglob("entries.journal"))
    os.kill(daemon_of(daemon.socket), signal.SIGTERM)


@pytest.mark.parametrize("policy", ["keep-training", "raise"])
def test_a_log_that_is_full_ends_a_swift_training_only_where_it_should(
    policy: str, short_directory: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("NOETHER_WRITER_SETTING_LOG_BYTES_PER_RUN", str(1 << 16))
    monkeypatch.setenv("NOETHER_WRITER_WHEN_AWAY", policy)
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", str(short_directory / "s"))
    daemon = RunningDaemon(str(short_directory / "s"))
    trainer = subprocess.run([TRAINER, tmp_path, "6000"], capture_output=True, text=True, timeout=100)
    assert "log_bytes_per_run" in trainer.stderr
    if policy == "raise":
        assert trainer.returncode != 0
    else:
        assert trainer.returncode == 0 and trainer.stderr.count("nothing more is logged") == 1
        found = torch.load(tmp_path / "long/tracker/entries.th")["loss"]
        assert found == {u: 1 / u for u in range(1, len(found) + 1)} and 1000 < len(found) < 6000
        assert torch.load(tmp_path / "long/checkpoints/net_cp=latest_model.th")["update"] == 6000
    assert daemon.stop() == 0


def resume(output_root: Path, place: object) -> tuple[list[str], str]:
    """Lines that the trainer prints, and what it says to standard error."""
    result = subprocess.run(
        [TRAINER, "resume", output_root, str(place)], capture_output=True, text=True, timeout=100, check=True
    )
    return result.stdout.splitlines(), result.stderr


def logged(output_root: Path, updates: int) -> None:
    """A run of this client's, with a checkpoint at half of it."""
    with noether_writer.open_run(output_root, "r") as run:
        for update in range(1, updates + 1):
            values = {"loss": 1 / update, "nan": math.nan, "big": 1 << 80, "word": "ä", "no": None, "ok": True}
            run.log(values if update % 2 else values | {"even": -update}, update=update, epoch=update // 10)
            if update == updates // 2:
                run.save("net", "half", {"a": 1})


def bits(entries: dict[str, dict[int, Any]]) -> dict[str, Any]:
    """NaN is no value that can be compared."""
    return {
        key: {u: struct.pack("d", v) if isinstance(v, float) else (type(v), v) for u, v in values.items()}
        for key, values in entries.items()
    }


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("by_checkpoint", [True, False])
def test_a_swift_trainer_resumes_a_log(
    ended: bool, by_checkpoint: bool, daemon: RunningDaemon, tmp_path: Path, monkeypatch: Any
) -> None:
    logged(tmp_path, 1000)
    before = torch.load(tmp_path / "r/tracker/entries.th")
    if ended:
        # Another daemon knows nothing of the run: entries.th is all there is, and more than may wait for it.
        assert daemon.stop() == 0
        daemon.process = RunningDaemon(daemon.socket).process
        monkeypatch.setenv("NOETHER_WRITER_QUEUE_BYTES", "2000")
    place = tmp_path / "r/checkpoints/net_cp=half_model.th" if by_checkpoint else 500
    lines, errors = resume(tmp_path, place)
    assert errors == ""
    assert lines == [
        "rank 0, last update 500",
        "update 500 is not larger than the last one, 501: nothing of it was logged",
        "501 values",
    ]
    expected = {key: {u: v for u, v in values.items() if u <= 500} for key, values in before.items()}
    expected["loss"][501] = -1
    found = torch.load(tmp_path / "r/tracker/entries.th")
    assert bits(found) == bits(expected) and list(found) == list(before)


def test_a_swift_trainer_resumes_what_is_not_there(daemon: Any, tmp_path: Path) -> None:
    lines, errors = resume(tmp_path, 100)
    assert lines[0] == "rank 0, last update none"
    assert "resumeAt: 100, but the log of run r is empty" in errors
    _, errors = resume(tmp_path, 200)
    assert "resumeAt: 200, but the log of run r ends at update 101" in errors
    result = subprocess.run([TRAINER, "resume", tmp_path, tmp_path / "no.th"], capture_output=True, text=True)
    assert result.stdout == f"{tmp_path}/no.th: No such file or directory\n"


def test_a_swift_trainer_resumes_no_broken_file(daemon: Any, tmp_path: Path) -> None:
    entries = tmp_path / "r/tracker/entries.th"
    entries.parent.mkdir(parents=True)
    entries.write_text("broken")
    [line], _ = resume(tmp_path, 1)
    assert "the log to resume can't be read" in line and "it is left as it is" in line
    assert line.count(str(entries)) == 1
    assert entries.read_text() == "broken"


def test_a_swift_trainer_says_that_a_log_is_replaced(daemon: Any, tmp_path: Path) -> None:
    for words in ("", "run long has a log already"):
        result = subprocess.run([TRAINER, tmp_path, "100"], capture_output=True, text=True, timeout=60, check=True)
        assert words in result.stderr and bool(words) == bool(result.stderr)


def test_variables_of_a_swift_trainer(daemon: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("NOETHER_WRITER_POOL_BYTES", "8 GiB")
    lines, _ = resume(tmp_path, 1)
    assert lines == ['NOETHER_WRITER_POOL_BYTES must be a number of bytes, in digits, not "8 GiB"']
    assert not (tmp_path / "r").exists()
    monkeypatch.setenv("NOETHER_WRITER_POOL_BYTES", "")
    monkeypatch.setenv("NOETHER_WRITER_TENSORBOARD", "1")
    resume(tmp_path, 1)
    until(lambda: list(tmp_path.glob("r/events.out.tfevents.*")))
    # The last thing that the daemon does in the directory which is removed below.
    until(lambda: not (tmp_path / "r/tracker/entries.journal").exists())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shutil.rmtree(tmp_path / "r")
    lines, errors = resume(tmp_path, 1)
    assert lines[0] == "rank 1, last update none" and len(lines) == 2
    said = "noether-writer: this is rank 1, and rank 0 writes the log of run r: nothing is logged here"
    assert errors.splitlines() == [said]
    until((tmp_path / "r/checkpoints/net_cp=resumed_model.th").exists)
    assert not (tmp_path / "r/tracker/entries.th").exists()


def test_a_swift_program_reads_the_daemon_s_reports(daemon: RunningDaemon, tmp_path: Path) -> None:
    logged(tmp_path, 10)
    result = subprocess.run([TRAINER, "look"], capture_output=True, text=True, timeout=60, check=True)
    report = [f"{noether_writer.__version__} {daemon.process.pid} false 1 0", f"r finished 10 10 1 {tmp_path}/r"]
    assert result.stdout.splitlines() == report * 3


def states() -> dict[str, Any]:
    """What a trainer has to resume from."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, betas=(0.5, 0.9))
    net(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
    base = torch.arange(24.0)
    types = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16]
    types += [torch.float32, torch.float64, torch.complex64, torch.complex128, torch.uint16, torch.uint64]
    types += [torch.float8_e4m3fn, torch.float8_e5m2]
    return {
        "model": {"state_dict": net.state_dict(), "training_iteration": {"epoch": 1, "update": 2}},
        "optimizer": optimizer.state_dict(),
        "views": {
            "all": base,
            "turned": base.view(4, 6).t(),
            "part": base[3:7],
            "spread": torch.ones(1).expand(5),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.ones(2)),
        },
        "types": [torch.arange(4).to(kind) for kind in types],
        "values": [
            None,
            True,
            -1,
            1 << 40,
            -(1 << 62),
            0.5,
            math.inf,
            "\u00fc",
            b"\0\xff",
            (1, (), [2]),
            {1: {2.0: "a"}},
        ],
        "many": {f"key{i}": i for i in range(3000)},
    }


def test_a_swift_trainer_loads_what_torch_has_saved(daemon: Any, tmp_path: Path) -> None:
    saved = states()
    files = {name: tmp_path / f"{name}.th" for name in saved}
    for name, state in saved.items():
        torch.save(state, files[name])
    broken = tmp_path / "broken.th"
    data = bytearray(files["views"].read_bytes())
    data[data.index(struct.pack("<3f", 5, 6, 7))] ^= 1
    broken.write_bytes(data)
    classes = tmp_path / "classes.th"
    torch.save({"path": Path("x")}, classes)
    # The bytes of these two are not their values: torch negates the imaginary parts when it computes with them.
    lazy = torch.tensor([1 + 2j]).conj()
    views = [tmp_path / "conjugated.th", tmp_path / "negated.th"]
    for view, path in zip((lazy, lazy.imag), views, strict=True):
        torch.save({"view": view}, path)
    *lines, damage, refusal, conjugated, negated, missing, log = subprocess.run(
        [TRAINER, "fault", "load", tmp_path],
        input="\n".join(map(str, [*files.values(), broken, classes, *views, tmp_path / "none.th"])),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.splitlines()
    for name, line in zip(files, lines, strict=True):
        same, _, path = line.partition(" ")
        assert same == "true", line
        found = torch.load(path, weights_only=True)
        assert same_state(found, torch.load(files[name], weights_only=True)), name
    tied = torch.load(lines[2].partition(" ")[2])
    assert len({tied[key].untyped_storage().data_ptr() for key in ("all", "turned", "part")}) == 1
    assert "broken.th can't be loaded: " in damage and "CRC" in damage
    assert "it holds a pathlib." in refusal and "load the file with torch" in refusal
    assert all("call resolve_conj() or resolve_neg() before torch.save" in words for words in (conjugated, negated))
    assert f"{tmp_path}/none.th: No such file or directory" in missing
    assert log.startswith('["loss", "word"] 7 ') and "0.5" in log


def same_state(found: Any, saved: Any) -> bool:
    if type(found) is not type(saved):
        return False
    if isinstance(saved, torch.Tensor):
        kinds = [(t.dtype, t.shape, t.stride(), t.requires_grad) for t in (found, saved)]
        return kinds[0] == kinds[1] and bytes(found.untyped_storage()) == bytes(saved.untyped_storage())
    if isinstance(saved, dict):
        return list(found) == list(saved) and all(same_state(found[key], saved[key]) for key in saved)
    if isinstance(saved, list | tuple):
        return len(found) == len(saved) and all(map(same_state, found, saved))
    return bool(found == saved)


def test_a_swift_trainer_logs_values_as_they_are(daemon: Any, tmp_path: Path) -> None:
    subprocess.run([TRAINER, "fault", "scalars", tmp_path], capture_output=True, text=True, timeout=60, check=True)
    entries = torch.load(tmp_path / "r/tracker/entries.th")
    assert entries["loss"] == {1: 0.5, 2: 0.5, 3: 1, 4: 2.0, 5: 4.0, 7: 0.25}
    assert entries["epoch"] == {1: 3, 4: 4, 5: 3} and entries["sample"] == {5: 5}
    assert entries["count"] == {2: 2**64 - 1} and entries["missing"] == {2: None}
    assert entries["word"] == {3: "a"} and entries["yes"] == {3: True}
    assert type(entries["epoch"][1]) is int and type(entries["loss"][1]) is float
    # A dictionary of Swift's has no order: its keys are sorted.
    assert list(entries)[-6:] == ["y", "z", "a", "key0", "key1", "key2"]
