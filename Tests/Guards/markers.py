# SPDX-License-Identifier: Apache-2.0
"""Reads the markers of guards in Swift, C and Python, and says how the source reads with each guard behind a switch.

The grammar is described in guards.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMMENT = {".swift": "//", ".c": "//", ".py": "#"}
NAME = r"[a-z0-9]+(?:-[a-z0-9]+)*"
CLOSING = {"(": ")", "[": "]", "{": "}"}


class MarkerError(ValueError):
    """A marker that says nothing that can be done to its line."""


@dataclass(frozen=True)
class Change:
    """What stands in the place of text[start:end]."""

    start: int
    end: int
    new: str
    name: str


@dataclass(frozen=True)
class Marker:
    name: str
    # always, never, skip, or = for another value.
    kind: str
    value: str
    # Which part of the line; all of it if empty.
    part: str
    # From 0 on.
    line: int


def pattern(suffix: str) -> re.Pattern[str]:
    mark = re.escape(COMMENT[suffix])
    either = rf"(?:{mark}|/\*)" if suffix == ".c" else mark
    return re.compile(rf"(?:^|\s+){either}\s*guard:(.*)$")


def parse(text: str, line: int) -> Marker:
    """
    Args:
        text: what follows `guard:` in the comment.
    """
    found = re.fullmatch(rf"\s*({NAME}) \((.*)\)\s*(?:\*/)?\s*", text)
    if not found:
        raise MarkerError(f"line {line + 1}: a marker reads `guard: NAME (MUTATION)`, not `guard:{text}`")
    name, mutation = found.groups()
    if simple := re.fullmatch(r"(always|never|skip)(?:: (.+))?", mutation):
        return Marker(name, simple[1], "", simple[2] or "", line)
    if value := re.fullmatch(r"= (.+?)(?: for (.+))?", mutation):
        return Marker(name, "=", value[1], value[2] or "", line)
    raise MarkerError(
        f"line {line + 1}: the mutation of {name} is one of (always), (never), (skip) and (= VALUE), each with or "
        f"without a part of the line; not ({mutation})"
    )


# Reading a line


def top_level(code: str, start: int) -> Iterator[int]:
    """The places that are in no brackets and in no string. A place at which a bracket opens is one of them."""
    depth = 0
    place = start
    while place < len(code):
        character = code[place]
        if depth == 0:
            yield place
        if character == '"':
            place = end_of_string(code, place)
            continue
        if character in CLOSING:
            depth += 1
        elif character in CLOSING.values():
            depth -= 1
        place += 1


def end_of_string(code: str, start: int) -> int:
    place = start + 1
    while place < len(code) and code[place] != '"':
        if code.startswith("\\(", place):
            place = closing(code, place + 1)
        place += 2 if code[place] == "\\" else 1
    return place + 1


def closing(code: str, start: int) -> int:
    """The position at which the bracket that opens at `start` closes."""
    for place in top_level(code, start):
        if place > start:
            return place - 1
    if code.endswith(CLOSING[code[start]]):
        return len(code) - 1
    raise MarkerError("the bracket closes on another line")


def first(code: str, start: int, text: str) -> int:
    """The first position of the text outside of brackets, or -1."""
    return next((place for place in top_level(code, start) if code.startswith(text, place)), -1)


def is_balanced(code: str) -> bool:
    places = [place for place in top_level(code, 0) if code[place] not in "\"'"]
    if any(code[place] in CLOSING.values() for place in places):
        return False
    openings = [place for place in places if code[place] in CLOSING]
    try:
        for place in openings:
            closing(code, place)
    except MarkerError:
        return False
    return True


def right_side(code: str, suffix: str) -> tuple[int, int] | None:
    """What is assigned or returned."""
    if found := re.match(r"\s*return\s+", code):
        start = found.end()
    else:
        equals = first(code, 0, " = ")
        if equals < 0:
            return None
        start = equals + 3
    return start, len(code.rstrip("};")) if suffix == ".c" else len(code)


def condition(code: str, suffix: str) -> tuple[int, int, bool]:
    """
    Returns:
        where the line's condition stands, and whether it is a list of Swift's clauses.
    """
    words = re.match(r"\s*(?:\}\s*)?(?:else\s+)?(if|elif|while|guard)\b\s*", code)
    if words and suffix == ".c":
        return words.end() + 1, closing(code, words.end()), False
    if words and suffix == ".py":
        return words.end(), code.rindex(":"), False
    filtered = re.match(r"\s*for\b", code) and first(code, 0, " where ")
    if words or filtered:
        start = words.end() if words else int(filtered or 0) + len(" where ")
        end = first(code, start, " else" if words and words[1] == "guard" else " {")
        if end < 0:
            raise MarkerError("the condition ends on another line: say which part of this line is meant")
        return start, end, words is not None
    if sides := right_side(code, suffix):
        return *sides, False
    start = len(code) - len(code.lstrip())
    return start, len(code.rstrip(", ")), False


def clauses(text: str) -> list[str]:
    commas = [place for place in top_level(text, 0) if text[place] == ","]
    return [text[a + 1 : b].strip() for a, b in zip([-1, *commas], [*commas, len(text)], strict=True)]


def place_of(part: str, code: str) -> tuple[int, int]:
    before = r"(?<!\w)" if part[0].isalnum() or part[0] == "_" else ""
    after = r"(?!\w)" if part[-1].isalnum() or part[-1] == "_" else ""
    places = [found.start() for found in re.finditer(before + re.escape(part) + after, code)]
    if len(places) != 1:
        raise MarkerError(f"its line has `{part}` {len(places)} times, not once")
    return places[0], places[0] + len(part)


# What a marker does


def change(marker: Marker, code: str, suffix: str, out: str) -> tuple[int, int, str]:
    """
    Args:
        out: the expression that is true while the guard is out.

    Returns:
        a part of the line, and what stands there instead.
    """
    is_python = suffix == ".py"
    either, both, isnt = ("or", "and", "not ") if is_python else ("||", "&&", "!")
    place = place_of(marker.part, code) if marker.part else None
    if marker.kind == "skip":
        start, end = place or (len(code) - len(code.lstrip()), len(code))
        statement = code[start:end]
        if not is_balanced(statement):
            raise MarkerError("the statement is not all on this line")
        if re.match(r"(let|var|guard|case|default)\b", statement):
            raise MarkerError("what is declared here is needed later: it can't be skipped")
        if is_python:
            return start, end, f"if not {out}: {statement}"
        return start, end, f"if (!{out}) {statement}" if suffix != ".swift" else f"if !{out} {{ {statement} }}"
    if marker.kind == "=":
        place = place or right_side(code, suffix)
        if not place:
            raise MarkerError("nothing is assigned or returned on its line: say `= VALUE for PART`")
        old = f"({code[slice(*place)]})"
        value = re.sub(r"\bPART\b", lambda _: old, marker.value)
        return *place, f"({value} if {out} else {old})" if is_python else f"({out} ? {value} : {old})"
    if place:
        start, end, is_list = *place, False
    else:
        start, end, is_list = condition(code, suffix)
    old = code[start:end]
    if marker.kind == "never":
        # At its end only, so that other markers of this line may mean parts of the condition.
        return (end, end, f", !{out}") if is_list else (start, end, f"(({old}) {both} {isnt}{out})")
    parts = clauses(old) if is_list else [old]
    if any(re.match(r"(let|var|case)\b", part) for part in parts):
        raise MarkerError("a condition that declares something can't be forced: say which part is meant")
    return start, end, f"({' && '.join(f'({part})' for part in parts)} {either} {out})"


def read(text: str, suffix: str) -> list[Marker]:
    """
    Raises:
        MarkerError: a comment begins as a marker does and is none.
    """
    found = pattern(suffix)
    lines = text.split("\n")
    return [parse(match[1], number) for number, line in enumerate(lines) if (match := found.search(line))]


def changes(text: str, suffix: str, out: Callable[[str], str]) -> list[Change]:
    """Those of all markers of a file: the comments go, so that a statement can be put into braces.

    Args:
        out: the expression that is true while the guard of this name is out.
    """
    wanted = pattern(suffix)
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    found = []
    for marker in read(text, suffix):
        comment = wanted.search(lines[marker.line])
        assert comment
        at = marker.line
        found.append(Change(starts[at] + comment.start(), starts[at + 1] - 1, "", marker.name))
        # A marker that is alone on its line means the next one.
        while at < len(lines) and not code_of(lines[at], wanted).strip():
            at += 1
        code = code_of(lines[at], wanted) if at < len(lines) else ""
        try:
            if not code or code.lstrip().startswith(COMMENT[suffix]):
                raise MarkerError("no code follows")
            start, end, new = change(marker, code, suffix, out(marker.name))
        except MarkerError as error:
            raise MarkerError(f"line {marker.line + 1}: {marker.name}: {error}") from None
        found.append(Change(starts[at] + start, starts[at] + end, new, marker.name))
    return found


def code_of(line: str, marker: re.Pattern[str]) -> str:
    found = marker.search(line)
    line = line[: found.start()] if found else line
    # Another comment at the line's end is no code.
    return re.sub(r"(?<=\S)\s+(?://|#) .*$", "", line)
