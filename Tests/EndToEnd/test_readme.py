# SPDX-License-Identifier: Apache-2.0
"""README.md and docs/*.md hold: their programs run as they stand there, and each command, option, variable, setting,
metric, file and function that they name exists."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import noether_writer
import pytest
import torch
from conftest import DAEMON, RunningDaemon
from test_cli import CLI, cli

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
README_LINES, README_COLUMNS = 150, 120


def blocks(language: str, text: str = TEXT) -> list[str]:
    return [match[2] for match in BLOCK.finditer(text) if match[1] == language]


def section(page: str, title: str) -> str:
    [found] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGES[page], re.S | re.M)
    return str(found)


def test_the_readme_is_short() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > README_COLUMNS] == []


# Programs


def run(program: str, directory: Path) -> str:
    result = subprocess.run([sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def program(page: str, words: str) -> str:
    [found] = [text for text in blocks("python", PAGES[page]) if words in text]
    return found


def test_the_first_program(daemon: RunningDaemon, tmp_path: Path) -> None:
    [first] = blocks("python", PAGES["README.md"])
    file = tmp_path / "runs/first/checkpoints/net_cp=U100_model.th"
    assert run(first, tmp_path) == f"{file}\n"
    assert set(torch.load(file)) == {"model", "optimizer", "scheduler"}
    # What the text does next.
    for command in ("plot runs/", "runs runs ", "verify runs/"):
        [shown] = re.findall(rf"`noether-writer ({command}[^`]+)`", PAGES["README.md"])
        drawn = subprocess.run([CLI, *shown.split()], cwd=tmp_path, capture_output=True, text=True)
        assert drawn.returncode == 0, drawn.stderr


def test_the_first_program_continues_after_a_kill(daemon: RunningDaemon, tmp_path: Path) -> None:
    [first] = blocks("python", PAGES["README.md"])
    dies = """
import os, signal
from noether_writer import Run
log = Run.log
def log_and_die(self, values, update):
    log(self, values, update)
    if update == 50:
        self.wait()
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
Run.log = log_and_die
"""
    killed = subprocess.run([sys.executable, "-c", dies + first], cwd=tmp_path, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert run(first, tmp_path).endswith("net_cp=U100_model.th\n")
    directory = tmp_path / "runs/first"
    assert list(torch.load(directory / "tracker/entries.th")["loss"]) == list(range(1, 101))
    state = torch.load(directory / "checkpoints/net_cp=U100_model.th")
    # It has gone on counting from update 40, at which it was saved.
    assert state["scheduler"]["last_epoch"] == 100 and state["optimizer"]["state"][0]["step"] == 100


def test_the_first_program_may_be_run_again_when_it_is_done(daemon: RunningDaemon, tmp_path: Path) -> None:
    [first] = blocks("python", PAGES["README.md"])
    assert run(first, tmp_path) == run(first, tmp_path)


def test_plain_pytorch(daemon: RunningDaemon, tmp_path: Path) -> None:
    assert run(program("GUIDE.md", "2026-01-01_abcde"), tmp_path) == ""
    directory = tmp_path / "runs/2026-01-01_abcde"
    assert len(list((directory / "checkpoints").iterdir())) == 10
    loss = torch.load(directory / "tracker/entries.th")["loss"]
    assert list(loss) == list(range(1, 1001)) and loss[1000] < loss[1] / 10
    [shown] = re.findall(r"`noether-writer (plot runs/[^`]+)`", PAGES["GUIDE.md"])
    drawn = subprocess.run([CLI, *shown.split()], cwd=tmp_path, capture_output=True, text=True)
    assert drawn.returncode == 0 and "┤" in drawn.stdout


def test_noethers_classes(daemon: RunningDaemon, tmp_path: Path) -> None:
    assert run(program("GUIDE.md", "CheckpointWriter("), tmp_path) == ""
    directory = tmp_path / "runs/2026-01-01_vwxyz/train"
    files = {path.name for path in (directory / "checkpoints").iterdir()}
    assert {"net_cp=latest_model.th", "net_cp=latest_optim.th", "net_cp=E5_U500_S16000_model.th"} <= files
    assert set(torch.load(directory / "checkpoints/net_cp=latest_model.th")["state_dict"]) == {"weight", "bias"}
    loss = torch.load(directory / "tracker/entries.th")["loss/train"]
    assert list(loss) == list(range(1, 501)) and loss[500] < loss[1] / 2


@pytest.mark.parametrize(
    "words", ['resume="auto"', "noether_writer.subscribe(", "noether_writer.load(", "fully_shard("]
)
def test_programs_that_check_themselves(words: str, daemon: RunningDaemon, tmp_path: Path) -> None:
    assert run(program("GUIDE.md", words), tmp_path) == ""


def test_every_program_in_the_docs_is_run() -> None:
    assert len(blocks("python", PAGES["README.md"])) == 1
    assert len(blocks("python", PAGES["GUIDE.md"])) == 6
    # Those for the frameworks are run beside the frameworks (Tests/Frameworks).
    assert len(blocks("python", PAGES["FRAMEWORKS.md"])) == 4
    # Those for the trackers, beside the trackers (Tests/Trackers).
    assert len(blocks("python", PAGES["TRACKERS.md"])) == 3
    assert len(blocks("python")) == 14 and len(blocks("swift")) == 1


def test_swift(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Compiled against the built library, and linked with what SwiftPM made of it."""
    built = Path(DAEMON).parent.resolve()
    # The objects of a program that depends on this product alone; its own are left out.
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
    """The words after the program's name, of each place where a page has it in code."""
    code = [*blocks(""), *re.findall(r"`([^`\n]+)`", BLOCK.sub("", TEXT))]
    lines = [line.split("#")[0] for text in code for line in text.splitlines()]
    return [match[1].split() for line in lines if (match := re.search(rf"(?:^|[ (;&]){program} (.*)", line))]


def test_commands_and_options_of_the_command_line() -> None:
    commands = set(re.findall(r"^  (\w+)  +", cli("--help").stdout.split("SUBCOMMANDS:")[1], re.M))
    lines = shell_lines("noether-writer")
    rows = [row for row in section("OPERATIONS.md", "The command line").splitlines() if row.startswith("| `")]
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
    assert len(lines) > 20
    for words in lines:
        for word in words:
            name = word.partition("=")[0]
            if name == word and word not in ("&&", "sudo", "make"):
                assert re.search(rf"^{re.escape(name.replace('.venv', '$(VENV)'))}:", makefile, re.M), (
                    f"make has no {word}"
                )
            elif name != word:
                assert re.search(rf"\b{name} \??:?= |\$\({name}\)", makefile), f"make knows no {name}"
    modules = re.findall(r"(?:^|`)python -m (\w+) (\w+)", TEXT, re.M)
    assert len(modules) > 1
    for module, command in modules:
        assert f"-m {module} {command} " in help_of(sys.executable, "-m", module)


# Names


@functools.cache
def sources() -> str:
    return "".join(
        path.read_text()
        for folder in ("Sources", "config")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".swift", ".yaml")
    )


def test_variables_of_the_trainer() -> None:
    names = set(re.findall(r"\bNOETHER_WRITER_(?!SETTING_)[A-Z_]+", TEXT))
    assert len(names) > 10
    # The variables that stand for arguments of open_run have their names.
    arguments = {f"NOETHER_WRITER_{name.upper()}" for name in inspect.signature(noether_writer.open_run).parameters}
    for name in names:
        assert name in arguments or f'"{name}"' in sources(), name
    # Each that the Python client reads has a row.
    client = ROOT / "Sources/PythonClient/noether_writer"
    read = {
        name
        for path in client.glob("*.py")
        for name in re.findall(r'\((?:")(NOETHER_WRITER_[A-Z_]+)"', path.read_text())
    }
    assert len(read) > 8
    assert read <= set(re.findall(r"^\| `(NOETHER_WRITER_[A-Z_]+)`", section("GUIDE.md", "Variables"), re.M))


def test_settings_of_the_daemon() -> None:
    text = (ROOT / "config/noether-writer.yaml").read_text()
    settings = dict(re.findall(r"^(?:# )?([a-z_]+): (\S+)$", text, re.M))
    assert len(settings) > 10
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \|", section("OPERATIONS.md", "Settings"), re.M))
    assert rows.keys() == settings.keys()
    for name, shown in rows.items():
        # A line that is a comment shows an example.
        if re.search(rf"^{name}:", text, re.M):
            assert shown == settings[name], name
    for name in set(re.findall(r"\bNOETHER_WRITER_(?:SETTING_[A-Z_]+|CONFIG)", TEXT)):
        assert f": {name}" in text or f", {name}" in text or f'"{name}"' in sources(), name
    for name in re.findall(r"`((?:[a-z]+_)+(?:per_run|seconds|file|last|every|bytes))`", TEXT):
        if name not in settings and not name.startswith("noether_writer_"):
            # A name of the protocol.
            assert name in PAGES["PROTOCOL.md"] or f"def {name}" in sources(), name


def test_metrics(daemon: RunningDaemon) -> None:
    text = cli("metrics").stdout
    names = set(re.findall(r"`(noether_writer_\w+)`", TEXT))
    assert len(names) > 5
    for name in names:
        assert re.search(rf"^# TYPE {name} ", text, re.M), name


def test_paths() -> None:
    paths = set(re.findall(r"(?<![\w/.])((?:Sources|Tests|config|systemd|docs)/[\w./-]*\w)", TEXT))
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path


def test_links() -> None:
    """To files that exist, and to headings that they have."""
    found = 0
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
            if target.startswith("https://"):
                continue
            found += 1
            file, _, anchor = target.partition("#")
            path = (folder / file if file else folder / page).resolve()
            assert path.exists(), f"{page}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text()), re.M)
                anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page}: {target}"
    assert found > 20


def test_files_and_functions_of_the_architecture() -> None:
    text = PAGES["ARCHITECTURE.md"]
    files = set(re.findall(r"`([\w./-]+\.(?:swift|py|c|h))`", text))
    assert len(files) > 30
    code = {name: (ROOT / "Sources" / name).read_text() for name in files}
    # A row of a table, a paragraph or an item of a list names functions and the files that hold them.
    for line in re.split(r"\n\n|\n(?=\||- )", text):
        here = re.findall(r"`([\w./-]+\.(?:swift|py|c|h))`", line)
        beside = "".join(code[name] for name in here)
        if not here:
            continue
        for owner, function in re.findall(r"`([A-Z]\w+)\.(\w+)`", line):
            assert re.search(rf"\b(class|struct|enum|actor|extension) {owner}\b", beside), f"{owner}.{function}"
            assert re.search(rf"\b(func|def) {function}\b", beside), f"{owner}.{function}"
        for function in re.findall(r"`(nw_\w+)`", line):
            assert re.search(rf"^\S.*\b{function}\(", beside, re.M), function
