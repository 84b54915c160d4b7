# SPDX-License-Identifier: BSD-3-Clause
"""Curves of a sweep: for each axis the time of a call and the peak memory beyond the inputs.

Every contender that was timed is drawn, those that beat ours too; those that were not are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from . import plots

LABELS = {"N": "rows", "V": "classes", "share": "share of rows that count", "threads": "threads"}
VALUES = (("median_us", 1e-3, "ms"), ("peak_extra_bytes", 1 / plots.MIB, "MiB"))
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
    return "; ".join(f"{name} {why}" for name, why in found.items())


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


def draw(rows: Rows, path: Path, made_of: str = "") -> None:
    axes = list(dict.fromkeys(str(row["scale"]) for row in rows if row.get("scale")))
    colours, drawn = colours_of(rows), {}
    with plots.drawing(path.stem) as pyplot:
        size = (max(3.6, 2.6 * len(axes)), 5.2)
        figure, panels = pyplot.subplots(
            len(VALUES), len(axes), figsize=size, layout="constrained", squeeze=False
        )
        for place, axis in enumerate(axes):
            for panel, (column, factor, unit) in zip(panels[:, place], VALUES, strict=True):
                for name, points in lines_of(rows, axis, column, factor).items():
                    style = "--" if colours[name] == plots.FLOOR else "-"
                    (drawn[name],) = panel.plot(
                        *zip(*points, strict=True), style, marker="o", ms=3, color=colours[name]
                    )
                panel.set_xscale("log", base=2)
                panel.set_yscale("log", base=2)
                panel.xaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_major_formatter("{x:g}")
                panel.grid(color=plots.GRID, linewidth=0.6)
                panel.set_xlabel(LABELS[axis])
                if not place:
                    panel.set_ylabel(
                        f"{'time of a call' if unit == 'ms' else 'peak memory'}, {unit}"
                    )
        figure.legend(
            drawn.values(), drawn, loc="outside upper center", ncols=3, frameon=False, fontsize=8
        )
        if note := left_out(rows):
            figure.supxlabel(f"left out: {note}", fontsize=7)
        plots.save(figure, path, made_of)
        pyplot.close(figure)
