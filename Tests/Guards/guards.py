# SPDX-License-Identifier: Apache-2.0
"""Takes each guard out, and demands that a test fails then: a promise whose guard can go unnoticed is not tested.

A guard is a line that a promise depends on. A comment at its end marks it, or one alone on the line above if the line
would be too long (`#` in Python):

    guard count <= Limits.targets else {  // guard: number-of-targets (always)

The words in brackets say what happens while the guard is out:

    (always)                the condition counts as true, but is evaluated
    (never)                 the condition counts as false, but is evaluated
    (skip)                  the statement does not run
    (= VALUE)               VALUE is assigned or returned; the expression is not evaluated

Each may name a part of the line, which stands there once:

    (always: PART)  (never: PART)  (skip: PART)  (= VALUE for PART)

PART in VALUE is what the part itself says. The condition is that of `if`, `guard`, `while` or `where`, else what is
assigned or returned, else the whole line. guards.toml says which promise a guard keeps, and holds the few changes that
no marker can say, as patches.

One build for all: a copy of the sources in which each guard stands behind a switch, NOETHER_WRITER_GUARD_OUT=name. The
project's own sources have no such switch. If the variable is a path instead, every guard stays in its place, and a
process that comes to a point where it matters leaves a file of the guard's name there. covered_by.json keeps what came
of that: the tests that would run differently without a guard, the cheapest ones first.

    make guards                     all of them
    make guards-coverage            runs the end-to-end tests once, and writes covered_by.json
    guards.py --only NAME ...       some; --record adds the tests that noticed to covered_by.json
    guards.py --check               that each marker, patch and test is right, and that the changed sources parse
    guards.py --check-markers       that each marker is right: a part of `make lint`
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import markers

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).parent / "guards.toml"
COVERED_BY = Path(__file__).parent / "covered_by.json"
TREE = ROOT / ".build/guards/tree"
FOLDERS = ("Sources", "Tests", "docs", "config", "systemd")
COPIED = (*FOLDERS, "Package.swift", "Package.resolved", "Makefile", "README.md", ".venv")
VARIABLE = "NOETHER_WRITER_GUARD_OUT"
# A test that hangs with the guard out has noticed.
SECONDS = 90
# So many of the tests that come to a guard are kept, and tried until one notices.
COVERING = 8
PR_SET_CHILD_SUBREAPER = 36

# A daemon that a trainer starts takes no variable of that trainer but some; the copy's takes the switch too.
KEPT = ("Sources/noether-writerd/NoetherWriterD.swift", b'"LD_LIBRARY_PATH", ')

SWIFT = f"""import Glibc

private let guardThatIsOut: String? = getenv("{VARIABLE}").map {{ String(cString: $0) }}
private let notesReached = guardThatIsOut?.hasPrefix("/") == true

func guardIsOut(_ name: String) -> Bool {{
    if notesReached, let guardThatIsOut {{
        let before = errno
        defer {{ errno = before }}
        let file = open(guardThatIsOut + "/" + name, O_CREAT | O_WRONLY | O_CLOEXEC, 0o666)
        if file >= 0 {{ close(file) }}
    }}
    return guardThatIsOut == name
}}
"""
# The functions of libc by their own declarations: what the file includes follows.
C = f"""extern char *getenv(const char *);
extern int open(const char *, int, ...);
extern int close(int);
extern int *__errno_location(void);
static int guard_is_out(const char *name) {{
    const char *out = getenv("{VARIABLE}");
    if (!out) return 0;
    if (*out == '/') {{
        char path[512], *end = path;
        for (const char *from = out; *from && end < path + 256; ++from) *end++ = *from;
        *end++ = '/';
        for (const char *from = name; *from && end < path + 511; ++from) *end++ = *from;
        *end = 0;
        int before = *__errno_location(), file = open(path, 02000101, 0666);
        if (file >= 0) close(file);
        *__errno_location() = before;
    }}
    return __builtin_strcmp(out, name) == 0;
}}
#line 1
"""
PYTHON = f"""import os


def is_out(name):
    out = os.environ.get("{VARIABLE}", "")
    if out.startswith("/"):
        try:
            os.close(os.open(f"{{out}}/{{name}}", os.O_CREAT | os.O_WRONLY, 0o666))
        except OSError:
            pass
    return out == name
"""
PYTHON_MODULE = "_guard_is_out"


@dataclass
class Patch:
    """`OUT` in the new text is true while the guard is out."""

    file: str
    old: str
    new: str


@dataclass
class Guard:
    name: str
    # Which promise it keeps.
    line: str
    patches: list[Patch]
    # Those that are known to notice, then those that come to it, the cheapest first.
    tests: list[str]
    # Why nothing fails without it: what else stands there.
    redundant_with: str = ""
    noticed_by: str = ""
    outcome: str = ""
    words: str = ""
    seconds: float = field(default=0.0)


def load() -> tuple[dict[str, str], list[Guard], list[dict[str, Any]]]:
    """
    Returns:
        the lines that are promised, their guards, and the lines that no code guards.
    """
    data = tomllib.loads(LIST.read_text())
    covered = json.loads(COVERED_BY.read_text())
    patches: dict[str, list[Patch]] = {}
    for entry in data["patch"]:
        patches.setdefault(entry["name"], []).append(Patch(entry["file"], entry["old"], entry["new"]))
    guards = []
    for line, promise in data["promises"].items():
        for name in promise["guards"]:
            known, reached = covered["known"].get(name, []), covered["reached"].get(name, [])
            redundant_with = data["redundant"].get(name, "")
            # Of a redundant one all tests have to pass: those that were chosen for it.
            tests = known if known and redundant_with else list(dict.fromkeys([*known, *reached]))
            guards.append(Guard(name, line, patches.get(name, []), tests, redundant_with))
    return {line: promise["text"] for line, promise in data["promises"].items()}, guards, data.get("nothing", [])


def marked_files() -> list[str]:
    """The sources that have a marker."""
    paths = (path for path in (ROOT / "Sources").rglob("*") if path.suffix in markers.COMMENT)
    return sorted(str(path.relative_to(ROOT)) for path in paths if "guard:" in path.read_text())


# What can rot


def problems_of_markers() -> Iterator[str]:
    """Cheap, since each change runs it."""
    _, guards, _ = load()
    known = {guard.name for guard in guards}
    patched = {guard.name for guard in guards if guard.patches}
    seen: dict[str, str] = {}
    for file in marked_files():
        try:
            found = markers.read((ROOT / file).read_text(), Path(file).suffix)
        except ValueError as error:
            yield f"{file}: {error}"
            continue
        for marker in found:
            where = f"{file}:{marker.line + 1}"
            if marker.name in seen:
                yield f"{where}: the guard {marker.name} is also at {seen[marker.name]}: a name is used once"
            if marker.name not in known:
                yield f"{where}: no promise of guards.toml has the guard {marker.name}"
            if marker.name in patched:
                yield f"{where}: the guard {marker.name} is also a patch of guards.toml"
            seen[marker.name] = where
        try:
            taken_out(file, guards)
        except ValueError as error:
            yield f"{file}: {error}"
    for name in sorted(known - patched - seen.keys()):
        yield f"guards.toml: the guard {name} is marked nowhere"


def problems() -> Iterator[str]:
    """All that --check demands."""
    lines, guards, nothing = load()
    yield from problems_of_markers()
    names = [guard.name for guard in guards]
    yield from (f"{name}: of two promises" for name in sorted({name for name in names if names.count(name) > 1}))
    data = tomllib.loads(LIST.read_text())
    for name in sorted(({*data["redundant"]} | {entry["name"] for entry in data["patch"]}) - {*names}):
        yield f"{name}: no promise has it"
    for guard in guards:
        if guard.patches and not any(re.search(r"\bOUT\b", patch.new) for patch in guard.patches):
            yield f"{guard.name}: nothing is taken out"
        for patch in guard.patches:
            count = (ROOT / patch.file).read_text().count(patch.old) if (ROOT / patch.file).exists() else 0
            if count != 1:
                yield f"{guard.name}: {count} times in {patch.file}: {patch.old}"
        if not guard.tests:
            yield f"{guard.name}: no test comes to it: make guards-coverage"
        yield from (f"{guard.name}: no test {test}" for test in guard.tests if not exists(test))
    for entry in nothing:
        if entry["line"] not in lines:
            yield f"no promise {entry['line']}"
        yield from (f"{entry['line']}: no test {test}" for test in entry["tests"] if not exists(test))
    named = {guard.line for guard in guards} | {entry["line"] for entry in nothing}
    yield from (f"no guard of: {text}" for line, text in lines.items() if line not in named)
    for file in changed_files(guards):
        yield from (f"{file}: {words}" for words in syntax_errors(file, guards))


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


def syntax_errors(file: str, guards: list[Guard]) -> Iterator[str]:
    """Of the file with its guards behind switches. What the names in it are does not matter."""
    try:
        text = taken_out(file, guards)
        if file.endswith(".py"):
            ast.parse(text)
    except (ValueError, SyntaxError) as error:
        yield str(error)
        return
    if file.endswith(".swift"):
        command = ["swiftc", "-frontend", "-parse", "-"]
    elif file.endswith(".c"):
        # Headers are another matter: an unknown type is an error of meaning, and a missing bracket is one of grammar.
        folders = [str((ROOT / file).parent), *(str(path) for path in (ROOT / "Sources").glob("*/include"))]
        headers = sysconfig.get_path("include")
        command = ["clang", "-fsyntax-only", "-w", "-xc", "-", *(f"-I{folder}" for folder in [*folders, headers])]
    else:
        return
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        yield next((line for line in result.stderr.splitlines() if "error:" in line), result.stderr)


# The copy


def condition(file: str, name: str) -> str:
    if file.endswith(".swift"):
        return f'guardIsOut("{name}")'
    if file.endswith(".c"):
        return f'guard_is_out("{name}")'
    return f'__import__("noether_writer.{PYTHON_MODULE}", fromlist=["is_out"]).is_out("{name}")'


def changed_files(guards: list[Guard]) -> list[str]:
    return sorted({*marked_files(), *(patch.file for guard in guards for patch in guard.patches)})


def taken_out(file: str, guards: list[Guard]) -> str:
    """The file's text with the guards behind switches.

    Raises:
        ValueError: two of them overlap, or a marker can't be applied.
    """
    text = (ROOT / file).read_text()
    found = markers.changes(text, Path(file).suffix, lambda name: condition(file, name))
    for guard in guards:
        for patch in guard.patches:
            if patch.file == file and (at := text.find(patch.old)) >= 0:
                new = re.sub(r"\bOUT\b", lambda _, name=guard.name: condition(file, name), patch.new)
                found.append(markers.Change(at, at + len(patch.old), new, guard.name))
    found.sort(key=lambda change: (change.start, change.end))
    for one, other in itertools.pairwise(found):
        if other.start < one.end:
            raise ValueError(f"{one.name} and {other.name} overlap")
    for change in reversed(found):
        text = text[: change.start] + change.new + text[change.end :]
    return C + text if file.endswith(".c") else text


def write_changed(path: Path, data: bytes) -> None:
    """Only where it differs, so that only that is built anew."""
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def make_copy(guards: list[Guard]) -> None:
    files = changed_files(guards)
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
    module_of_python = TREE / "Sources/PythonClient/noether_writer" / f"{PYTHON_MODULE}.py"
    write_changed(module_of_python, PYTHON.encode())
    wanted.add(module_of_python)
    for name in FOLDERS:
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


# Tests that pass with every guard in its place, or not.
_passes_untouched: dict[str, bool] = {}
_passes_lock = Lock()


def passes_untouched(tests: list[str]) -> bool:
    """Whether all of them pass with every guard in its place: otherwise their failure says nothing."""
    with _passes_lock:
        for part in groups([test for test in tests if test not in _passes_untouched]):
            _, passed, _ = run(part, seconds=1800)
            _passes_untouched.update({test: test in passed for test in part})
        return all(_passes_untouched[test] for test in tests)


def judge(guard: Guard) -> Guard:
    """Runs its tests until one fails, or all of them if they have to pass."""
    start = time.monotonic()
    passed: list[str] = []
    for test in guard.tests:
        some, others, words = run([test], guard.name)
        passed += others
        if some and passes_untouched([test]):
            guard.noticed_by, guard.words = test, f"{words} [{test}]"
            break
    guard.seconds = time.monotonic() - start
    if not passed and not guard.noticed_by:
        guard.outcome = "DID NOT RUN"
    elif guard.redundant_with:
        guard.outcome = "NOT REDUNDANT" if guard.noticed_by else "redundant"
        guard.words = guard.words if guard.noticed_by else guard.redundant_with
    elif guard.noticed_by:
        guard.outcome = "noticed"
    else:
        guard.outcome = "UNNOTICED"
        guard.words = f"{len(passed)} tests pass: {' '.join(passed)}"
    return guard


# Which tests come to which guard


def cover(tests: list[str]) -> int:
    """Runs tests with every guard in its place, each with a folder for what it comes to (reached.py), and writes down
    the cheapest ones of each guard. Guards that these tests do not come to keep what was known of them."""
    folder = ROOT / ".build/guards/reached"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    started = time.monotonic()
    names = [f"Tests/{test}" for test in tests]
    status = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rfE",
            "--rootdir=.",
            "-p",
            "no:cacheprovider",
            "-p",
            "reached",
            *names,
        ],
        cwd=TREE,
        env=environment(str(folder / "now")),
        stdin=subprocess.DEVNULL,
    ).returncode
    found = [json.loads(line) for line in (folder / "tests.jsonl").read_text().splitlines()]
    write_covered(found)
    names_reached = {name for test in found for name in test["reached"]}
    print(f"{len(found)} tests come to {len(names_reached)} guards; {time.monotonic() - started:.0f} s")
    return status


def write_covered(found: list[dict[str, Any]]) -> None:
    data = json.loads(COVERED_BY.read_text())
    guards = {guard.name: guard for guard in load()[1]}
    by_guard: dict[str, dict[str, float]] = {}
    again = {test["test"] for test in found}
    for test in found:
        if test["outcome"] == "passed":
            for name in test["reached"]:
                by_guard.setdefault(name, {})[test["test"]] = test["seconds"]
    reached = {}
    for name in sorted(guards):
        costs = {test: data["seconds"].get(test, 0.0) for test in data["reached"].get(name, []) if test not in again}
        costs |= by_guard.get(name, {})
        reached[name] = sorted(sorted(costs), key=lambda test: round(costs[test], 1))[:COVERING]
    seconds = data["seconds"] | {test["test"]: round(test["seconds"], 1) for test in found}
    used = {test for tests in reached.values() for test in tests}
    new = {
        "known": {name: tests for name, tests in sorted(data["known"].items()) if name in guards},
        "reached": {name: tests for name, tests in reached.items() if tests},
        "seconds": {test: seconds[test] for test in sorted(used)},
    }
    write(new)


def record(guards: list[Guard]) -> None:
    """Puts the test that noticed first among those that are known to notice."""
    data = json.loads(COVERED_BY.read_text())
    for guard in guards:
        known = data["known"].get(guard.name, [])
        if guard.noticed_by and not guard.redundant_with and guard.noticed_by not in known:
            data["known"][guard.name] = [guard.noticed_by, *(test for test in known if exists(test))]
    data["known"] = dict(sorted(data["known"].items()))
    write(data)


def write(data: dict[str, Any]) -> None:
    COVERED_BY.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def chosen(names: list[str] | None, guards: list[Guard]) -> list[Guard]:
    if unknown := {*(names or [])} - {guard.name for guard in guards}:
        sys.exit(f"no guards: {', '.join(sorted(unknown))}")
    return [guard for guard in guards if not names or guard.name in names]


def report(found: Iterable[Guard]) -> list[Guard]:
    done = []
    for guard in found:
        where = f"{guard.name} ({guard.line})"
        print(f"{guard.outcome:14} {where:62} {guard.seconds:5.1f} s  {guard.words[:200]}", flush=True)
        done.append(guard)
    return done


def main() -> int:
    if sys.argv[1:2] == ["--supervise"]:
        return supervise(float(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description="Takes each guard out, and demands that a test fails")
    parser.add_argument("--check", action="store_true", help="only that markers, patches and tests are right")
    parser.add_argument("--check-markers", action="store_true", help="only that markers are right")
    parser.add_argument("--cover", nargs="*", metavar="TEST", help="only find out which tests come to which guard")
    parser.add_argument(
        "--record", action="store_true", help="put what noticed into covered_by.json as known to notice"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of guards")
    parser.add_argument("--jobs", type=int, default=1, help="so many at once")
    options = parser.parse_args()
    rotten = list(problems_of_markers() if options.check_markers or options.cover is not None else problems())
    for problem in rotten:
        print(problem)
    if rotten or options.check or options.check_markers:
        return 1 if rotten else 0
    _, guards, nothing = load()
    some = chosen(options.only, guards)
    make_copy(guards)
    build(options.cover is None and any(is_swift(test) for guard in some for test in guard.tests))
    if options.cover is not None:
        return cover([test.removeprefix("Tests/") for test in options.cover] or ["EndToEnd"])
    start = time.monotonic()
    # All at once, since pytest's own start takes longer than most tests.
    passes_untouched([guard.tests[0] for guard in some if guard.tests])
    nothing_fails = options.only or passes_untouched([test for entry in nothing for test in entry["tests"]])
    for test in [test for test, passes in _passes_untouched.items() if not passes]:
        print(f"does not pass with every guard in its place: {test}", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        some = report(pool.map(judge, some))
    if options.record:
        record(some)
    counts = {kind: sum(guard.outcome == kind for guard in some) for kind in dict.fromkeys(g.outcome for g in some)}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(
        f"{len(some)} guards of {len({guard.line for guard in some})} promises: {told}; "
        f"{time.monotonic() - start:.0f} s"
    )
    return 0 if nothing_fails and all(guard.outcome in ("noticed", "redundant") for guard in some) else 1


if __name__ == "__main__":
    sys.exit(main())
