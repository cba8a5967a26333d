# SPDX-License-Identifier: Apache-2.0
"""Says which platform a wheel with these programs is for: `manylinux_2_N_ARCH`, N by the newest glibc symbol that one
of them needs (PEP 600). Refuses what PEP 600 does not promise on every such system.

Usage: wheel_platform.py PROGRAM ...
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys

# What PEP 600 lets a manylinux wheel take from the system, as far as these programs may want it.
ALLOWED = {
    "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libgcc_s.so.1",
    "libstdc++.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip


def main(programs: list[str]) -> int:
    newest = (0, 0)
    for program in programs:
        text = subprocess.run(["objdump", "-p", program], check=True, capture_output=True, text=True).stdout
        needed = set(re.findall(r"NEEDED\s+(\S+)", text))
        if strange := needed - ALLOWED:
            print(f"{program} needs {', '.join(sorted(strange))}, which not every system has", file=sys.stderr)
            return 1
        versions = re.findall(r"GLIBC_(\d+)\.(\d+)", text)
        newest = max(newest, *((int(major), int(minor)) for major, minor in versions))
    print(f"manylinux_{newest[0]}_{newest[1]}_{platform.machine()}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
