# SPDX-License-Identifier: Apache-2.0
"""Charts of what the benchmarks measured: bars of medians with min and max, on a log scale, as SVG. Written by hand:
two pictures need no plotting library, and a text file shows in a diff.
"""

from __future__ import annotations

import math
import sys
from html import escape
from pathlib import Path
from typing import Any

import bench

WIDTH, LABEL, BAR, GAP = 760, 290, 20, 8
CHARTS = [
    (
        "stall",
        "1 GiB in 148 tensors",
        "stall, x memcpy",
        "How long a save of 1 GiB holds the trainer, in memory copies",
    ),
    (
        "durable",
        "1 GiB in 148 tensors",
        "durable, x O_DIRECT",
        "From save to durable, 1 GiB, in O_DIRECT writes of the same bytes",
    ),
    (
        "scalars",
        "20 scalars an update, the caller's side",
        "an update",
        "Logging 20 scalars: microseconds of the trainer",
    ),
    (
        "gpu-stall",
        "device: 1 GiB in 148 tensors",
        "stall, x pinned copy",
        "How long a save of 1 GiB holds the trainer, in pinned copies",
    ),
    (
        "gpu-tensors",
        "device: 256 MiB in 5,000 tensors",
        "stall, x pinned copy",
        "How long a save of 5,000 tensors holds the trainer, in pinned copies",
    ),
    (
        "gpu-durable",
        "device: 8 GiB in 400 tensors",
        "durable, x O_DIRECT",
        "From save to durable, 8 GiB, in O_DIRECT writes of the same bytes",
    ),
]


def chart(title: str, rows: list[dict[str, Any]]) -> str:
    rows = sorted(rows, key=lambda row: row["spread"][1])
    low = min(row["spread"][0] for row in rows)
    high = max(row["spread"][2] for row in rows)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))

    def x(value: float) -> float:
        return LABEL + (WIDTH - LABEL - 70) * (math.log10(value) - first) / max(1, last - first)

    height = 46 + len(rows) * (BAR + GAP) + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="10" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for power in range(first, last + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="34" y2="{height - 22}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 8}" text-anchor="middle" fill="#666">{10.0**power:g}</text>')
    for index, row in enumerate(rows):
        smallest, median, largest = row["spread"]
        y = 42 + index * (BAR + GAP)
        ours = row["way"].startswith("noether-writer")
        fill = "#1f6feb" if ours else "#999" if row["way"].startswith("limit") else "#c9a36b"
        weight = "bold" if ours else "normal"
        middle = y + BAR / 2
        parts += [
            f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end" font-weight="{weight}">{escape(row["way"])}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{max(1.0, x(median) - LABEL):.1f}" height="{BAR}" fill="{fill}"/>',
            f'<line x1="{x(smallest):.1f}" x2="{x(largest):.1f}" y1="{middle}" y2="{middle}" stroke="#222"/>',
            f'<text x="{x(largest) + 6:.1f}" y="{y + 15}">{median:.3g}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    folder = Path(sys.argv[1])
    rows = [row for path in sys.argv[2:] for row in bench.kept(path)]
    for name, case, figure, title in CHARTS:
        found = [row for row in rows if row["case"] == case and row["figure"] == figure and row["spread"]]
        if found:
            (folder / f"{name}.svg").write_text(chart(title, found))


if __name__ == "__main__":
    main()
