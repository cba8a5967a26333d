# SPDX-License-Identifier: Apache-2.0
"""Trackers that are away for a while: an MLflow server that is not there yet, and that dies; W&B without a network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import noether_writer
import pytest
from conftest import Store
from harness import Daemon, until
from test_bridges import check, notes, sent_and_kept, train


class Server:
    """An MLflow server; its store stays when it dies."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder}/mlflow.db", "--workers", "1"]
        with open(self._folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=log, start_new_session=True, env=os.environ
            )
        until(self._answers, what=(self._folder / "server.log").read_text())

    def _answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "store").mkdir()
    found = Server(tmp_path / "store")
    yield found
    found.kill()


def test_an_mlflow_server_that_comes_late_and_dies(daemon: Daemon, server: Server, tmp_path: Path) -> None:
    store = Store("mlflow", tmp_path / "store")
    run = noether_writer.open_run(tmp_path / "runs", "r")
    bridge = store.bridge(run.directory, MLFLOW_TRACKING_URI=server.url)
    train(run, 1, 500)
    until(lambda: "the tracker does not answer" in bridge.said, what=bridge.said)
    server.start()
    until(lambda: "the tracker answers again" in bridge.said, what=bridge.said)
    until(lambda: sent_and_kept(run, store)[1] > 0)
    train(run, 501, 3000)
    server.kill()
    train(run, 3001, 4000)
    until(lambda: bridge.said.count("the tracker does not answer") == 2, what=bridge.said)
    # The bridge dies too while it is away.
    bridge.kill()
    bridge = store.bridge(run.directory, MLFLOW_TRACKING_URI=server.url)
    until(lambda: notes(run, store).exists())
    server.start()
    run.finish()
    run.close()
    bridge.wait()
    check(store.runs()["r"], 4000)
    store.end()


@pytest.mark.parametrize("store", ["wandb"], indirect=True)
def test_wandb_without_a_network(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    """Online it waits, says so, and loses nothing; offline it needs no network."""
    online = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    run = noether_writer.open_run(tmp_path / "runs", "r")
    bridge = store.bridge(run.directory, WANDB_INIT_TIMEOUT="5", **online)
    train(run, 1, 100)
    until(lambda: "the tracker does not answer" in bridge.said, what="it did not say so")
    assert bridge.process.poll() is None
    bridge.stop()
    bridge = store.bridge(run.directory)
    run.finish()
    run.close()
    bridge.wait()
    check(store.runs()["r"], 100)


@pytest.mark.parametrize("store", ["wandb"], indirect=True)
def test_wandb_without_a_login_is_refused(daemon: Daemon, store: Store, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path / "runs", "r") as run:
        train(run, 1, 10)
    said = store.bridge(run.directory, WANDB_MODE="online", HOME=str(tmp_path), NETRC=str(tmp_path / "none")).wait(1)
    assert "wandb login" in said and "Traceback" not in said
