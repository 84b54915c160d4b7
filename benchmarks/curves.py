# SPDX-License-Identifier: BSD-3-Clause
"""Curves of a sweep: for each axis the time of a call and the peak memory beyond the inputs.

Every contender that was timed is drawn, those that beat ours too; those that were not are named.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from . import plots

LABELS = {"N": "rows", "V": "classes", "share": "share of rows that count", "threads": "threads"}
VALUES = (
    ("median_us", 1e-3, "time of a call, ms"),
    ("peak_extra_bytes", 1 / plots.MIB, "peak memory, MiB"),
)
Rows = Sequence[Mapping[str, object]]
Lines = dict[str, list[tuple[float, float]]]


def lines_of(rows: Rows, axis: str, column: str, factor: float) -> Lines:
    """Of each contender: place on the axis and value, in the order of the axis."""
    found: Lines = {}
    for row in rows:
        if row["scale"] == axis and row.get(column) not in (None, "", "0", 0):
            point = (float(str(row["at"])), float(str(row[column])) * factor)
            found.setdefault(str(row["contender"]), []).append(point)
    return {name: sorted(points) for name, points in found.items()}


def left_out(rows: Rows) -> str:
    """Who was not timed anywhere, and why."""
    timed = {row["contender"] for row in rows if row.get("median_us") not in (None, "")}
    found = {
        str(row["contender"]): str(row["status"]) for row in rows if row["contender"] not in timed
    }
    every = "; ".join(f"{name} ({why.partition(': ')[2]})" for name, why in found.items())
    return f"left out: {every}" if every else ""


def colours_of(rows: Rows) -> dict[str, str]:
    """One for each contender, in all panels."""
    others = cycle(plots.COLOURS)
    found = {}
    for row in rows:
        name = str(row["contender"])
        if name not in found:
            ours, floor = name == "ours", row["role"] == "floor"
            found[name] = plots.OURS if ours else plots.FLOOR if floor else next(others)
    return found


def fill(panel: Any, lines: Lines, colours: Mapping[str, str], drawn: dict[str, Any]) -> None:
    for name, points in lines.items():
        style = "--" if colours[name] == plots.FLOOR else "-"
        x, y = zip(*points, strict=True)
        (drawn[name],) = panel.plot(x, y, style, marker="o", ms=3, color=colours[name])
    for scale, axis in ((panel.set_xscale, panel.xaxis), (panel.set_yscale, panel.yaxis)):
        scale("log", base=2)
        axis.set_major_formatter("{x:g}")
    panel.grid(color=plots.GRID, linewidth=0.6)


def draw(rows: Rows, path: Path, made_of: str = "") -> None:
    axes = list(dict.fromkeys(str(row["scale"]) for row in rows if row.get("scale")))
    values = [value for value in VALUES if any(lines_of(rows, axis, *value[:2]) for axis in axes)]
    colours, drawn = colours_of(rows), {}
    width = max(4.2, 2.7 * len(axes))
    with plots.drawing(path.stem) as pyplot:
        figure, panels = pyplot.subplots(
            len(values),
            len(axes),
            figsize=(width, 1.2 + 2.1 * len(values)),
            layout="constrained",
            squeeze=False,
        )
        for line, (column, factor, label) in zip(panels, values, strict=True):
            line[0].set_ylabel(label)
            for panel, axis in zip(line, axes, strict=True):
                fill(panel, lines_of(rows, axis, column, factor), colours, drawn)
        for panel, axis in zip(panels[-1], axes, strict=True):
            panel.set_xlabel(LABELS[axis])
        legend = {"loc": "outside upper center", "ncols": len(axes) + 1, "frameon": False}
        figure.legend(drawn.values(), drawn, fontsize=8, **legend)
        if note := left_out(rows):
            figure.supxlabel(textwrap.fill(note, round(18 * width)), fontsize=7)
        plots.save(figure, path, made_of)
        pyplot.close(figure)
