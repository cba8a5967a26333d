# SPDX-License-Identifier: Apache-2.0
"""A soak: eight trainers that log, save, finish and begin anew, for as long as is asked for; the daemon's memory,
descriptors and threads each second. Writes the samples as JSON and as a chart, and fails where something grows.

    make soak MINUTES=60
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import noether_writer
import torch

DAEMON = os.environ["NOETHER_WRITER_DAEMON"]
TRAINERS = 8
UPDATES_PER_RUN = 2000
UPDATE_SECONDS = 0.01
SAVE_EVERY = 100
# What may be more in the last third than in the first: a page cache of the allocator is no leak, growth without end is.
ALLOWED = {"anonymous_kib": 1.15, "descriptors": 1.0, "threads": 1.0}


def train(number: int, root: Path, until: float) -> None:
    """One trainer: runs one after another, each with a new id; the files of ended ones are taken away."""
    status = 1
    try:
        net = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.Linear(1024, 256))
        life = 0
        while time.monotonic() < until:
            name = f"t{number}-{life}"
            with noether_writer.open_run(root, name) as run:
                for update in range(1, UPDATES_PER_RUN + 1):
                    if time.monotonic() >= until:
                        break
                    run.log({f"k{i}": update / (i + 1) for i in range(20)}, update=update, epoch=update // 100)
                    if update % SAVE_EVERY == 0:
                        state = {"state_dict": net.state_dict(), "update": update}
                        run.save_as([noether_writer.Target("net", t, state) for t in (f"U{update % 300}", "latest")])
                    time.sleep(UPDATE_SECONDS)
            last = torch.load(root / name / "checkpoints/net_cp=latest_model.th")["update"] if update >= 100 else 0
            assert last == update // SAVE_EVERY * SAVE_EVERY or update < UPDATES_PER_RUN, (last, update)
            shutil.rmtree(root / name)
            life += 1
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def sample(pid: int, start: float) -> dict[str, float]:
    fields = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value
    return {
        "seconds": round(time.monotonic() - start, 1),
        "anonymous_kib": int(fields["RssAnon"].split()[0]),
        "resident_kib": int(fields["VmRSS"].split()[0]),
        "threads": int(fields["Threads"]),
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
    }


def chart(samples: list[dict[str, float]]) -> str:
    """Three panels over time, each from zero."""
    panels = [
        ("anonymous_kib", "anonymous memory, MiB", 1024),
        ("descriptors", "open descriptors", 1),
        ("threads", "threads", 1),
    ]
    width, height, left, top = 900, 170, 70, 34
    end = samples[-1]["seconds"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{len(panels) * height + 30}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for index, (key, title, unit) in enumerate(panels):
        y0 = index * height + top
        inner = height - top - 16
        values = [point[key] / unit for point in samples]
        most = max(values) * 1.15 or 1

        def place(seconds: float, value: float, y0: int = y0, inner: int = inner, most: float = most) -> str:
            return f"{left + seconds / end * (width - left - 20):.1f},{y0 + inner - value / most * inner:.1f}"

        parts.append(f'<text x="{left}" y="{y0 - 8}" font-weight="bold">{title}</text>')
        for part in (0, 0.5, 1):
            x, y = place(0, most * part).split(",")
            parts.append(f'<line x1="{x}" x2="{width - 20}" y1="{y}" y2="{y}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 8}" y="{float(y) + 4}" text-anchor="end">{most * part:.0f}</text>')
        points = " ".join(place(p["seconds"], v) for p, v in zip(samples, values, strict=True))
        parts.append(f'<polyline fill="none" stroke="#1f6fb4" stroke-width="1.2" points="{points}"/>')
    bottom = len(panels) * height + 12
    for part in range(5):
        x = left + part / 4 * (width - left - 20)
        parts.append(f'<text x="{x}" y="{bottom}" text-anchor="middle">{end * part / 4 / 60:.1f} min</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def growth(samples: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Medians of the second sixth and of the last: the start is warming up."""
    sixth = max(1, len(samples) // 6)
    return {
        key: (
            statistics.median(point[key] for point in samples[sixth : 2 * sixth]),
            statistics.median(point[key] for point in samples[-sixth:]),
        )
        for key in ALLOWED
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Eight trainers, and what the daemon needs meanwhile")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path(".soak"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="nw-soak-"))
    os.environ["NOETHER_WRITER_SOCKET"] = str(folder / "socket")
    os.environ["NOETHER_WRITER_SETTING_STATE_DIRECTORY"] = str(folder / "state")
    with open(folder / "daemon.log", "w") as log:
        daemon = subprocess.Popen([DAEMON, "--socket", str(folder / "socket")], stderr=log)
    while not (folder / "socket").exists():
        time.sleep(0.01)
    start = time.monotonic()
    children = []
    for number in range(TRAINERS):
        child = os.fork()
        if child == 0:
            train(number, folder / "runs", start + options.minutes * 60)
        children.append(child)
    samples: list[dict[str, float]] = []
    failed = 0
    while children:
        samples.append(sample(daemon.pid, start))
        time.sleep(1)
        for child in list(children):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                children.remove(child)
                failed += status != 0
    # What eight trainers needed, without the end in which they leave one by one.
    steady = [point for point in samples if point["seconds"] < options.minutes * 60]
    daemon.send_signal(signal.SIGTERM)
    ended = daemon.wait(60)
    durable = (folder / "daemon.log").read_text().count("durable:")
    changes = growth(steady)
    result: dict[str, Any] = {
        "minutes": options.minutes,
        "trainers": TRAINERS,
        "trainers_failed": failed,
        "daemon_ended_with": ended,
        "lines_of_durable_files": durable,
        "from_to": changes,
        "samples": samples,
    }
    (options.out / "soak.json").write_text(json.dumps(result) + "\n")
    (options.out / "soak.svg").write_text(chart(steady))
    grown = [key for key, (before, after) in changes.items() if after > before * ALLOWED[key] + 1]
    print({key: value for key, value in result.items() if key != "samples"}, "grown:", grown)
    shutil.rmtree(folder)
    return 1 if grown or failed or ended else 0


if __name__ == "__main__":
    sys.exit(main())
