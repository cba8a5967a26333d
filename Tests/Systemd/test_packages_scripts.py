# SPDX-License-Identifier: Apache-2.0
"""What the scripts of the packages do on a running system, whose manager is a systemd of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from test_systemd import ROOT, prefix

__all__ = ["prefix"]

SETUP = """
set -eu
# Where another user may look.
mkdir /run/programs
cp -r "$PREFIX/bin" "$PREFIX/etc" /run/programs
cp "$PREFIX"/lib/systemd/system/noether-writer@.* /run/units
sed -i "s,$PREFIX,/run/programs," /run/units/noether-writer@.*
mkdir /run/units/noether-writer@.service.d
# Both mount over parts of /proc that a PID namespace of one's own does not have.
printf '[Service]\\nProtectKernelTunables=no\\nProtectKernelLogs=no\\n' > /run/units/noether-writer@.service.d/0.conf
systemctl daemon-reload
systemctl enable --now noether-writer@nobody.socket 2> /dev/null
unit=noether-writer@nobody.service
state() { systemctl is-active noether-writer@nobody.socket "$unit" || true; }
# Nothing waits for the jobs of a package's script.
settled() { while systemctl list-jobs --no-legend | grep -q .; do sleep 0.05; done; }
links() { find /etc/systemd -name '*noether*'; }
systemctl start "$unit"
"""

Run = Callable[[str], list[str]]


@pytest.fixture
def run(prefix: Path, tmp_path: Path) -> Run:
    def run(script: str) -> list[str]:
        path = tmp_path / "script"
        path.write_text(SETUP + script)
        done = subprocess.run(
            [ROOT / "Tests/Systemd/system-manager", path],
            env=os.environ | {"PREFIX": str(prefix), "PACKAGES": str(ROOT / "config/packages")},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    return run


def test_an_update_restarts_daemons_and_only_sockets_whose_path_has_changed(run: Run) -> None:
    lines = run("""
inode() { stat -c %i "/run/noether-writer/nobody/$1"; }
pid() { systemctl show --value -p MainPID "$unit"; }
before=$(inode socket) first=$(pid)
sh "$PACKAGES/installed"
settled
[ "$(inode socket)" = "$before" ] && [ "$(pid)" != "$first" ] && echo same
state
sed -i s,/socket$,/socket2, /run/units/noether-writer@.socket
sh "$PACKAGES/installed"
settled
state
[ -S /run/noether-writer/nobody/socket2 ] && echo listens
""")
    assert lines == ["same", "active", "active", "active", "active", "listens"]


def test_a_removal_ends_daemons_and_leaves_no_links(run: Run) -> None:
    lines = run("""
sh "$PACKAGES/removing" upgrade 2
state
links
sh "$PACKAGES/removing" remove 2> /dev/null
rm -r /run/units/noether-writer@*
sh "$PACKAGES/removed" remove
state
sh "$PACKAGES/removed" purge
links
[ -e /run/noether-writer/nobody/socket ] || echo gone
""")
    link = "/etc/systemd/system/multi-user.target.wants/noether-writer@nobody.socket"
    assert lines == ["active", "active", link, "inactive", "inactive", "gone"]
