# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml can't say: the core is built for every CPython from 3.10 on (its limited API), and a wheel that
holds programs is of one platform.

`make wheel` puts the core and the programs (into noether_writer/bin) there, and says the platform, by the glibc that
they need. Without them this compiles the core, and the client takes noether-writerd from PATH.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.dist import Distribution

PLATFORM = os.environ.get("NOETHER_WRITER_WHEEL_PLATFORM")


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("cp310", "abi3", PLATFORM) if PLATFORM else super().get_tag()


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


HERE = Path(__file__).parent
# In the project's tree, and in a copy of it that has what is shared with the Swift client beside its own.
SHARED = next((folder for folder in (HERE / "CCopy", HERE.parent / "CCopy") if folder.exists()), HERE)
CORE = Extension(
    "noether_writer._core",
    sorted(os.path.relpath(path, HERE) for path in (*(HERE / "core").glob("*.c"), *SHARED.glob("*.c"))),
    include_dirs=[str(SHARED / "include")],
    extra_compile_args=["-fvisibility=hidden"],
    py_limited_api=True,
)

setup(
    cmdclass={"bdist_wheel": PlatformWheel},
    distclass=PlatformDistribution,
    ext_modules=[] if PLATFORM else [CORE],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
