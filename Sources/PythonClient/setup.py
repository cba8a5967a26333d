"""What pyproject.toml can't say: a wheel that holds programs is of one platform, and of no Python's ABI.

`make wheel` puts the programs into noether_writer/bin and says the platform, by the glibc that they need. Without them
this builds the pure wheel, which takes noether-writerd from PATH.
"""

from __future__ import annotations

import os

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.dist import Distribution

PLATFORM = os.environ.get("NOETHER_WRITER_WHEEL_PLATFORM")


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", PLATFORM) if PLATFORM else super().get_tag()


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return PLATFORM is not None


setup(cmdclass={"bdist_wheel": PlatformWheel}, distclass=PlatformDistribution)
