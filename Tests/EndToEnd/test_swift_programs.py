# SPDX-License-Identifier: Apache-2.0
"""What the Swift compiler says of programs that use the library: of names that were renamed, of a program's top level,
of calls that block a thread of the tasks."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon

ROOT = Path(__file__).parents[2]
BUILT = (Path(DAEMON).parent / "SwiftTrainer").resolve().parent
PROGRAMS = ROOT / "Tests/SwiftPrograms"


needs_a_compiler = pytest.mark.skipif(shutil.which("swiftc") is None, reason="there is no Swift compiler")


def compiled(program: str, *options: str) -> tuple[int, list[tuple[int, str, str]]]:
    """The status, and what was said: (line, warning or error, words)."""
    path = PROGRAMS / program
    maps = [f"-fmodule-map-file={BUILT}/{name}.build/module.modulemap" for name in ("CLinux", "CCopy")]
    command = ["swiftc", "-typecheck", "-swift-version", "6", "-I", BUILT / "Modules", "-I", ROOT / "Sources/CDeflate"]
    command += [part for each in maps for part in ("-Xcc", each)]
    result = subprocess.run([*command, *options, path], capture_output=True, text=True, timeout=120)
    found = re.findall(rf"^{re.escape(str(path))}:(\d+):\d+: (warning|error): (.*)$", result.stderr, re.M)
    return result.returncode, [(int(line), kind, words) for line, kind, words in found]


@needs_a_compiler
def test_the_first_version_s_names_compile_with_warnings_that_name_the_new_ones() -> None:
    status, said = compiled("OldNames.swift", "-parse-as-library")
    assert status == 0, said
    assert {kind for _, kind, _ in said} == {"warning"}
    words = " ".join(words for _, _, words in said)
    for old, new in [
        ("ClientError", "NoetherWriterError"),
        ("wait(timeout:)", "waitBlocking(timeout:)"),
        ("durable()", "waitUntilDurable(timeout:)"),
        ("next(until:)", "nextBlocking(until:)"),
        ("Report", "DaemonReport"),
        ("Run", "RunReport"),
        ("State", "RunState"),
        ("Checkpoints", "CheckpointCounts"),
    ]:
        assert re.search(rf"'{re.escape(old)}' is deprecated: renamed to '{re.escape(new)}'", words), (old, words)


@needs_a_compiler
def test_a_program_s_top_level_waits() -> None:
    assert compiled("main.swift") == (0, [])


@needs_a_compiler
def test_what_blocks_is_refused_where_tasks_would_wait() -> None:
    _, said = compiled("Blocking.swift", "-parse-as-library")
    lines = (PROGRAMS / "Blocking.swift").read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("// error")}
    # An error in this version of the language; the words say what to await instead.
    assert {line for line, _, _ in said} == marked
    assert all(
        "unavailable from asynchronous contexts; it blocks a thread of the tasks" in words for _, _, words in said
    )


def table() -> list[tuple[str, str]]:
    """The names of both libraries in the guide, row by row."""
    text = (ROOT / "docs/GUIDE.md").read_text()
    rows = text[text.index("| Python | Swift |") :].split("\n\n")[0].splitlines()[2:]
    cells = [re.split(r"(?<!\\)\|", row.strip("|")) for row in rows]
    assert len(cells) > 15 and all(len(pair) == 2 for pair in cells)
    return [(python, swift) for python, swift in cells]


def test_the_names_of_both_libraries_in_the_guide_are_real() -> None:
    pythons = [noether_writer, noether_writer.Run, noether_writer.Ticket, torch]
    # What is public, without what it does.
    sources = "\n".join(path.read_text() for path in (ROOT / "Sources/NoetherWriterClient").glob("*.swift"))
    public = "\n".join(re.findall(r"\bpublic [^{}]*|^ *case .*", re.sub(r"//.*", "", sources), re.M))
    for python, swift in table():
        for code in re.findall(r"`([^`]+)`", python):
            if code != "noether_writer.errors":
                for name in re.findall(r"(?<!\w)(\w+)(?=\(|$)", code.removeprefix("with ")):
                    assert any(hasattr(each, name) for each in pythons) or name in RUN_ATTRIBUTES, name
        for code in re.findall(r"`([^`]+)`", swift):
            for name in set(re.findall(r"[A-Za-z]+", code)) - {
                "run",
                "ticket",
                "in",
                "id",
                "U",
                "key",
                "value",
                "name",
            }:
                assert re.search(rf"\b{name}\b", public), (name, code)


# Which each object has, and not the class.
RUN_ATTRIBUTES = {"run_id", "rank", "directory", "resumed_at", "run", "errors"}


@needs_a_compiler
def test_the_articles_programs_run(daemon: RunningDaemon, tmp_path: Path) -> None:
    articles = sorted((ROOT / "Sources/NoetherWriterClient/NoetherWriterClient.docc").glob("*.md"))
    command = [sys.executable, ROOT / "Tests/Docs/examples.py", *articles]
    program = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    program = program.replace('"/data/', f'"{tmp_path}/data/').replace('"runs"', f'"{tmp_path}/runs"')
    numbers = [int(number) for number in re.findall(r"^func example(\d+)", program, re.M)]
    assert len(numbers) > 8
    # First the one that trains; the others read what it has written.
    training = re.search(r"^func example(\d+)\(\) async throws \{[^}]*for update in 1\.\.\.1000", program, re.M)
    assert training is not None
    order = sorted(numbers, key=lambda number: (number != int(training[1]), number))
    main = "".join(f'print("example {number}")\ntry await example{number}()\n' for number in order)
    (tmp_path / "main.swift").write_text(program + main)
    linked = shlex.split((BUILT / "SwiftTrainer.product/Objects.LinkFileList").read_text())
    objects = [path for path in linked if "/SwiftTrainer.build/" not in path]
    maps = [f"-fmodule-map-file={BUILT}/{name}.build/module.modulemap" for name in ("CLinux", "CCopy")]
    options = ["-I", BUILT / "Modules", "-I", ROOT / "Sources/CDeflate", "-swift-version", "6", "-suppress-warnings"]
    options += [part for each in maps for part in ("-Xcc", each)]
    compiled = subprocess.run(
        ["swiftc", *options, "-static-stdlib", "-ldeflate", "-o", "program", "main.swift", *objects],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert compiled.returncode == 0, compiled.stderr
    (tmp_path / "data").mkdir()
    ran = subprocess.run(["./program"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    for line in ("1000 float(0.5)", "8192", "1000 [128, 64]", "1"):
        assert line in ran.stdout.splitlines(), ran.stdout[-3000:]
    assert "the run is " in ran.stdout
    assert torch.load(tmp_path / "data/net.pt") == {"step": 1}
