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


def shared_files() -> list[tuple[str, list[str]]]:
    """Man pages and completions, if `make wheel` has put them here: below the environment's prefix, where man(1) and
    the shells look."""
    man = sorted(path.relative_to(HERE) for path in (HERE / "man").glob("*.[1-8]"))
    found = [(f"share/man/man{path.suffix[1:]}", path) for path in man]
    for shell, place in (
        ("bash", "share/bash-completion/completions/noether-writer"),
        ("zsh", "share/zsh/site-functions/_noether-writer"),
        ("fish", "share/fish/vendor_completions.d/noether-writer.fish"),
    ):
        if (HERE / "completions" / shell).exists():
            # A file of the wheel has the name that it has here.
            named = HERE / "completions" / Path(place).name
            named.write_bytes((HERE / "completions" / shell).read_bytes())
            found.append((str(Path(place).parent), named.relative_to(HERE)))
    return [(folder, [str(path)]) for folder, path in found]


setup(
    data_files=shared_files(),
    cmdclass={"bdist_wheel": PlatformWheel},
    distclass=PlatformDistribution,
    ext_modules=[] if PLATFORM else [CORE],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
