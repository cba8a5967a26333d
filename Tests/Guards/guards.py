# SPDX-License-Identifier: Apache-2.0
"""Takes each guard of guards.toml out, and demands that the tests it names fail then: a promise whose guard can go
unnoticed is not tested.

One build for all: a copy of the sources in which each guard stands behind a switch, NOETHER_WRITER_GUARD_OUT=name. The
project's own sources have no such switch.

    make guards                     all of them
    guards.py --only NAME ...       some
    guards.py --check               only that each guard's source and tests are still there: a part of `make lint`
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).parent / "guards.toml"
TREE = ROOT / ".build/guards/tree"
COPIED = ("Sources", "Tests", "Package.swift", "Package.resolved", "Makefile", ".venv")
VARIABLE = "NOETHER_WRITER_GUARD_OUT"
# A test that hangs with the guard out has noticed.
SECONDS = 90
PR_SET_CHILD_SUBREAPER = 36

# A daemon that a trainer starts takes no variable of that trainer but some; the copy's takes the switch too.
KEPT = ("Sources/noether-writerd/NoetherWriterD.swift", b'"LD_LIBRARY_PATH", ')

SWIFT = f"""import Glibc

private let guardThatIsOut: String? = getenv("{VARIABLE}").map {{ String(cString: $0) }}

func guardIsOut(_ name: String) -> Bool {{ guardThatIsOut == name }}
"""
C = f"""extern char *getenv(const char *);
static int guard_is_out(const char *name) {{
    const char *out = getenv("{VARIABLE}");
    return out && __builtin_strcmp(out, name) == 0;
}}
#line 1
"""


@dataclass
class Edit:
    file: str
    old: str
    new: str


@dataclass
class Guard:
    """One entry. `OUT` in an edit's new text is true while the guard is out."""

    name: str
    line: str
    edits: list[Edit]
    tests: list[str]
    # Why nothing fails without it: what else stands there.
    redundant_with: str = ""
    outcome: str = ""
    words: str = ""
    seconds: float = field(default=0.0)


def load() -> tuple[dict[str, str], list[Guard], list[dict[str, Any]]]:
    """
    Returns:
        the lines that are promised, their guards, and the lines that no code guards.
    """
    data = tomllib.loads(LIST.read_text())
    guards = []
    for entry in data["guard"]:
        edits = [
            Edit(edit.get("file", entry["file"]), edit["old"], edit["new"]) for edit in [entry, *entry.get("also", [])]
        ]
        guards.append(Guard(entry["name"], entry["line"], edits, entry["tests"], entry.get("redundant_with", "")))
    return data["lines"], guards, data.get("nothing", [])


# What can rot


def problems() -> Iterator[str]:
    lines, guards, nothing = load()
    names = [guard.name for guard in guards]
    yield from (f"{name}: twice" for name in {name for name in names if names.count(name) > 1})
    for guard in guards:
        if guard.line not in lines:
            yield f"{guard.name}: no line {guard.line}"
        if not any(re.search(r"\bOUT\b", edit.new) for edit in guard.edits):
            yield f"{guard.name}: nothing is taken out"
        for edit in guard.edits:
            count = (ROOT / edit.file).read_text().count(edit.old) if (ROOT / edit.file).exists() else 0
            if count != 1:
                yield f"{guard.name}: {count} times in {edit.file}: {edit.old}"
        yield from (f"{guard.name}: no test {test}" for test in guard.tests if not exists(test))
    for entry in nothing:
        yield from (f"{entry['line']}: no test {test}" for test in entry["tests"] if not exists(test))
    named = {guard.line for guard in guards} | {entry["line"] for entry in nothing}
    yield from (f"no guard of: {text}" for line, text in lines.items() if line not in named)
    try:
        for file in {edit.file for guard in guards for edit in guard.edits}:
            taken_out(file, guards)
    except ValueError as error:
        yield str(error)


def exists(test: str) -> bool:
    """By its definition; that a parameter exists shows when it runs."""
    if is_swift(test):
        suite, _, function = test.partition("/")
        folder, _, name = suite.partition(".")
        text = "".join(path.read_text() for path in (ROOT / "Tests" / folder).glob("*.swift"))
        return f"struct {name} " in text and f"func {function}(" in text
    path, _, name = test.partition("::")
    file = ROOT / "Tests" / path
    return file.exists() and re.search(rf"^def {name.partition('[')[0]}\(", file.read_text(), re.M) is not None


def is_swift(test: str) -> bool:
    return "::" not in test


# The copy


def condition(file: str, name: str) -> str:
    if file.endswith(".swift"):
        return f'guardIsOut("{name}")'
    if file.endswith(".c"):
        return f'guard_is_out("{name}")'
    return f'(__import__("os").environ.get("{VARIABLE}") == "{name}")'


def taken_out(file: str, guards: list[Guard]) -> str:
    """The file's text with the guards behind switches.

    Raises:
        ValueError: two of them overlap.
    """
    text = (ROOT / file).read_text()
    found = []
    for guard in guards:
        for edit in guard.edits:
            if edit.file == file and (at := text.find(edit.old)) >= 0:
                new = re.sub(r"\bOUT\b", lambda _, name=guard.name: condition(file, name), edit.new)
                found.append((at, at + len(edit.old), new, guard.name))
    found.sort()
    for (_, end, _, first), (start, _, _, second) in itertools.pairwise(found):
        if start < end:
            raise ValueError(f"{first} and {second} overlap in {file}")
    for start, end, new, _ in reversed(found):
        text = text[:start] + new + text[end:]
    return C + text if file.endswith(".c") else text


def write_changed(path: Path, data: bytes) -> None:
    """Only where it differs, so that only that is built anew."""
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def make_copy(guards: list[Guard]) -> None:
    files = {edit.file for guard in guards for edit in guard.edits}
    wanted = set()
    for name in COPIED:
        source = ROOT / name
        if name == ".venv":
            TREE.mkdir(parents=True, exist_ok=True)
            if not (TREE / name).is_symlink():
                (TREE / name).symlink_to(source.resolve())
            continue
        for path in [source] if source.is_file() else source.rglob("*"):
            # What was built of the sources as they are is built anew.
            if not path.is_file() or "__pycache__" in path.parts or path.suffix == ".so":
                continue
            relative = path.relative_to(ROOT)
            data = taken_out(str(relative), guards).encode() if str(relative) in files else path.read_bytes()
            if str(relative) == KEPT[0]:
                assert data.count(KEPT[1]) == 1, f"{KEPT[0]} names the variables that are kept otherwise now"
                data = data.replace(KEPT[1], KEPT[1] + f'"{VARIABLE}", '.encode())
            write_changed(TREE / relative, data)
            shutil.copymode(path, TREE / relative)
            wanted.add(TREE / relative)
    for module in {Path(file).parent for file in files if file.endswith(".swift")}:
        write_changed(TREE / module / "GuardIsOut.swift", SWIFT.encode())
        wanted.add(TREE / module / "GuardIsOut.swift")
    for name in ("Sources", "Tests"):
        for path in (TREE / name).rglob("*"):
            if path.is_file() and path not in wanted and "__pycache__" not in path.parts:
                path.unlink()


def build(with_swift_tests: bool) -> None:
    subprocess.run(["make", "-s", "build", ".build/release/libnoether-writer-failing.so"], cwd=TREE, check=True)
    if with_swift_tests:
        subprocess.run(["swift", "build", "--build-tests"], cwd=TREE, check=True)


# Running


def environment(name: str = "") -> dict[str, str]:
    found = dict(os.environ)
    found["NOETHER_WRITER_DAEMON"] = str(TREE / ".build/release/noether-writerd")
    found["PYTHONPATH"] = f"{TREE / 'Sources/PythonClient'}:{TREE / 'Tests/Guards'}"
    # Of one line's length in pytest's summary.
    found["COLUMNS"] = "240"
    if name:
        found[VARIABLE] = name
    return found


def command_of(tests: list[str], folder: Path, at_once: bool) -> list[str]:
    if is_swift(tests[0]):
        # By whole names: one may begin as another does.
        pattern = "|".join(re.escape(test) + r"\(" for test in tests)
        return ["swift", "test", "--skip-build", "--filter", pattern]
    names = [f"Tests/{test}" for test in tests]
    options = ["-q", "-rA", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={folder}/pytest"]
    options += ["-p", "first_failure"] if at_once else []
    return [sys.executable, "-m", "pytest", *options, *names]


def run(tests: list[str], guard: str = "", seconds: float = SECONDS) -> tuple[set[str], set[str], str]:
    """
    Returns:
        the tests that failed, those that passed, and the first failure's words.
    """
    folder = ROOT / ".build/guards/runs" / (guard or "none")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "output").open("w+") as output:
        status = subprocess.run(
            [sys.executable, __file__, "--supervise", str(seconds), *command_of(tests, folder, bool(guard))],
            cwd=TREE,
            env=environment(guard),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
        output.seek(0)
        text = output.read()
    if status == 124:
        return set(tests), set(), f"hangs for {seconds:.0f} s"
    return swift_outcomes(tests, status, text) if is_swift(tests[0]) else python_outcomes(tests, text)


def supervise(seconds: float, command: list[str]) -> int:
    """Runs a command that may hang or leave processes behind, and ends all of them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = 124
    # What has lost its parent is this process's child then, and so on down.
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for pid in children:
            os.kill(int(pid), signal.SIGKILL)
        for pid in children:
            os.waitpid(int(pid), 0)
    return status


def swift_outcomes(tests: list[str], status: int, text: str) -> tuple[set[str], set[str], str]:
    if status == 0:
        return set(), set() if "Test run with 0 tests" in text else set(tests), ""
    words = re.search(r"recorded an issue.*?: (.*)|(Fatal error.*)", text)
    return {test for test in tests if test.partition("/")[2] in text}, set(), words.group(1) or "" if words else ""


def python_outcomes(tests: list[str], text: str) -> tuple[set[str], set[str], str]:
    # A fixture's end may fail as a consequence: what the test itself says comes first.
    bad = sorted(
        re.findall(r"^(FAILED|ERROR) Tests/(.+?)(?: - (.*))?$", text, re.M), key=lambda found: found[0] != "FAILED"
    )
    good = re.findall(r"^PASSED Tests/(.+)$", text, re.M)

    def among(test: str, found: list[str]) -> bool:
        return any(one == test or one.startswith(test + "[") for one in found)

    failed = {test for test in tests if among(test, [name for _, name, _ in bad])}
    passed = {test for test in tests if test not in failed and among(test, good)}
    return failed, passed, bad[0][2] if bad else ""


def groups(tests: list[str]) -> list[list[str]]:
    """What one command runs."""
    return [part for part in ([t for t in tests if not is_swift(t)], [t for t in tests if is_swift(t)]) if part]


def judge(guard: Guard) -> Guard:
    start = time.monotonic()
    failed: set[str] = set()
    passed: set[str] = set()
    for test in guard.tests:
        some, others, words = run([test], guard.name)
        failed, passed = failed | some, passed | others
        guard.words = guard.words or words
    guard.seconds = time.monotonic() - start
    if len(failed) + len(passed) < len(guard.tests):
        guard.outcome = "DID NOT RUN"
    elif guard.redundant_with:
        guard.outcome = "NOT REDUNDANT" if failed else "redundant"
        guard.words = guard.words if failed else guard.redundant_with
    elif passed:
        guard.outcome = "UNNOTICED"
        guard.words = " ".join(sorted(passed))
    else:
        guard.outcome = "noticed"
    return guard


def baseline(guards: list[Guard], nothing: list[dict[str, Any]]) -> list[str]:
    """Tests that do not pass with every guard in its place: their failure would say nothing."""
    tests = list(dict.fromkeys([t for g in guards for t in g.tests] + [t for n in nothing for t in n["tests"]]))
    wrong = []
    for part in groups(tests):
        failed, passed, _ = run(part, seconds=1800)
        wrong += [test for test in part if test in failed or test not in passed]
    return wrong


def main() -> int:
    if sys.argv[1:2] == ["--supervise"]:
        return supervise(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description="Takes each guard out, and demands that its tests fail")
    parser.add_argument("--check", action="store_true", help="only that the list is true to the sources")
    parser.add_argument("--only", nargs="+", help="names of guards")
    parser.add_argument("--jobs", type=int, default=1, help="so many at once")
    options = parser.parse_args()
    _, guards, nothing = load()
    rotten = list(problems())
    for problem in rotten:
        print(problem)
    if rotten or options.check:
        return 1 if rotten else 0
    some = [guard for guard in guards if not options.only or guard.name in options.only]
    make_copy(guards)
    build(any(is_swift(test) for guard in some for test in guard.tests))
    start = time.monotonic()
    wrong = baseline(some, [] if options.only else nothing)
    for test in wrong:
        print(f"does not pass with every guard in its place: {test}", flush=True)
    some = [guard for guard in some if not set(guard.tests) & set(wrong)]
    with ThreadPoolExecutor(options.jobs) as pool:
        for guard in pool.map(judge, some):
            where = f"{guard.name} ({guard.line})"
            print(f"{guard.outcome:14} {where:62} {guard.seconds:5.1f} s  {guard.words[:150]}", flush=True)
    counts = {kind: sum(guard.outcome == kind for guard in some) for kind in dict.fromkeys(g.outcome for g in some)}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    tests = len({test for guard in some for test in guard.tests})
    print(
        f"{len(some)} guards of {len({guard.line for guard in some})} lines, {tests} tests: {told}; "
        f"{time.monotonic() - start:.0f} s"
    )
    return 0 if not wrong and all(guard.outcome in ("noticed", "redundant") for guard in some) else 1


if __name__ == "__main__":
    sys.exit(main())
