# SPDX-License-Identifier: Apache-2.0
"""The recipes of config/slurm and config/kubernetes: their own scripts and commands, with cgroups and namespaces that
stand for a job and for the containers of a pod."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from harness import daemon_of
from test_systemd import ROOT, command, prefix, until

__all__ = ["prefix"]

SLURM = ROOT / "config/slurm"
KUBERNETES = ROOT / "config/kubernetes"

TRAINER = """
import noether_writer, os, sys, time, torch
if "SLURM_JOB_UID" in os.environ:  # As slurmd starts a task.
    os.setgroups([]), os.setgid(int(os.environ["SLURM_JOB_GID"])), os.setuid(int(os.environ["SLURM_JOB_UID"]))
run = noether_writer.open_run(sys.argv[1], "r")
for update in range(1, 101):
    run.log({"loss": 1.0 / update}, update=update)
ticket = run.save("net", "U100", {"w": torch.arange(1_000_000)})
while run._core.kept_rows or run._core.saves_not_accepted:
    time.sleep(0.005)
print("handed over", flush=True)
sys.stdin.read()
"""
HANDED_OVER = "until the daemon has accepted it"


def wanted(out: Path) -> bool:
    return torch.equal(torch.load(out / "r/checkpoints/net_cp=U100_model.th")["w"], torch.arange(1_000_000))


@pytest.fixture
def environment(prefix: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NOETHER_WRITER")}
    # Jobs and containers have a /tmp of their own.
    programs = Path("/run/programs")
    if not programs.exists():
        shutil.copytree(prefix / "bin", programs)
    return {**kept, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def shared(environment: dict[str, str]) -> Iterator[Path]:
    """A file system that jobs and containers see, as they do /scratch."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        yield Path(path)


# Slurm


@pytest.fixture
def job() -> Iterator[Path]:
    """The cgroup of a job."""
    path = Path("/sys/fs/cgroup/job_1")
    path.mkdir()
    yield path
    (path / "cgroup.kill").write_text("1")
    until(lambda: not (path / "cgroup.procs").read_text())
    path.rmdir()


@pytest.mark.parametrize("user", ["root", "nobody"])
def test_slurm(user: str, environment: dict[str, str], job: Path, shared: Path) -> None:
    account = pwd.getpwnam(user)
    os.chown(shared, account.pw_uid, account.pw_gid)
    # With next to no environment, as slurmd starts these.
    slurm = {"PATH": environment["PATH"], "SLURM_JOB_USER": user, "SLURM_JOB_ID": "1"}
    # No systemd of the system is here: the prolog starts the daemon itself. Twice: two jobs of a user share a node.
    for _ in range(2):
        command(SLURM / "prolog", env=slurm)
    printed = command(SLURM / "task-prolog", env=slurm).stdout.split()
    place = Path(f"/run/noether-writer/{user}/socket")
    assert printed == ["export", f"NOETHER_WRITER_SOCKET={place}"]
    ids = {"SLURM_JOB_UID": str(account.pw_uid), "SLURM_JOB_GID": str(account.pw_gid)}
    of_task = {**environment, **slurm, **ids, "NOETHER_WRITER_SOCKET": str(place)}
    pid = daemon_of(place)
    assert Path(f"/proc/{pid}").stat().st_uid == account.pw_uid
    # The job has a /tmp of its own, and its cgroup is killed as Slurm does at its end.
    inside = f'echo $$ > {job}/cgroup.procs; mount -t tmpfs tmpfs /tmp; exec "$@"'
    trainer = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", inside, "job", sys.executable, "-c", TRAINER, str(shared)],
        env=of_task, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert trainer.stdout is not None and trainer.stdout.readline() == "handed over\n", HANDED_OVER
    assert str(job.name) not in Path(f"/proc/{pid}/cgroup").read_text()
    (job / "cgroup.kill").write_text("1")
    trainer.wait()
    # The daemon answers nobody now: an epilog that looked at another place, or found none, would not wait.
    os.kill(pid, signal.SIGSTOP)
    epilog = subprocess.Popen([SLURM / "epilog"], env=slurm, stderr=subprocess.PIPE, text=True)
    until(lambda: epilog.poll() is not None or ends_of(place) > 1)
    assert epilog.poll() is None
    os.kill(pid, signal.SIGCONT)
    assert epilog.communicate(timeout=60)[1] == "" and epilog.returncode == 0
    assert wanted(shared) and len(torch.load(shared / "r/tracker/entries.th")["loss"]) == 100
    os.kill(pid, signal.SIGTERM)
    until(lambda: not place.exists())
    # Nothing here is success: the node is free.
    command(SLURM / "epilog", env=slurm)
    # A node that has the units has no directory of the prolog's own.
    shutil.rmtree("/run/noether-writer")


def ends_of(socket: Path) -> int:
    """How many sockets have this name: the one that listens, and the daemon's end of each connection."""
    return [line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()].count(str(socket))


# Kubernetes


class Container:
    """Its own mount, process and host name namespaces, as a container of a pod has."""

    started: ClassVar[list[Container]] = []

    def __init__(self, spec: dict[str, Any], host: str, arguments: list[str], environment: dict[str, str]) -> None:
        self.spec = spec
        self.environment = {**environment, **{each["name"]: each["value"] for each in spec["env"]}}
        inside = f'hostname {host}; mount -t tmpfs tmpfs /tmp; exec "$@"'
        self.process = subprocess.Popen(
            ["unshare", "-m", "-p", "-f", "--mount-proc", "-u", "--kill-child", "sh", "-c", inside, "sh", *arguments],
            env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started.append(self)

    @property
    def first_process(self) -> str:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        until(children.read_text)
        [child] = children.read_text().split()
        return child

    def execute(self, arguments: list[str], check: bool = True) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "-t", self.first_process, "-m", "-p", "-u"]
        return command(*enter, *arguments, env=self.environment, check=check)

    def terminate(self) -> int:
        """The kubelet's way: preStop, then SIGTERM to the container's first process."""
        self.execute(self.spec["lifecycle"]["preStop"]["exec"]["command"])
        os.kill(int(self.first_process), signal.SIGTERM)
        return self.process.wait()

    def kill(self) -> None:
        if self.process.poll() is None:
            first = self.first_process
            # All that runs in its namespace is killed with it.
            os.kill(int(first), signal.SIGKILL)
            self.process.wait()


@pytest.fixture
def volumes(tmp_path: Path) -> Iterator[Path]:
    """What a pod mounts, at the paths of the manifests; the test's own /runs goes with its namespace."""
    for path in ("/run/noether-writer", "/var/lib/noether-writer", "/runs"):
        Path(path).mkdir(exist_ok=True)
        below = tmp_path / path.strip("/").replace("/", "-")
        below.mkdir()
        command("mount", "--bind", below, path)
    started: list[Container] = Container.started
    yield Path("/runs")
    # Nobody may write there when the volumes are gone.
    for container in started:
        container.kill()
    started.clear()
    for path in ("/run/noether-writer", "/var/lib/noether-writer", "/runs"):
        command("umount", path)
    Path("/runs").rmdir()


def containers(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The daemon's and the trainer's, of a manifest."""
    manifest = yaml.safe_load((KUBERNETES / name).read_text())
    if manifest["kind"] == "DaemonSet":
        [daemon] = manifest["spec"]["template"]["spec"]["containers"]
        return daemon, {"env": [each for each in daemon["env"] if each["name"] == "NOETHER_WRITER_SOCKET"]}
    [daemon] = manifest["spec"]["initContainers"]
    [trainer] = manifest["spec"]["containers"]
    return daemon, trainer


def serve(spec: dict[str, Any], host: str, environment: dict[str, str]) -> Container:
    container = Container(spec, host, ["noether-writerd"], environment)
    until(lambda: Path("/run/noether-writer/socket").exists())
    until(lambda: container.execute(["noether-writer", "status"], check=False).returncode == 0)
    return container


@pytest.mark.parametrize("manifest", ["sidecar.yaml", "daemonset.yaml"])
def test_kubernetes(manifest: str, environment: dict[str, str], volumes: Path) -> None:
    daemon_spec, trainer_spec = containers(manifest)
    daemon = serve(daemon_spec, "pod-1", environment)
    trainer = Container(
        trainer_spec, "pod-2", [sys.executable, "-c", TRAINER, str(volumes)], {**environment, "PYTHONPATH": PYTHON_PATH}
    )
    assert trainer.process.stdout is not None and trainer.process.stdout.readline() == "handed over\n", HANDED_OVER
    # The trainer's container dies; what it has handed over is written before the pod ends.
    trainer.kill()
    assert daemon.terminate() == 0
    assert wanted(volumes) and len(torch.load(volumes / "r/tracker/entries.th")["loss"]) == 100


@pytest.mark.parametrize("manifest", ["sidecar.yaml", "daemonset.yaml"])
def test_a_pods_times_and_memory_suffice_for_its_daemon(manifest: str) -> None:
    daemon, _ = containers(manifest)
    pod = yaml.safe_load((KUBERNETES / manifest).read_text())["spec"]
    pod = pod["template"]["spec"] if "template" in pod else pod
    values = {each["name"].rpartition("SETTING_")[2]: each["value"] for each in daemon["env"]}
    drain = int(daemon["lifecycle"]["preStop"]["exec"]["command"][-1])
    # Else it is killed before it has named what storage has not taken.
    assert drain + int(values["DRAIN_SECONDS"]) < pod["terminationGracePeriodSeconds"]
    if limit := daemon.get("resources", {}).get("limits", {}).get("memory"):
        assert limit == "1Gi" and int(values["LOG_BYTES"]) < 1 << 30


def test_a_new_pod_finds_the_log_of_the_one_before(environment: dict[str, str], volumes: Path) -> None:
    daemon_spec, trainer_spec = containers("sidecar.yaml")
    daemon = serve(daemon_spec, "training-x7k2p", environment)
    trainer = Container(
        trainer_spec, "training-x7k2p", [sys.executable, "-c", TRAINER, str(volumes)],
        {**environment, "PYTHONPATH": PYTHON_PATH},
    )  # fmt: skip
    assert trainer.process.stdout is not None and trainer.process.stdout.readline() == "handed over\n", HANDED_OVER
    daemon.kill()
    trainer.kill()
    journal = volumes / "r/tracker/entries.journal"
    assert journal.exists() and not (volumes / "r/tracker/entries.th").exists()
    # A minute later.
    os.utime(journal, (0, 0))
    successor = serve(daemon_spec, "training-q9z4m", environment)
    # Whether a process of another container lives can't be seen: the daemon waits a minute for it to connect again.
    until(lambda: (volumes / "r/tracker/entries.th").exists() and not journal.exists(), 180)
    assert len(torch.load(volumes / "r/tracker/entries.th")["loss"]) == 100
    assert successor.terminate() == 0


PYTHON_PATH = str(ROOT / "Sources/PythonClient")
