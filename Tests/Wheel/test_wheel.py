# SPDX-License-Identifier: Apache-2.0
"""The wheel as a user gets it: in a clean environment, with no daemon running and none on PATH."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import noether_writer
import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import noether_writer, os, sys, torch
model = torch.nn.Linear(4, 1)
with noether_writer.open_run(sys.argv[1], "first") as run:
    for update in range(1, 101):
        loss = (model(torch.ones(4)) - 1).pow(2).mean()
        model.zero_grad(); loss.backward()
        with torch.no_grad():
            for p in model.parameters(): p -= 0.01 * p.grad
        run.log({"loss": loss}, update=update)
    run.save("net", "U100", {"state_dict": model.state_dict()})
"""

# With --strict, an ignore that is not needed is an error too: each of these is a mistake that mypy must find.
TYPED = """
import noether_writer
from noether_writer import errors, subscription


def train(root: str) -> list[str]:
    update: int | None = noether_writer.log_update(root)
    with noether_writer.open_run(root, "r", config={"lr": 0.1}, resume_at=update, snapshot="overlap") as run:
        run.log({"loss": 0.5, "word": "a", "none": None}, update=1, epoch=0)
        ticket: noether_writer.Ticket = run.save("net", "U1", {"a": 1}, kind="optim")
        target = noether_writer.Target("net", "latest", object())
        both: noether_writer.Ticket = run.save_as([target])
        try:
            ticket.wait(timeout=1.0)
        except errors.CheckpointStalled as error:
            print(error)
        done: int = both.bytes_done
        values: noether_writer.Series = run.values("loss")
        for at, value in zip(values.updates, values):
            whole: int = at
            scalar: float | int | bool | str | None = value
            print(whole, scalar, done)
        run.log({"loss": 0.5}, update="2")  # type: ignore[arg-type]
        run.log(["loss"], update=2)  # type: ignore[arg-type]
        run.save("net", "U1", {}, kind="weights")  # type: ignore[arg-type]
        text: str = run.last_update  # type: ignore[assignment]
        print(text, run.nothing)  # type: ignore[attr-defined]
    return both.paths


def follow() -> None:
    for event in noether_writer.subscribe("r", start=None):
        if isinstance(event, subscription.Row):
            row: dict[str, float | int | bool | str | None] = event.values
            print(row)
        elif isinstance(event, subscription.Ended):
            print(event.state.upper(), event.rows)  # type: ignore[attr-defined]


def drop_in(paths: object, counter: object, tracker: object) -> list[float]:
    noether_writer.patch_noether()
    checkpoints = noether_writer.CheckpointWriter(paths, counter)
    checkpoints.save(object(), "latest")
    checkpoints.wait()
    with noether_writer.LogWriter(paths, counter, tracker) as log:
        log.add_scalar("loss", 0.5)
        log.add_scalar(1, 0.5)  # type: ignore[arg-type]
        log.flush()
        return log.get_all_metric_values("loss")
"""


@pytest.fixture(scope="module")
def wheel() -> Path:
    [found] = (ROOT / "dist").glob("noether_writer-*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that sees this one's torch, and nothing of this source tree."""
    path = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    python = path / "bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-index", str(wheel)], check=True)
    # Behind its own packages.
    packages = next(Path(sys.prefix).glob("lib/python3*/site-packages"))
    [site] = path.glob("lib/python3*/site-packages")
    (site / "zz_torch.pth").write_text(f"{packages}\n")
    return path


@pytest.fixture
def clean(environment: Path) -> Iterator[dict[str, str]]:
    """Variables of a user's shell: a runtime directory of their own, the environment's programs on PATH."""
    directory = Path(tempfile.mkdtemp(prefix="nw-"))
    yield {
        "PATH": f"{environment}/bin:/usr/bin:/bin",
        "HOME": str(directory),
        "XDG_RUNTIME_DIR": str(directory),
        "XDG_STATE_HOME": str(directory / "state"),
        "LANG": "C.UTF-8",
    }
    shutil.rmtree(directory)


def test_the_wheel_is_small_and_states_its_requirements(wheel: Path, tmp_path: Path) -> None:
    assert wheel.stat().st_size < 15_000_000
    match = re.fullmatch(r"noether_writer-[\d.]+-cp310-abi3-manylinux_2_(\d+)_\w+\.whl", wheel.name)
    assert match is not None
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if "/bin/" in name]
        archive.extractall(tmp_path)
    assert {Path(name).name for name in names} == {"noether-writerd", "noether-writer"}
    newest = 0
    for name in names:
        text = subprocess.run(["objdump", "-T", tmp_path / name], capture_output=True, text=True, check=True).stdout
        newest = max([newest, *(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", text))])
        dynamic = subprocess.run(["readelf", "-dS", tmp_path / name], capture_output=True, text=True, check=True).stdout
        assert ".symtab" not in dynamic, f"{name} is not stripped"
        assert not re.search(r"libswift|libdeflate|libsystemd|RUNPATH.*swift", dynamic), name
    assert newest == int(match[1])
    assert newest <= 28, "RHEL 8 has glibc 2.28"


def test_man_pages_and_completions_are_where_they_are_looked_for(environment: Path, clean: dict[str, str]) -> None:
    share = environment / "share"
    for page in ("man1/noether-writer.1", "man8/noether-writerd.8", "man5/noether-writer.yaml.5"):
        assert (share / "man" / page).read_bytes() == (ROOT / "config/man" / Path(page).name).read_bytes()
    for shell, place in (
        ("bash", "bash-completion/completions/noether-writer"),
        ("zsh", "zsh/site-functions/_noether-writer"),
        ("fish", "fish/vendor_completions.d/noether-writer.fish"),
    ):
        program = environment / "bin/noether-writer"
        printed = subprocess.run([program, "completions", shell], capture_output=True, env=clean)
        assert printed.returncode == 0 and printed.stdout == (share / place).read_bytes()


def test_each_framework_and_tracker_has_an_extra(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        modules = {Path(name).stem for name in archive.namelist() if name.count("/") == 1}
        bridges = {Path(name).stem[1:] for name in archive.namelist() if "/bridges/_" in name}
    frameworks = {"lightning", "transformers", "accelerate", "ignite", "deepspeed"}
    trackers = {"wandb", "mlflow", "trackio"}
    assert frameworks <= modules and trackers <= bridges
    assert set(metadata.get_all("Provides-Extra") or ()) >= frameworks | trackers | {"torch", "noether"}
    assert metadata["Requires-Python"] == ">=3.10"


def test_licence_and_notices_are_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [information] = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        for name in ("LICENSE", "NOTICE"):
            assert archive.read(f"{information}/licenses/{name}") == (ROOT / name).read_bytes()
        head, _, description = archive.read(f"{information}/METADATA").decode().partition("\n\n")
    metadata = email.message_from_string(head)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    assert metadata["Version"] == noether_writer.__version__
    assert description == (ROOT / "README.md").read_text()


def test_notices_name_all_that_is_linked_statically() -> None:
    """Each Swift package that is resolved, and each static library that the Makefile links."""
    notice = (ROOT / "NOTICE").read_text()
    packages = [pin["identity"] for pin in json.loads((ROOT / "Package.resolved").read_text())["pins"]]
    [libraries] = re.findall(r"for name in ([\w ]+); do ln -sf", (ROOT / "Makefile").read_text())
    assert packages and libraries
    for name in ["swift-foundation", "swift-corelibs-libdispatch", *packages, *(f"lib{x}" for x in libraries.split())]:
        assert name in notice, name


def test_its_types_are_checked_in_a_users_program(wheel: Path, environment: Path, tmp_path: Path) -> None:
    assert "noether_writer/py.typed" in zipfile.ZipFile(wheel).namelist()
    (tmp_path / "program.py").write_text(TYPED)
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", environment / "bin/python", "program.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")},
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_ten_lines_train_log_and_save(environment: Path, clean: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [environment / "bin/python", script, tmp_path / "runs"], env=clean, capture_output=True, text=True, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs/first"
    import torch

    assert list(torch.load(run / "tracker/entries.th")["loss"]) == list(range(1, 101))
    assert "weight" in torch.load(run / "checkpoints/net_cp=U100_model.th")["state_dict"]

    # The daemon that was started is the wheel's, and the command line on PATH speaks to it.
    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["noether-writer", *arguments], env=clean, capture_output=True, text=True)

    status = json.loads(cli("status", "--json").stdout)
    program = Path(f"/proc/{status['pid']}/exe").resolve()
    assert program == (next(environment.glob("lib/python3*/site-packages")) / "noether_writer/bin/noether-writerd")
    assert cli("verify", str(run)).returncode == 0
    assert "⠤" in cli("plot", str(run), "loss").stdout or "⣀" in cli("plot", str(run), "loss").stdout
    arguments = Path(f"/proc/{status['pid']}/cmdline").read_text().split("\0")
    assert arguments[3:5] == ["--exit-idle", "60"]
    os.kill(status["pid"], 15)


def test_the_daemon_leaves_when_it_is_idle(environment: Path, clean: dict[str, str], tmp_path: Path) -> None:
    """As started by a trainer, but for the minute."""
    daemon = subprocess.Popen(["noether-writerd", "--exit-idle", "1"], env=clean, stderr=subprocess.PIPE, text=True)
    start = time.monotonic()
    assert daemon.wait(20) == 0
    assert daemon.stderr is not None and "idle for 1 s" in daemon.stderr.read()
    assert time.monotonic() - start < 10


def test_it_starts_where_libsystemd_is_absent(environment: Path, clean: dict[str, str], tmp_path: Path) -> None:
    """In a namespace of mounts where the library can't be opened."""
    library = next(Path("/usr/lib").glob("*/libsystemd.so.0"), None)
    probe = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if os.geteuid() != 0 or probe.returncode != 0:
        pytest.skip("needs root and mount namespaces")
    empty = tmp_path / "empty"
    empty.touch()
    hide = f"mount --bind {empty} {library.resolve()} && " if library else ""
    command = f"{hide}exec noether-writerd --exit-idle 1"
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], env=clean, capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 0, result.stderr
    assert "serving" in result.stderr
