# SPDX-License-Identifier: Apache-2.0
"""`noether-writer report`: one page of HTML with the curves of runs. What is in it is read as a browser would, and
compared with the files. Where a Chromium is installed it opens the page too."""

from __future__ import annotations

import html.parser
import itertools
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import noether_writer
import pytest
import torch
from conftest import RunningDaemon
from test_cli_odd import cli
from test_cli_sweep import filed

EVIL = "</script><img src=x onerror=alert(1)><!--<script>"


class Page(html.parser.HTMLParser):
    """The elements of a page, and what is in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags:
            self.texts.setdefault(self.tags[-1][0], []).append(data)

    @property
    def data(self) -> dict[str, Any]:
        [text] = [text for text in self.texts["script"] if text.startswith("{")]
        found = json.loads(text)
        assert isinstance(found, dict)
        return found


def report(*arguments: str | Path, code: int = 0) -> Page:
    result = cli("report", *map(str, arguments), "--out", "-")
    assert result.returncode == code, result.stderr
    return Page(result.stdout)


def number(value: float | str) -> float:
    return float(value)


def points(curve: dict[str, Any]) -> list[tuple[int, float]]:
    return list(zip(itertools.accumulate(curve["x"]), map(number, curve["y"]), strict=True))


def curves(page: Page) -> dict[str, list[Any]]:
    return {key["name"]: key["curves"] for key in page.data["keys"]}


def same(found: list[tuple[int, float]], wanted: dict[int, float]) -> bool:
    return len(found) == len(wanted) and all(
        at == update and (value == other or (math.isnan(value) and math.isnan(other)))
        for (at, value), (update, other) in zip(found, wanted.items(), strict=True)
    )


def test_the_page_has_each_value_of_the_log_and_each_checkpoint(daemon: RunningDaemon, tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.01)):
        with noether_writer.open_run(tmp_path / "sweep", name, config={"lr": lr, "seed": 1}) as run:
            for update in range(1, 51):
                loss = math.nan if update == 20 else math.inf if update == 30 else lr / update
                run.log({"loss/val": loss, "is_best": update == 3, "words": "none"}, update=update)
            run.save("net", "E1_U50_S50", {"w": torch.zeros(4)})
    assert daemon.stop() == 0
    page = report(tmp_path / "sweep")
    data = page.data
    assert [run["name"] for run in data["runs"]] == ["a", "b"]
    for place, run in enumerate(data["runs"]):
        log = torch.load(Path(run["directory"]) / "tracker/entries.th")
        for key in ("loss/val", "is_best"):
            found = curves(page)[key][place]
            assert found["count"] == 50 and "averages" not in found
            assert same(points(found), {update: float(value) for update, value in log[key].items()})
        assert curves(page)["loss/val"][place]["unshown"] == 2
        [checkpoint] = run["checkpoints"]
        file = Path(run["directory"]) / "checkpoints" / checkpoint["file"]
        assert (checkpoint["update"], checkpoint["bytes"]) == (50, file.stat().st_size)
        assert checkpoint["at"] == pytest.approx(file.stat().st_mtime)
    assert "words" not in curves(page)
    # The table is that of `runs DIR`.
    columns = [column["title"] for column in data["summary"]["columns"]]
    assert columns[:5] == ["RUN", "STATE", "UPDATE", "min loss/val", "last loss/val"] and columns[-1] == "lr"
    rows = [[cell["text"] for cell in row] for row in data["summary"]["rows"]]
    assert [(row[0], row[3], row[-1]) for row in rows] == [("a", "0.002", "0.1"), ("b", "0.0002", "0.01")]
    # By names of runs it is the same.
    assert report(tmp_path / "sweep/a", tmp_path / "sweep/b").data["keys"] == data["keys"]
    chosen = report(tmp_path / "sweep", "--max", "loss/val").data
    assert [key["name"] for key in chosen["keys"]] == ["loss/val"]
    assert "max loss/val" in [column["title"] for column in chosen["summary"]["columns"]]


def test_the_log_of_a_run_that_goes_on_is_that_of_its_journal(daemon: RunningDaemon, tmp_path: Path) -> None:
    with noether_writer.open_run(tmp_path, "a") as run:
        run.log({"loss": 1.5}, update=7)
        run.flush()
        page = report(tmp_path / "a")
        assert points(curves(page)["loss"][0]) == [(7, 1.5)]
        assert page.data["runs"][0]["state"] == "live"


def test_no_peak_and_no_gap_is_lost_of_ten_long_runs_and_the_page_stays_small(tmp_path: Path) -> None:
    count = 100_000
    generator = torch.Generator().manual_seed(1)
    for name in "abcdefghij":
        noise = torch.rand(3, count, generator=generator, dtype=torch.float64)
        peak, gap = (int(place) for place in torch.randint(1, count - 1, (2,), generator=generator))
        noise[:, peak] = torch.tensor([1000.0, -1000.0, 1e300], dtype=torch.float64)
        noise[:, gap if gap != peak else gap + 1] = math.nan
        values = {f"k{place}": dict(zip(range(count), row, strict=True)) for place, row in enumerate(noise.tolist())}
        filed(tmp_path / "sweep" / name, values)
    text = cli("report", str(tmp_path / "sweep"), "--out", "-").stdout
    assert len(text) < 8 << 20
    page = Page(text)
    total = 0
    for name, run in zip("abcdefghij", page.data["runs"], strict=True):
        assert run["name"] == name
        log = torch.load(tmp_path / "sweep" / name / "tracker/entries.th")
        for key, values in log.items():
            curve = curves(page)[key]["abcdefghij".index(name)]
            found = points(curve)
            total += len(found) + len(curve["averages"]["x"])
            assert all(values[at] == value or (math.isnan(values[at]) and math.isnan(value)) for at, value in found)
            whole = [value for value in values.values() if value == value]
            shown = [value for _, value in found if value == value]
            assert (min(shown), max(shown)) == (min(whole), max(whole))
            assert [at for at, value in found if math.isnan(value)] == [at for at, v in values.items() if math.isnan(v)]
            assert (found[0][0], found[-1][0], curve["count"]) == (0, count - 1, count)
            # Each value is in one average.
            averages = curve["averages"]
            assert sum(averages["count"]) == len(whole)
            mean = sum(a * n for a, n in zip(averages["y"], averages["count"], strict=True)) / len(whole)
            assert mean == pytest.approx(sum(whole) / len(whole))
    assert 100_000 < total <= 160_000


def test_names_and_values_are_text_and_never_elements(tmp_path: Path) -> None:
    for name in ("<img src=x onerror=alert(1)>", "b"):
        filed(tmp_path / "sweep" / name, {EVIL: {1: 0.5}, "<\u0338": {1: 1.0}}, evil=EVIL + name, other="\u202e")
    page = report(tmp_path / "sweep", tmp_path / "sweep" / "b")
    assert [tag for tag, _ in page.tags if tag in ("img", "script")] == ["script", "script"]
    assert {"img", "iframe", "link", "object"}.isdisjoint(tag for tag, _ in page.tags)
    assert EVIL in curves(page)
    assert "\u202e" not in page.texts["script"][0]
    [policy] = [given["content"] for _, given in page.tags if given.get("http-equiv") == "Content-Security-Policy"]
    nonces = {given["nonce"] for _, given in page.tags if "nonce" in given}
    [nonce] = nonces
    assert policy is not None and policy.startswith("default-src 'none';")
    assert f"script-src 'nonce-{nonce}'" in policy and "unsafe" not in policy
    # Nobody can know it before.
    again = report(tmp_path / "sweep")
    assert nonce not in str([given for _, given in again.tags])
    # Nothing is fetched.
    assert not [given for _, given in page.tags if "src" in given or "href" in given]


def test_a_report_replaces_its_file_as_a_whole_and_nothing_else(tmp_path: Path) -> None:
    filed(tmp_path / "sweep/a", {"loss": {1: 0.5}})
    out = tmp_path / "page.html"
    out.write_text("old")
    with out.open() as old:
        result = cli("report", str(tmp_path / "sweep"), "--out", str(out))
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{out}\n", "")
        # Who has the old one open keeps it.
        assert old.read() == "old"
    assert curves(Page(out.read_text()))["loss"][0]["y"] == [0.5]
    assert sorted(os.listdir(tmp_path)) == ["page.html", "sweep"]
    (tmp_path / "folder").mkdir()
    for bad, words in (("folder", "folder"), ("none/page.html", "none")):
        result = cli("report", str(tmp_path / "sweep"), "--out", str(tmp_path / bad))
        assert result.returncode == 1 and words in result.stderr, result.stderr
        assert sorted(os.listdir(tmp_path)) == ["folder", "page.html", "sweep"]


def test_what_is_not_there_and_what_cannot_be_read(tmp_path: Path) -> None:
    out = tmp_path / "page.html"

    def refused(*arguments: str | Path) -> tuple[int, str]:
        result = cli("report", *map(str, arguments), "--out", str(out))
        assert result.stdout == "" and not out.exists()
        return result.returncode, result.stderr

    code, words = refused(tmp_path / "none")
    assert code == 4 and "no run" in words
    (tmp_path / "empty").mkdir()
    code, words = refused(tmp_path / "empty")
    assert code == 4 and "no runs below" in words
    filed(tmp_path / "sweep/a")
    code, words = refused(tmp_path / "sweep")
    assert code == 4 and "has logged a value or saved a checkpoint" in words
    filed(tmp_path / "sweep/b", {"loss": {1: 0.5}})
    code, words = refused(tmp_path / "sweep", "-k", "los")
    assert code == 4 and "close to it: loss" in words
    code, words = refused(tmp_path / "sweep/b", tmp_path / "none")
    assert code == 4
    # A file that cannot be read is said, also on the page; the rest is shown.
    broken = filed(tmp_path / "sweep/c", {"loss": {1: 0.5}}) / "tracker/entries.th"
    broken.write_bytes(b"no archive")
    result = cli("report", str(tmp_path / "sweep"), "--out", str(out))
    assert result.returncode == 1 and str(broken) in result.stderr
    assert result.stderr.count(str(broken)) == 1
    page = Page(out.read_text())
    [problem] = page.data["problems"]
    assert str(broken) in problem and "run c" in problem
    assert curves(page)["loss"][1]["y"] == [0.5]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_and_runs_nothing_of_a_name(tmp_path: Path, width: int) -> None:
    for name in ("<img src=x onerror=document.title='bad'>", "b"):
        filed(tmp_path / "sweep" / name, {EVIL: {1: 0.5, 2: math.nan, 3: 0.25}, "loss": {1: 1.0}}, lr=name)
    out = tmp_path / "page.html"
    assert cli("report", str(tmp_path / "sweep"), "--out", str(out)).returncode == 0
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += [f"--window-size={width},3000", "--virtual-time-budget=4000", "--dump-dom", out.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    page = Page(result.stdout)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("canvas") == 2 and tags.count("img") == 0 and tags.count("table") == 1
    assert "alert" not in "".join(page.texts["title"]) and page.texts["title"] != ["bad"]
    # Both were drawn: what a chart says of its values is said when it is.
    assert re.search(r"2 values not shown \(NaN or infinite\)", result.stdout)
    assert page.texts["h3"][0] == EVIL
