# SPDX-License-Identifier: Apache-2.0
"""The bridges with the real trackers: `make test-trackers`. Each test has a daemon and a store of its own."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from harness import Daemon

TRACKERS = ("trackio", "mlflow", "wandb")
# A point as a tracker keeps it: step, key, value, seconds since 1970.
Point = tuple[int, str, Any, float]


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    found = Daemon(tmp_path_factory.mktemp("d"))
    monkeypatch.setenv("NOETHER_WRITER_SOCKET", found.socket)
    found.start()
    yield found
    found.stop()


@dataclass
class Bridge:
    """A bridge in a process of its own."""

    tracker: str
    folder: Path
    place: str
    options: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    def start(self) -> Bridge:
        self.log = self.folder / f"bridge-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "noether_writer.bridges", self.tracker, self.place, *self.options],
                env=os.environ | self.variables,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait(self, status: int = 0, seconds: float = 300) -> str:
        try:
            found = self.process.wait(seconds)
        finally:
            self.end()
        assert found == status, self.said
        return self.said

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def stop(self) -> str:
        """As systemd does."""
        self.process.terminate()
        return self.wait()


class Store:
    """Where a tracker keeps its runs, and what it has."""

    def __init__(self, tracker: str, folder: Path) -> None:
        self.tracker, self.folder = tracker, folder
        folder.mkdir(exist_ok=True)
        self.variables = {
            "trackio": {"TRACKIO_DIR": str(folder / "trackio")},
            "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"},
            "wandb": {"WANDB_MODE": "offline", "WANDB_DIR": str(folder)},
        }[tracker]
        self._bridges: list[Bridge] = []

    def bridge(self, place: object, *options: str, **variables: str) -> Bridge:
        given = Bridge(self.tracker, self.folder, str(place), list(options), self.variables | variables)
        self._bridges.append(given.start())
        return given

    def end(self) -> None:
        for each in self._bridges:
            each.end()

    def runs(self) -> dict[str, list[Point]]:
        """The points of each run, in the order in which the tracker has them."""
        return getattr(self, f"_{self.tracker}_runs")()

    def configs(self) -> dict[str, dict[str, Any]]:
        return getattr(self, f"_{self.tracker}_configs")()

    def delete(self, name: str) -> None:
        """As a person does."""
        if self.tracker == "mlflow":
            [found] = [run for run in self.mlflow_runs() if run.info.run_name == name]
            self._mlflow_client().delete_run(found.info.run_id)
            return
        program = f"from trackio.sqlite_storage import SQLiteStorage as S; assert S.delete_run('runs', '{name}')"
        subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | self.variables)

    # MARK: trackio

    def _trackio(self, query: str) -> list[tuple[Any, ...]]:
        found = []
        for path in (self.folder / "trackio").glob("*.db"):
            with sqlite3.connect(path) as database:
                found += database.execute(query).fetchall()
        return found

    def _trackio_runs(self) -> dict[str, list[Point]]:
        from datetime import datetime

        runs: dict[str, list[Point]] = {}
        for name, step, when, text in self._trackio(
            "SELECT run_name, step, timestamp, metrics FROM metrics ORDER BY id"
        ):
            seconds = datetime.fromisoformat(when).timestamp()
            runs.setdefault(name, []).extend((step, key, value, seconds) for key, value in json.loads(text).items())
        return runs

    def _trackio_configs(self) -> dict[str, dict[str, Any]]:
        return {name: json.loads(text) for name, text in self._trackio("SELECT run_name, config FROM configs")}

    # MARK: MLflow

    def _mlflow_client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.variables["MLFLOW_TRACKING_URI"])

    def mlflow_runs(self) -> list[Any]:
        client = self._mlflow_client()
        experiments = [each.experiment_id for each in client.search_experiments()]
        return list(client.search_runs(experiments, max_results=5000))

    def _mlflow_runs(self) -> dict[str, list[Point]]:
        client, runs = self._mlflow_client(), {}
        for run in self.mlflow_runs():
            points = [
                (point.step, key, point.value, point.timestamp / 1000)
                for key in run.data.metrics
                for point in client.get_metric_history(run.info.run_id, key)
            ]
            assert run.info.run_name not in runs
            runs[run.info.run_name] = sorted(points, key=lambda point: point[0])
        return runs

    def _mlflow_configs(self) -> dict[str, dict[str, Any]]:
        return {run.info.run_name: dict(run.data.params) for run in self.mlflow_runs()}

    # MARK: W&B

    def wandb_records(self, kind: str) -> list[Any]:
        return [each for each in self._wandb_records() if each[1].WhichOneof("record_type") == kind]

    def _wandb_records(self) -> Iterator[Any]:
        """The records of all .wandb files, in the order in which `wandb sync` uploads them."""
        import struct

        from wandb.proto.wandb_internal_pb2 import Record

        for path in sorted(self.folder.glob("wandb/*run-*/*.wandb")):
            data, at, parts = path.read_bytes(), 7, b""
            while at + 7 <= len(data):
                if (left := 32768 - at % 32768) < 7:
                    at += left
                    continue
                _, length, kind = struct.unpack_from("<IHB", data, at)
                if kind == 0 or at + 7 + length > len(data):
                    break
                parts = (parts if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
                at += 7 + length
                if kind in (1, 4):
                    record = Record()
                    record.ParseFromString(parts)
                    yield path, record

    def _wandb_runs(self) -> dict[str, list[Point]]:
        runs: dict[str, list[Point]] = {}
        names: dict[Path, str] = {}
        for path, record in self._wandb_records():
            kind = record.WhichOneof("record_type")
            if kind == "run":
                names[path] = record.run.display_name
            elif kind == "history":
                row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                values = {key: json.loads(text) for key, text in row.items()}
                step, seconds = values.pop("_step"), values.pop("_timestamp")
                values.pop("_runtime")
                runs.setdefault(names[path], []).extend((step, key, value, seconds) for key, value in values.items())
        return runs

    def _wandb_configs(self) -> dict[str, dict[str, Any]]:
        configs: dict[str, dict[str, Any]] = {}
        names: dict[Path, str] = {}
        for path, record in self._wandb_records():
            kind = record.WhichOneof("record_type")
            if kind == "run":
                names[path] = record.run.display_name
            update = record.run.config if kind == "run" else record.config if kind == "config" else None
            for item in update.update if update is not None else ():
                configs.setdefault(names[path], {})[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        return configs


@pytest.fixture(params=TRACKERS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    found = Store(request.param, tmp_path / "store")
    yield found
    found.end()
