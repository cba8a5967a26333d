# SPDX-License-Identifier: Apache-2.0
"""Runs that are over, from their files: logs, exports, pictures. No daemon is asked, or there is none."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import noether_writer
import pandas
import pyarrow.parquet
import pytest
import torch
from conftest import RunningDaemon, logging_trainer
from test_cli import CLI, cli

VALUES = {
    "loss": [0.1, float("nan"), 5e-324, float("inf"), 1 / 3, -0.0],
    "count": [0, 255, 65536, -1, (1 << 62) + 1, -(1 << 63)],
    "huge": [1 << 80, -(1 << 70)],
    "flag": [True, False],
    "nothing": [None],
    'odd, "key"\n': ["two\nlines", 'quo"te, comma', "", "ä日", "NA"],
}


@pytest.fixture
def ended(daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An ended run's directory, with the daemon gone."""
    with noether_writer.open_run(tmp_path, "r") as run:
        for update in range(6):
            run.log({key: each[update] for key, each in VALUES.items() if update < len(each)}, update=update * 10)
        run.save("net", "E1_U49_S100", {"w": torch.ones(10)}).wait(30)
    assert daemon.stop() == 0
    yield tmp_path / "r"


def same(text: str, value: object) -> bool:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return text == str(value)
    if isinstance(value, float):
        return struct.pack("d", float(text)) == struct.pack("d", value) or (text == "nan" and value != value)
    assert isinstance(value, int)
    return int(text) == value


def test_csv_has_every_value(ended: Path) -> None:
    rows = list(csv.reader(io.StringIO(cli("export", str(ended)).stdout)))
    assert rows[0] == ["update", *VALUES] and [row[0] for row in rows[1:]] == ["0", "10", "20", "30", "40", "50"]
    for column, each in enumerate(VALUES.values(), 1):
        for row in range(6):
            text = rows[row + 1][column]
            assert same(text, each[row]) if row < len(each) else text == "", (text, row, column)


def test_json_is_the_log(ended: Path, tmp_path: Path) -> None:
    out = tmp_path / "log.json"
    assert cli("export", str(ended), "--format", "json", "--out", str(out)).returncode == 0
    log = json.loads(out.read_text())
    entries = torch.load(ended / "tracker/entries.th")
    assert log.keys() == entries.keys()
    for key, values in entries.items():
        assert [int(update) for update in log[key]] == list(values)
        for text, value in zip(log[key].values(), values.values(), strict=True):
            if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
                assert text == str(value)
            else:
                assert text == value and type(text) is type(value)


def test_long_has_one_type_a_column(ended: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("export", str(ended), "-f", "long", "-k", "loss", "-k", "flag").stdout)))
    assert [(row["key"], row["update"], row["type"]) for row in rows] == [
        *(("loss", str(update * 10), "float") for update in range(6)),
        *(("flag", str(update * 10), "bool") for update in range(2)),
    ]
    assert [float(row["number"]) for row in rows[6:]] == [1.0, 0.0]
    everything = list(csv.DictReader(io.StringIO(cli("export", str(ended), "-f", "long").stdout)))
    for row in everything:
        int(row["update"])
        assert row["number"] == "" or isinstance(float(row["number"]), float)
        assert (row["number"] == "") == (row["type"] in ("none", "str", "bigint"))


def test_long_goes_through_parquet_bit_by_bit(ended: Path, tmp_path: Path) -> None:
    """As --help shows it."""
    assert cli("export", str(ended), "-f", "long", "-o", str(tmp_path / "abcde.csv")).returncode == 0
    [code] = re.findall(r"python -c '(.*?)'$", cli("export", "--help").stdout, re.S | re.M)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    frame = pandas.read_parquet(tmp_path / "abcde.parquet", dtype_backend="pyarrow")
    assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {
        "key": "string[pyarrow]",
        "update": "int64[pyarrow]",
        "type": "string[pyarrow]",
        "number": "double[pyarrow]",
        "text": "string[pyarrow]",
    }
    plain = pandas.read_parquet(tmp_path / "abcde.parquet")
    assert (plain["update"].dtype, plain["number"].dtype) == ("int64", "float64")
    read: dict[str, dict[int, Any]] = {}
    for row in pyarrow.parquet.read_table(tmp_path / "abcde.parquet").to_pylist():
        number, text = row["number"], row["text"]
        assert (number is None) == (row["type"] in ("none", "str", "bigint"))
        value = {
            "float": lambda number=number: number,
            "int": lambda number=number, text=text: int(text or number),
            "bigint": lambda text=text: int(text),
            "bool": lambda number=number: bool(number),
            "str": lambda text=text: text,
            "none": lambda: None,
        }[row["type"]]()
        read.setdefault(row["key"], {})[row["update"]] = value
    assert list(read) == list(VALUES)
    for key, each in VALUES.items():
        assert list(read[key]) == [10 * index for index in range(len(each))]
        for value, wanted in zip(read[key].values(), each, strict=True):
            assert type(value) is type(wanted) and same(str(value), wanted), key


def test_show_and_checkpoints_of_files(ended: Path) -> None:
    shown = json.loads(cli("show", str(ended), "--json").stdout)
    assert (shown["state"], shown["last_update"]) == ("ended", 50) and "run" not in shown
    assert [item["key"] for item in shown["keys"]] == list(VALUES)
    [row] = json.loads(cli("checkpoints", str(ended), "--json").stdout)
    file = ended / "checkpoints/net_cp=E1_U49_S100_model.th"
    # The log's update, as the file says; its tag's where a copy has lost it.
    kept = os.listxattr(file) != []
    assert (row["update"], row["bytes"], row["state"]) == (50 if kept else 49, file.stat().st_size, "durable")
    assert abs(row["durable_at"] - file.stat().st_mtime) < 1e-3
    assert "net   E1_U49_S100  model" in cli("checkpoints", str(ended)).stdout
    copy = ended / "checkpoints/net_cp=E1_U48_S100_model.th"
    copy.write_bytes(file.read_bytes())
    rows = json.loads(cli("checkpoints", str(ended), "--json").stdout)
    assert [row["update"] for row in rows] == [50 if kept else 49, 48]
    # Named from where one is.
    here = subprocess.run([CLI, "show", "."], cwd=ended, capture_output=True, text=True)
    assert "last update  50" in here.stdout
    assert cli("tail", str(ended), "-n", "1").stdout.startswith("50  loss=-0.0  count=-9223372036854775808\n")


def test_a_journal_is_read_where_the_daemon_is_dead(daemon: RunningDaemon, tmp_path: Path) -> None:
    with logging_trainer(tmp_path):
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait()
    rows = list(csv.reader(io.StringIO(cli("export", str(tmp_path / "r")).stdout)))
    assert [float(row[1]) for row in rows[1:]] == [u / 7 for u in range(100)]
    assert "not finished" in cli("show", str(tmp_path / "r")).stdout


def test_a_file_that_is_not_a_log_is_refused(ended: Path) -> None:
    torch.save({"a": torch.ones(3)}, ended / "tracker/entries.th")
    result = cli("export", str(ended))
    assert result.returncode == 1 and "not a log's pickle" in result.stderr
    torch.save({"a": {1: 0.5, 2: "x"}, "b": {}}, ended / "tracker/entries.th")
    assert cli("export", str(ended)).stdout == "update,a\n1,0.5\n2,x\n"
    (ended / "tracker/entries.th").write_bytes(b"PK")
    assert cli("export", str(ended)).returncode == 1
    assert cli("show", str(ended.parent)).returncode == 4


# Plots.

MARK = "\N{MULTIPLICATION SIGN}"


@pytest.fixture
def curves(daemon: RunningDaemon, tmp_path: Path) -> Path:
    for name, scale in (("first", 1.0), ("second", 10.0)):
        with noether_writer.open_run(tmp_path, name) as run:
            for update in range(1, 201):
                gap = 80 < update < 120
                run.log({"loss": float("nan") if gap else scale / update, "word": "x"}, update=update)
    return tmp_path


def plot(*arguments: str) -> list[str]:
    result = cli("plot", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_plot_in_text(curves: Path) -> None:
    lines = plot("first", "loss", "--run", "second", "--log", "--width", "70", "--height", "18")
    assert len(lines) == 18 and max(map(len, lines)) <= 70
    assert lines[-2:] == ["━━ first   ━━ second", f"{MARK} 78 values not shown (NaN, infinite or not positive)"]
    [axis] = [line for line in lines if "└" in line]
    gap = slice(axis.index(MARK), axis.rindex(MARK))
    assert axis.count(MARK) > 8
    # No dot of either line where there is no value.
    assert all(set(line[gap][1:-1]) <= {" "} for line in lines[: lines.index(axis)])
    assert any("⠉" <= character <= "⣿" for line in lines for character in line)
    # Logarithmic: a line from 10 down by decades.
    assert [line.split()[0] for line in lines if "┤" in line] == ["10", "1", "0.1", "0.01"]


def test_smoothing_and_json(curves: Path) -> None:
    [raw] = json.loads("".join(plot("first", "loss", "--json")))
    [smooth] = json.loads("".join(plot("first", "loss", "--json", "--smooth", "0.5")))
    assert raw["name"] == "loss" and raw["values"][0] == 1.0 and raw["values"][100] is None
    # Debiased: the first is as it is, the second is (0.25 * 1 + 0.5 * 0.5) / 0.75.
    assert smooth["values"][0] == 1.0 and abs(smooth["values"][1] - (0.25 + 0.25) / 0.75) < 1e-12
    assert smooth["values"][100] is None


def test_svg(curves: Path) -> None:
    out = curves / "loss.svg"
    assert plot("first", "loss", "--run", "second", "--out", str(out)) == [str(out)]
    tree = ElementTree.parse(out)
    texts = [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"loss", "first", "second", "update"} <= set(texts)
    # What is not shown is marked on the axis, and said, as in a terminal.
    assert f"{MARK} 78 values not shown (NaN or infinite)" in texts
    [marks] = [path.get("d", "") for path in tree.iter("{http://www.w3.org/2000/svg}path") if path.get("class")]
    places = [float(place) for place in re.findall(r"M([\d.]+)", marks)]
    first, last = (80 + 800 * (update - 1) / 199 for update in (81, 119))
    assert len(places) > 10 and abs(places[0] + 3.5 - first) <= 4 and abs(places[-1] + 3.5 - last) <= 4
    lines = [path.get("d", "") for path in tree.iter("{http://www.w3.org/2000/svg}path") if path.get("stroke-linejoin")]
    assert len(lines) == 2
    for line in lines:
        # Two pieces, with a gap between them.
        assert len(re.findall("M", line)) == 2 and len(re.findall("[ML]", line)) == 200 - 39


def test_a_picture_and_its_points_at_once(curves: Path) -> None:
    out = curves / "both.svg"
    command = [CLI, "plot", "first", "loss", "--json", "--out", out.name]
    [line] = json.loads(subprocess.run(command, cwd=curves, capture_output=True, text=True, check=True).stdout)
    assert line["file"] == str(out) and line["values"][0] == 1.0
    assert ElementTree.parse(out).getroot().tag.endswith("svg")
    [line] = json.loads("".join(plot("first", "loss", "--json")))
    assert "file" not in line


def test_png(curves: Path) -> None:
    out = curves / "loss.png"
    assert plot("first", "loss", "--out", str(out)) == [str(out)]
    width, height, pixels = png(out.read_bytes())
    assert (width, height) == (1800, 1100)
    blue = (0x00, 0x72, 0xB2)
    columns = {x for y in range(80, 901) for x in range(width) if pixels[y][3 * x : 3 * x + 3] == bytes(blue)}
    # Over the whole width of the plot, but for the gap from update 80 to 120 (of 1 to 200, at 160 to 1760).
    assert min(columns) < 170 and max(columns) > 1750
    gap = range(160 + 1600 * 80 // 199, 160 + 1600 * 118 // 199)
    assert not columns & set(gap[4:-4]) and columns & set(range(gap.start - 20, gap.start))
    # Marks on the axis, as wide as the gap: black above the axis itself, where the line is not.
    marked = {x for y in range(893, 897) for x in range(164, width) if pixels[y][3 * x : 3 * x + 3] == bytes(3)}
    assert marked and gap.start - 20 <= min(marked) <= gap.start + 20 and gap.stop - 20 <= max(marked) <= gap.stop + 20


def png(data: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height, and the RGB bytes of each row; each chunk's CRC is checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, body, size = 8, b"", (0, 0)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        content = data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + content) == struct.unpack_from(">I", data, at + 8 + length)[0]
        if kind == b"IHDR":
            size = struct.unpack_from(">II", content)
            assert content[8:] == bytes([8, 2, 0, 0, 0])
        elif kind == b"IDAT":
            body += content
        at += 12 + length
    assert kind == b"IEND"
    raw, step = zlib.decompress(body), 1 + 3 * size[0]
    assert len(raw) == step * size[1] and not any(raw[::step])
    return size[0], size[1], [raw[row * step + 1 : (row + 1) * step] for row in range(size[1])]


def test_a_picture_without_gaps_has_no_marks(tmp_path: Path) -> None:
    (tmp_path / "r/tracker").mkdir(parents=True)
    torch.save({"loss": {1: 1.0, 2: 2.0}}, tmp_path / "r/tracker/entries.th")
    plot(str(tmp_path / "r"), "loss", "--out", str(tmp_path / "c.svg"))
    assert "not shown" not in (tmp_path / "c.svg").read_text() and "unshown" not in (tmp_path / "c.svg").read_text()


# Several runs in one plot.


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A sweep of ended runs, one of which has no loss, and things that are no runs."""
    for number in range(12):
        name = "loss" if number < 11 else "other"
        (tmp_path / f"sweep/r{number:02}/tracker").mkdir(parents=True)
        torch.save({name: {1: number, 2: 2.0}, "lr": {1: 0.1}}, tmp_path / f"sweep/r{number:02}/tracker/entries.th")
    (tmp_path / "sweep/notes.txt").write_text("")
    (tmp_path / "sweep/empty").mkdir()
    return tmp_path


def lines_of(*arguments: str, cwd: Path | None = None) -> list[str]:
    command = [CLI, "plot", *arguments, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return [line["name"] for line in json.loads(result.stdout)]


def test_plot_of_a_pattern(many: Path) -> None:
    names = [f"r{number:02}" for number in range(11)]
    assert lines_of("sweep/*", "loss", cwd=many) == names
    assert lines_of(f"{many}/sweep/r0[0-2]", "loss") == names[:3]
    assert lines_of("sweep/r0?", "loss", "lr", cwd=many)[:3] == ["r00 loss", "r00 lr", "r01 loss"]
    # Without its quotes, a shell has made many words of it.
    runs = [str(path) for path in sorted((many / "sweep").iterdir()) if (path / "tracker").exists()]
    assert lines_of(*runs, "loss") == names
    # Each run once.
    assert lines_of("sweep/r0[01]", "loss", "--run", "sweep/r01", "sweep/r*2", cwd=many) == ["r00", "r01", "r02"]
    left_out = cli("plot", f"{many}/sweep/*", "loss")
    assert left_out.returncode == 0 and "run r11 has no numbers of loss, and is left out" in left_out.stderr
    assert cli("plot", f"{many}/*/nothing*", "loss").returncode == 4


def test_a_run_whose_name_looks_like_a_pattern(many: Path) -> None:
    (many / "sweep/r00").rename(many / "sweep/r[0]")
    assert lines_of("sweep/r[0]", "loss", cwd=many) == ["loss"]
    assert lines_of("sweep/r[*", "loss", cwd=many) == ["loss"]


def test_runs_of_one_name_are_told_apart(many: Path) -> None:
    for number in range(2):
        (many / f"x{number}").mkdir()
        (many / f"sweep/r0{number}").rename(many / f"x{number}/train")
    assert lines_of(f"{many}/x*/train", "loss") == ["x0/train", "x1/train"]


def test_plot_of_ids_that_match(daemon: RunningDaemon, tmp_path: Path) -> None:
    for name in ("sweep-1", "sweep-2", "other"):
        with noether_writer.open_run(tmp_path, name) as run:
            run.log({"loss": 1.0}, update=1)
    assert lines_of("sweep-*", "loss", cwd=Path("/")) == ["sweep-1", "sweep-2"]


def test_other_runs_in_one_option(many: Path) -> None:
    assert lines_of("sweep/r00", "loss", "--run", "sweep/r02", "sweep/r01", "--log", cwd=many) == ["r00", "r02", "r01"]
    two = ["--run", "sweep/r02", "--run", "sweep/r01"]
    assert lines_of("sweep/r00", "loss", *two, cwd=many) == ["r00", "r02", "r01"]


def test_an_unknown_key_names_those_that_are_known(many: Path) -> None:
    one = cli("plot", f"{many}/sweep/r00", "los")
    assert (one.returncode, one.stdout) == (4, "") and "close to it: loss; it has loss, lr" in one.stderr
    all_of_them = cli("plot", f"{many}/sweep/*", "lossy")
    assert all_of_them.returncode == 4
    assert "no run here has values of lossy; close to it: loss; their log has loss, lr, other" in all_of_them.stderr
    # Also beside a known one.
    assert cli("plot", f"{many}/sweep/r00", "loss", "los").returncode == 4
    far = cli("plot", f"{many}/sweep/r00", "accuracy")
    assert far.returncode == 4 and "close to it" not in far.stderr and "it has loss, lr" in far.stderr


def test_plot_without_a_key_lists_the_keys(many: Path, ended: Path) -> None:
    assert plot(f"{many}/sweep/r00") == ["loss", "lr"]
    assert plot(f"{many}/sweep/*") == ["loss", "lr", "other"]
    assert json.loads(cli("plot", str(ended), "--json").stdout) == list(VALUES)
    # A name may not break its line.
    assert len(plot(str(ended))) == len(VALUES)
    assert cli("plot", f"{many}/sweep/r00", "--out", "x.svg").returncode == 64


def test_many_lines_leave_room_for_the_plot(many: Path) -> None:
    for number in range(12, 80):
        (many / f"sweep/r{number:02}/tracker").mkdir(parents=True)
        os.link(many / "sweep/r00/tracker/entries.th", many / f"sweep/r{number:02}/tracker/entries.th")
    lines = plot(f"{many}/sweep/*", "loss", "--width", "80", "--height", "20")
    assert len(lines) <= 21 and re.search(r"\.\.\. and \d+ more$", lines[-1])
    assert sum("┤" in line or "│" in line for line in lines) >= 10
