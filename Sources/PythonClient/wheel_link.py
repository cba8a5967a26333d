# SPDX-License-Identifier: Apache-2.0
"""Links a program that SwiftPM has built once more, for glibc 2.28 and newer: RHEL 8, Ubuntu 20.04, Debian 10.

What is linked on this machine needs this machine's glibc. Zig has the names and versions of each glibc since 2.17, and
makes the stub libraries and the start-up object of 2.28 from them. libstdc++ goes into the program: an older system's
lacks names, too. What remains is in older_glibc.c.

Usage: wheel_link.py BUILD_FOLDER STATIC_FOLDER OUT_FOLDER PROGRAM ...
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

# RHEL 8's; the oldest that the Python versions this client supports still have wheels for.
GLIBC = "2.28"


def made_by_clang(name: str) -> str:
    """The path of a file that Swift's clang brings or finds, for instance crtbeginS.o."""
    return subprocess.run(
        ["clang", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def stubs(folder: Path) -> None:
    """Puts the stub libraries, Scrt1.o and libc_nonshared.a of GLIBC into `folder`, as a linker looks for them."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "any.c"
    source.write_text("int main(void) { return 0; }\n")
    cache = str(folder / "zig")
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{platform.machine()}-linux-gnu.{GLIBC}", "-pie"]
    said = subprocess.run(
        [*command, "-fno-sanitize=undefined", "-v", str(source), "-o", str(folder / "any")],
        check=True, capture_output=True, text=True, env=environment,
    ).stderr  # fmt: skip
    linking = said.splitlines()[-1]
    found = re.findall(r"\S+/(?:Scrt1\.o|libc_nonshared\.a|lib\w+\.so\.\d)", linking)
    paths = [Path(path).absolute() for path in found]
    if not any(path.name == "Scrt1.o" for path in paths):
        raise SystemExit(f"wheel_link.py does not understand how Zig links:\n{linking}")
    for path in paths:
        for name in {path.name, re.sub(r"\.so\.\d$", ".so", path.name)}:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(path)


def main(build: Path, static: Path, out: Path, programs: list[str]) -> int:
    folder = out / "stubs"
    stubs(folder)
    # The linker takes the archive if it finds no shared library beside it.
    archive = folder / "libstdc++.a"
    archive.unlink(missing_ok=True)
    archive.symlink_to(made_by_clang("libstdc++.a"))
    newer = folder / "older_glibc.o"
    source = Path(__file__).with_name("older_glibc.c")
    subprocess.run(["clang", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-c", source, "-o", newer], check=True)
    start = [folder / "Scrt1.o", made_by_clang("crtbeginS.o"), folder / "libc_nonshared.a", newer]
    objects = [word for path in [*start, made_by_clang("crtendS.o")] for word in ("-Xclang-linker", str(path))]
    for program in programs:
        subprocess.run(
            [
                "swiftc", "-emit-executable", "-static-stdlib", "-use-ld=lld", "-o", out / program,
                f"@{build / (program + '.product')}/Objects.LinkFileList", f"-L{folder}", f"-L{static}",
                # SwiftPM gives each program's entry a name of its own.
                "-Xlinker", f"--defsym=main={program.replace('-', '_')}_main", "-Xclang-linker", "-nostartfiles",
                *objects, "-Xlinker", "--as-needed", "-Xlinker", "--gc-sections",
                # This machine's libgcc_s, which is not the one that the program will meet, wants a newer glibc.
                "-Xlinker", "--allow-shlib-undefined", "-lpthread", "-ldl", "-lrt",
            ],
            check=True,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    build_folder, static_folder, out_folder, *names = sys.argv[1:]
    sys.exit(main(Path(build_folder), Path(static_folder), Path(out_folder), names))
