# SPDX-License-Identifier: Apache-2.0
"""README.md holds: its programs run as they stand there, and each command, option and variable that it names exists."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from conftest import DAEMON, RunningDaemon
from test_cli import CLI, cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def blocks(language: str) -> list[str]:
    return [match[2] for match in BLOCK.finditer(README) if match[1] == language]


def run(program: str, directory: Path) -> None:
    result = subprocess.run([sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_there_is_a_quick_start_for_each() -> None:
    plain, noether = blocks("python")
    assert "open_run(" in plain and "CheckpointWriter(" in noether
    assert len(blocks("swift")) == 1


def test_plain_pytorch(daemon: RunningDaemon, tmp_path: Path) -> None:
    run(blocks("python")[0], tmp_path)
    directory = tmp_path / "runs/2026-01-01_abcde"
    assert len(list((directory / "checkpoints").iterdir())) == 10
    loss = torch.load(directory / "tracker/entries.th")["loss"]
    assert list(loss) == list(range(1, 1001)) and loss[1000] < loss[1] / 10
    # What the text does next.
    [shown] = re.findall(r"`noether-writer (plot runs/[^`]+)`", README)
    drawn = subprocess.run([CLI, *shown.split()], cwd=tmp_path, capture_output=True, text=True)
    assert drawn.returncode == 0 and "┤" in drawn.stdout


def test_noethers_classes(daemon: RunningDaemon, tmp_path: Path) -> None:
    run(blocks("python")[1], tmp_path)
    directory = tmp_path / "runs/2026-01-01_vwxyz/train"
    files = {path.name for path in (directory / "checkpoints").iterdir()}
    assert {"net_cp=latest_model.th", "net_cp=latest_optim.th", "net_cp=E5_U500_S16000_model.th"} <= files
    assert set(torch.load(directory / "checkpoints/net_cp=latest_model.th")["state_dict"]) == {"weight", "bias"}
    loss = torch.load(directory / "tracker/entries.th")["loss/train"]
    assert list(loss) == list(range(1, 501)) and loss[500] < loss[1] / 2


def test_swift(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Compiled against the built library, and linked with what SwiftPM made of it."""
    built = Path(DAEMON).parent.resolve()
    # Of a program that depends on this product alone; its own left out.
    linked = shlex.split((built / "SwiftTrainer.product/Objects.LinkFileList").read_text())
    objects = [path for path in linked if "/SwiftTrainer.build/" not in path]
    assert 0 < len(objects) < len(linked)
    (tmp_path / "main.swift").write_text(blocks("swift")[0])
    imports = ["-I", str(built / "Modules")]
    for target in ("CCopy", "CLinux"):
        imports += ["-Xcc", f"-fmodule-map-file={built}/{target}.build/module.modulemap"]
    imports += ["-I", str(ROOT / "Sources/CDeflate")]
    # As `make build` has it.
    options = ["-swift-version", "6", "-warnings-as-errors", "-static-stdlib", "-ldeflate", "-o", "trainer"]
    compiled = subprocess.run(
        ["swiftc", *options, *imports, "main.swift", *objects],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert compiled.returncode == 0, compiled.stderr
    trained = subprocess.run(["./trainer", tmp_path / "runs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert trained.returncode == 0, trained.stderr
    directory = tmp_path / "runs/2026-01-01_swift"
    [file] = (directory / "checkpoints").iterdir()
    assert torch.load(file)["state_dict"]["weight"].shape == (128, 64)
    assert len(torch.load(directory / "tracker/entries.th")["loss"]) == 1000


# Commands


@functools.cache
def help_of(*words: str) -> str:
    result = subprocess.run([*words, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, f"{words}: {result.stderr}"
    return result.stdout


def shell_lines(program: str) -> list[list[str]]:
    """Words behind the program's name, of each place where the README has it in code."""
    code = [*blocks(""), *re.findall(r"`([^`\n]+)`", BLOCK.sub("", README))]
    lines = [line.split("#")[0] for text in code for line in text.splitlines()]
    return [match[1].split() for line in lines if (match := re.search(rf"(?:^|[ (;&]){program} (.*)", line))]


def test_commands_and_options_of_the_command_line() -> None:
    commands = set(re.findall(r"^  (\w+)  +", cli("--help").stdout.split("SUBCOMMANDS:")[1], re.M))
    lines = shell_lines("noether-writer")
    [section] = re.findall(r"^## The command line\n(.*?)^## ", README, re.S | re.M)
    rows = [row for row in section.splitlines() if row.startswith("| `")]
    named: set[str] = set()
    for row in rows:
        first = row[2:].partition(" | ")[0]
        here = re.findall(r"`(\w+)", first)
        named.update(here)
        lines += [[*here[:1], *code.split()] for code in re.findall(r"`(-[^`]+)`", row)]
        lines += [code.strip("`[]").replace("[", "").replace("]", "").split() for code in re.findall(r"`[^`]+`", first)]
    assert named == commands
    assert len(lines) > 10
    for words in lines:
        assert words[0] in commands, words
        text = help_of(CLI, words[0])
        for option in (word for word in words[1:] if word.startswith("-")):
            assert re.search(rf"(^|[ ,/]){re.escape(option)}\b", text, re.M), f"{words[0]} has no {option}"


def test_options_of_the_daemon_and_targets_of_make() -> None:
    text = help_of(DAEMON)
    for words in shell_lines("noether-writerd"):
        for option in (word for word in words if word.startswith("-")):
            assert option in text, option
    makefile = (ROOT / "Makefile").read_text()
    lines = shell_lines("make")
    assert len(lines) > 8
    for words in lines:
        for word in words:
            name = word.partition("=")[0]
            if name == word and word not in ("&&", "sudo", "make"):
                assert re.search(rf"^{name}:", makefile, re.M), f"make has no {word}"
            elif name != word:
                assert re.search(rf"\b{name} \??:?= |\$\({name}\)", makefile), f"make knows no {name}"
    modules = re.findall(r"`python -m (\w+) (\w+)", README)
    assert modules
    for module, command in modules:
        assert f"-m {module} {command} " in help_of(sys.executable, "-m", module)


def test_variables_and_settings() -> None:
    sources = "".join(
        path.read_text()
        for folder in ("Sources", "config")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".swift", ".yaml")
    )
    names = set(re.findall(r"\bNOETHER_WRITER_[A-Z_]+", README))
    assert len(names) > 5
    for name in names:
        assert f'"{name}"' in sources, name
    settings = (ROOT / "config/noether-writer.yaml").read_text()
    for name in re.findall(r"`((?:[a-z]+_)+(?:per_run|seconds|file|last|every|bytes))`", README):
        if f"{name}:" not in settings:
            # Of the protocol.
            assert name in (ROOT / "Sources/Wire/PROTOCOL.md").read_text() or f"def {name}" in sources, name


def test_paths() -> None:
    for path in re.findall(r"\b((?:Sources|Tests|config|systemd)/[\w./-]*\w)", README):
        assert (ROOT / path).exists(), path
