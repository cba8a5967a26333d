# SPDX-License-Identifier: Apache-2.0
"""MLflow, by its client: a server, a database or a directory, as MLFLOW_TRACKING_URI says."""

from __future__ import annotations

import hashlib
import math
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from .. import frames
from ._tracker import Gone, Identity, Tracker, Unreachable, Upload, flat, missing

Result = TypeVar("Result")

# mlflow/utils/validation.py
_METRICS_PER_BATCH = 1000
_PARAMETERS_PER_BATCH = 100
_PARAMETER_CHARACTERS = 6000
_KEY_CHARACTERS = 250
_REFUSED_CHARACTERS = re.compile(r"[^/\w.\- :]")

_KEY_TAG = "noether_writer.bridge"
_DIRECTORY_TAG = "noether_writer.run_directory"
_NOTE_TAG = "mlflow.note.content"


class Mlflow(Tracker):
    name = "mlflow"
    project_variable = "MLFLOW_EXPERIMENT_NAME"
    takes_additions = True

    @classmethod
    def check(cls) -> None:
        # The bridge asks again by itself, and says so; a call that asks for minutes would keep it from leaving.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        try:
            import mlflow.tracking  # noqa: F401
        except ImportError as error:
            raise missing("mlflow", "mlflow", error) from error

    def open(self, identity: Identity) -> int:
        from mlflow import MlflowClient

        self._keys: dict[str, str] = {}
        self._found: dict[str, set[int]] = {}
        self._parameters: dict[str, str] = {}
        # In a thread of its own, a client has connections of its own.
        self._client = _answering(MlflowClient)
        # From which step on points may be there that an earlier process has brought.
        self._floor = identity.noted[min(identity.kept, len(identity.noted) - 1)] if identity.noted else 0
        self._is_unsure = False
        self._kept = identity.kept
        run_id = self.memory.recall("mlflow_run")
        if run_id is None:
            run_id = self._find(identity) or self._make(identity)
            self.memory.remember(mlflow_run=run_id)
        self._run = str(run_id)
        found = self._check_active()
        if found.info.status != "RUNNING":
            _answering(lambda: self._client.update_run(self._run, status="RUNNING"))
        self._parameters = dict(found.data.params)
        return identity.kept

    def _check_active(self) -> Any:
        """
        Raises:
            Gone: somebody has deleted the run.
        """
        found = _answering(lambda: self._client.get_run(self._run))
        if found.info.lifecycle_stage != "active":
            raise Gone(f"the MLflow run {self._run} was deleted")
        return found

    def _experiment(self, name: str) -> str:
        found = _answering(lambda: self._client.get_experiment_by_name(name))
        if found is not None:
            if found.lifecycle_stage != "active":
                raise Unreachable(f"the MLflow experiment {name!r} is deleted: restore it, or choose another --project")
            return str(found.experiment_id)
        return str(_answering(lambda: self._client.create_experiment(name)))

    def _find(self, identity: Identity) -> str | None:
        """The run that an earlier process has made, and has not noted before it died."""
        experiment = self._experiment(identity.project)
        runs = _answering(
            lambda: self._client.search_runs([experiment], f"tags.`{_KEY_TAG}` = '{identity.key}'", max_results=1)
        )
        return str(runs[0].info.run_id) if runs else None

    def _make(self, identity: Identity) -> str:
        experiment = self._experiment(identity.project)
        began = None if identity.began is None else _milliseconds(identity.began)
        tags = {_KEY_TAG: identity.key, _DIRECTORY_TAG: identity.directory[:5000]}
        run = _answering(
            lambda: self._client.create_run(experiment, start_time=began, tags=tags, run_name=identity.name)
        )
        return str(run.info.run_id)

    def configure(self, config: Mapping[str, Any]) -> None:
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        wanted: dict[str, str] = {}
        for key, value in flat(config, ".").items():
            text = str(value)
            if len(text) > _PARAMETER_CHARACTERS:
                self.voice.once(f"the hyperparameter {key} has {len(text)} characters: MLflow gets the first 6,000")
                text = text[:_PARAMETER_CHARACTERS]
            wanted[self._key(key)] = text
        changed = {key for key, text in wanted.items() if self._parameters.get(key, text) != text}
        if changed:
            self.voice.once(
                f"MLflow does not change the hyperparameters of a run: {', '.join(sorted(changed))} stay as they were, "
                "and the tag config.KEY has the new value"
            )
            for key in changed:
                tag, text = f"config.{key}"[:_KEY_CHARACTERS], wanted[key]
                _answering(partial(self._client.set_tag, self._run, tag, text))
        new = [(key, text) for key, text in wanted.items() if key not in self._parameters]
        for start in range(0, len(new), _PARAMETERS_PER_BATCH):
            batch = [Param(key, text) for key, text in new[start : start + _PARAMETERS_PER_BATCH]]
            try:
                _answering(partial(self._client.log_batch, self._run, params=batch))
            except MlflowException as error:
                self.voice.once(f"MLflow refuses hyperparameters: {error}")
            else:
                self._parameters.update((each.key, each.value) for each in batch)

    def send(self, uploads: Sequence[Upload]) -> None:
        if self._is_unsure:
            # The connection was lost, and the server may have taken it.
            self._found.clear()
            self._floor = uploads[0].update
        try:
            self._send(uploads)
        except Unreachable:
            self._is_unsure = True
            raise
        self._is_unsure = False
        self._kept = max(self._kept, uploads[-1].position + 1)

    def _send(self, uploads: Sequence[Upload]) -> None:
        from mlflow.entities import Metric

        metrics = []
        for each in uploads:
            for key, value in each.values.items():
                number = self._number(key, value)
                if number is None:
                    continue
                name = self._key(key)
                if not ((each.is_in_doubt or self._is_unsure) and self._has(name, each.update)):
                    metrics.append(Metric(name, number, _milliseconds(each.wall_time), each.update))
        for start in range(0, len(metrics), _METRICS_PER_BATCH):
            self._log(metrics[start : start + _METRICS_PER_BATCH])

    def _log(self, metrics: Sequence[Any]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            _answering(lambda: self._client.log_batch(self._run, metrics=metrics))
        except MlflowException as error:
            # What MLflow refuses, it refuses with all that came together with it.
            self._check_active()
            if len(metrics) == 1:
                self.voice.once(
                    f"MLflow refuses a value of {metrics[0].key!r}, and it is left out: {error}", metrics[0].key
                )
            for metric in metrics if len(metrics) > 1 else ():
                self._log([metric])

    def _has(self, key: str, step: int) -> bool:
        """Whether an earlier process has brought it. Not every store of MLflow takes a point only once."""
        from mlflow.exceptions import MlflowException

        if key not in self._found:
            try:
                history = _answering(lambda: self._client.get_metric_history(self._run, key))
            except MlflowException:
                history = []
            self._found[key] = {point.step for point in history if point.step >= self._floor}
        return step in self._found[key]

    def _number(self, key: str, value: frames.Scalar) -> float | None:
        if value is None or isinstance(value, str):
            kind = "no value (None)" if value is None else "a text"
            self.voice.once(f"MLflow takes numbers only: {kind} of {key!r} is left out", f"text {key}")
            return None
        try:
            number = float(value)
        except OverflowError:
            self.voice.once(
                f"a whole number of {key!r} is larger than any float, and MLflow takes no other", f"big {key}"
            )
            return None
        if math.isinf(number):
            self.voice.once("MLflow's databases keep an infinite value as 1.7976931348623157e308", "infinite")
        return number

    def _key(self, key: str) -> str:
        """A name that MLflow takes. Different keys have different ones."""
        name = self._keys.get(key)
        if name is None:
            name = _REFUSED_CHARACTERS.sub("_", key)
            if posixpath.normpath(name or ".") != name or name.startswith(("/", "..")) or name == ".":
                name = name.replace("/", "_").replace(".", "_") or "_"
            if len(name) > _KEY_CHARACTERS or name != key:
                mark = hashlib.sha256(key.encode()).hexdigest()[:6]
                name = f"{name[: _KEY_CHARACTERS - 7]}_{mark}"
                self.voice.once(f"MLflow takes no key {key!r}: it is {name!r} there", f"key {key}")
            self._keys[key] = name
        return name

    def kept(self) -> int:
        return self._kept

    def finish(self, is_finished: bool) -> None:
        _answering(lambda: self._client.set_terminated(self._run, "FINISHED" if is_finished else "FAILED"))

    def leave(self, note: str | None) -> None:
        if note is not None:
            _answering(lambda: self._client.set_tag(self._run, _NOTE_TAG, note))
            _answering(lambda: self._client.set_terminated(self._run, "KILLED"))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _answering(call: Callable[[], Result]) -> Result:
    """
    Raises:
        Unreachable, Gone.
        MlflowException: MLflow does not take what it was given.
    """
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise Gone(f"MLflow does not have the run any more ({error})") from error
        raise Unreachable(str(error).splitlines()[0][:300]) from error
    except Exception as error:
        # What MLflow's own code and its many stores raise: of the network, of a database, of a disk.
        raise Unreachable(
            f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        ) from error
