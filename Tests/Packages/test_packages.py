# SPDX-License-Identifier: Apache-2.0
"""The packages, installed into the root directories of an older system (glibc 2.31), and used there.

Needs root and a network: `make test-packages`, each night.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import noether_writer
import pytest
import torch

ROOT = Path(__file__).parents[2]

INSTALLED = [
    "usr/bin/noether-writer", "usr/bin/noether-writerd", "etc/noether-writer/noether-writer.yaml",
    "usr/lib/systemd/user/noether-writer.socket", "usr/lib/systemd/system/noether-writer@.service",
    "usr/share/man/man8/noether-writerd.8", "usr/share/doc/noether-writer/NOTICE",
    "usr/share/bash-completion/completions/noether-writer",
]  # fmt: skip


def run(*arguments: object, check: bool = True) -> str:
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def mirror() -> str:
    """This system's own mirror of Debian, or everybody's."""
    said = run("apt-get", "indextargets", "--format", "$(SITE)", "Origin: Debian", check=False)
    sites = re.findall(r"^https?://\S+/debian/?$", said, re.MULTILINE)
    return sites[0] if sites else "http://deb.debian.org/debian"


@pytest.fixture(scope="module")
def older_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can make a root directory")
    path = tmp_path_factory.mktemp("bullseye")
    run("debootstrap", "--variant=minbase", "--no-check-gpg", "bullseye", path, mirror())
    # A Swift program reads its arguments there.
    run("mount", "-t", "proc", "proc", path / "proc")
    yield path
    run("umount", path / "proc")


@pytest.fixture
def daemon_of(older_system: Path) -> Iterator[None]:
    """The installed daemon, which runs in the older system and is used by a trainer of this one."""
    with tempfile.TemporaryDirectory(prefix="run-", dir=older_system) as directory:
        inside = "/" + Path(directory).name + "/socket"
        started = subprocess.Popen(
            ["chroot", older_system, "/usr/bin/noether-writerd", "--socket", inside],
            env={"PATH": "/usr/sbin:/usr/bin:/bin", "HOME": "/root", "XDG_STATE_HOME": f"{inside}-state"},
        )
        while not Path(str(older_system) + inside).exists():
            assert started.poll() is None, "the daemon has left"
            time.sleep(0.01)
        os.environ["NOETHER_WRITER_SOCKET"] = str(older_system) + inside
        try:
            yield
        finally:
            del os.environ["NOETHER_WRITER_SOCKET"]
            started.terminate()
            assert started.wait() == 0


def save_and_load(tmp_path: Path) -> None:
    state = {"weight": torch.arange(100_000.0)}
    with noether_writer.open_run(tmp_path, "r") as writer:
        writer.log({"loss": 0.5}, update=1)
        ticket = writer.save("net", "U1", {"state_dict": state})
        ticket.wait()
    loaded = torch.load(ticket.paths[0])
    assert torch.equal(loaded["state_dict"]["weight"], state["weight"])


def test_deb(older_system: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    [package] = (ROOT / "dist").glob("noether-writer_*.deb")
    target = older_system / "tmp" / package.name
    target.write_bytes(package.read_bytes())
    run("chroot", older_system, "dpkg", "-i", f"/tmp/{package.name}")
    assert [name for name in INSTALLED if not (older_system / name).is_file()] == []
    assert "install ok installed" in run("chroot", older_system, "dpkg", "-s", "noether-writer")
    version = run("chroot", older_system, "noether-writer", "--version").strip()
    assert version == noether_writer.__version__
    request.getfixturevalue("daemon_of")
    save_and_load(tmp_path)
    # The site's own settings survive an update and a removal; a purge takes them.
    settings = older_system / "etc/noether-writer/noether-writer.yaml"
    settings.write_text("keep_last: 3\n")
    run("chroot", older_system, "dpkg", "-i", "--force-confold", f"/tmp/{package.name}")
    assert settings.read_text() == "keep_last: 3\n"
    # So do units that are enabled, and the state.
    state = older_system / "var/lib/noether-writer/alice"
    state.mkdir(parents=True)
    enabled = older_system / "etc/systemd/system/multi-user.target.wants/noether-writer@alice.socket"
    enabled.parent.mkdir(parents=True, exist_ok=True)
    enabled.symlink_to("/usr/lib/systemd/system/noether-writer@.socket")
    run("chroot", older_system, "dpkg", "-r", "noether-writer")
    assert settings.exists() and not (older_system / "usr/bin/noether-writerd").exists()
    assert state.exists() and enabled.is_symlink()
    run("chroot", older_system, "dpkg", "--purge", "noether-writer")
    assert not settings.exists() and not state.exists() and not enabled.is_symlink()


def test_rpm(older_system: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    [package] = (ROOT / "dist").glob("noether-writer-*.rpm")
    needed = run("rpm", "-qp", "--requires", package)
    newest = max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", needed))
    assert newest <= 28, "RHEL 8 has glibc 2.28"
    # This root has Debian's packages, of which rpm knows nothing.
    run("rpm", "--root", older_system, "--nodeps", "-i", package)
    assert [name for name in INSTALLED if not (older_system / name).is_file()] == []
    request.getfixturevalue("daemon_of")
    save_and_load(tmp_path)
    run("rpm", "--root", older_system, "-e", "noether-writer")
    assert not (older_system / "usr/bin/noether-writerd").exists()


@pytest.mark.parametrize("program", ["usr/bin/noether-writer", "usr/bin/noether-writerd"])
def test_programs_are_stripped(program: str, tmp_path: Path) -> None:
    [package] = (ROOT / "dist").glob("noether-writer_*.deb")
    run("dpkg-deb", "-x", package, tmp_path)
    assert ".symtab" not in run("readelf", "-S", tmp_path / program)
