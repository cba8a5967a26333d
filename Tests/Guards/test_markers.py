# SPDX-License-Identifier: Apache-2.0
"""What becomes of a marked line. The guard is out while OUT is true."""

from __future__ import annotations

import markers
import pytest


def changed(text: str, suffix: str = ".swift") -> str:
    found = markers.changes(text, suffix, lambda _: "OUT")
    for change in sorted(found, key=lambda change: change.start, reverse=True):
        text = text[: change.start] + change.new + text[change.end :]
    return text


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        ("guard a > 0 else { return }  // guard: g (always)", "guard ((a > 0) || OUT) else { return }"),
        ("guard a, b(1, 2) else {  // guard: g (always)", "guard ((a) && (b(1, 2)) || OUT) else {"),
        ("guard a, b else {  // guard: g (always: b)", "guard a, ((b) || OUT) else {"),
        ("if let a, b {  // guard: g (never)", "if let a, b, !OUT {"),
        ("} else if x({ $0 }) {  // guard: g (never)", "} else if x({ $0 }), !OUT {"),
        ("for a in b where a.isGood {  // guard: g (never)", "for a in b where ((a.isGood) && !OUT) {"),
        ("return a == b  // guard: g (never)", "return ((a == b) && !OUT)"),
        ("a < b,  // guard: g (always)", "((a < b) || OUT),"),
        ("try sync()  // guard: g (skip)", "if !OUT { try sync() }"),
        ("if a { b() } else { c() }  // guard: g (skip: b())", "if a { if !OUT { b() } } else { c() }"),
        ("a = try b()  // guard: g (= nil)", "a = (OUT ? nil : (try b()))"),
        ('let a = "= {\\(b["="])"  // guard: g (= "")', 'let a = (OUT ? "" : ("= {\\(b["="])"))'),
        ("a(b, 1)  // guard: g (= 0 for 1)", "a(b, (OUT ? 0 : (1)))"),
        ("a(b)  // guard: g (= PART ?? c for b)", "a((OUT ? (b) ?? c : (b)))"),
        ("// guard: g (skip)\na()", "\nif !OUT { a() }"),
        ("// guard: g (= 0 for 1)\n// guard: h (always: b)\nif a(1), b {", "\n\nif a((OUT ? 0 : (1))), ((b) || OUT) {"),
    ],
)
def test_swift(marked: str, expected: str) -> None:
    assert changed(marked) == expected


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        ("if (a && b(c)) {  // guard: g (never)", "if (((a && b(c)) && !OUT)) {"),
        ("else close(a);  /* guard: g (skip: close(a);) */", "else if (!OUT) close(a);"),
        ("a->b = c;  // guard: g (= 1)", "a->b = (OUT ? 1 : (c));"),
        ("a = b > c;  // guard: g (never)", "a = ((b > c) && !OUT);"),
    ],
)
def test_c(marked: str, expected: str) -> None:
    assert changed(marked, ".c") == expected


@pytest.mark.parametrize(
    ("marked", "expected"),
    [
        ("    if a[1:]:  # guard: g (never)", "    if ((a[1:]) and not OUT):"),
        ("    look()  # guard: g (skip)", "    if not OUT: look()"),
        ("    a = b()  # guard: g (= 1)", "    a = (1 if OUT else (b()))"),
    ],
)
def test_python(marked: str, expected: str) -> None:
    assert changed(marked, ".py") == expected


@pytest.mark.parametrize(
    ("marked", "words"),
    [
        ("a()  // guard: g", "a marker reads"),
        ("a()  // guard: g (sometimes)", "the mutation of g is one of"),
        ("guard let a else {  // guard: g (always)", "can't be forced"),
        ("if a,  // guard: g (never)", "ends on another line"),
        ("a(1, 1)  // guard: g (= 0 for 1)", "2 times, not once"),
        ("let a = b  // guard: g (skip)", "can't be skipped"),
        ("a(  // guard: g (skip)", "not all on this line"),
        ("a()  // guard: g (= 1)", "nothing is assigned"),
        ("// guard: g (skip)", "no code follows"),
        ("// guard: g (skip)\n// Other words.\na()", "no code follows"),
    ],
)
def test_markers_that_say_nothing(marked: str, words: str) -> None:
    with pytest.raises(markers.MarkerError, match=words):
        changed(marked)
