# SPDX-License-Identifier: Apache-2.0
"""Run by every Python that `python -m noether_writer run` starts: replaces Noether's writers when they are imported,
and then runs the sitecustomize that this one shadows."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

WRITERS = "noether.core.writers"
HERE = str(Path(__file__).parent)


class _PatchingLoader(importlib.abc.Loader):
    """Loads as the original loader does, and replaces the writers behind it."""

    def __init__(self, original: importlib.abc.Loader) -> None:
        self._original = original

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._original.exec_module(module)
        from noether_writer.noether import patch_writers

        patch_writers(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != WRITERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _PatchingLoader(spec.loader)
        return spec


def _run_shadowed() -> None:
    elsewhere = [entry for entry in sys.path if entry != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _Finder())
_run_shadowed()
