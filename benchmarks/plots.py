# SPDX-License-Identifier: BSD-3-Clause
"""Plots of docs/performance.md, drawn from the CSV files in benchmarks/results into docs/pictures.

A plot names the digest of the file that it was drawn from, by which ``--check`` knows one that is
stale: what matplotlib writes differs from release to release. Colours can be read on white and on
black.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from .report import read_csv
from .tables import COMMAND, RESULTS, ROOT, by_case

FOLDER = ROOT / "docs" / "pictures"
TEXT, GRID, OURS = "#757a80", "#8a8f9650", "#3d7ec7"
COLOURS = ("#d1603d", "#2f9e6e", "#9467bd", "#b8860b", "#c2548e", "#4aa3a3", "#8c6d5a", "#9aa83a")
FLOOR = "#8a8f96"
MIB = 2**20
# Name of a plot -> its file in benchmarks/results; "time", "memory" or "scale" (curves.py) is what
# it shows.
PLOTS = {
    "front": "linear_cross_entropy_cpu.csv",
    "time_cross_entropy": "cross_entropy_cpu.csv",
    "time_linear_cross_entropy": "linear_cross_entropy_cpu.csv",
    "memory_linear_cross_entropy": "linear_cross_entropy_cpu.csv",
    "time_squared_error": "squared_error_cpu.csv",
    "time_block_mask": "block_mask_cpu.csv",
    "time_unified": "unified_cpu.csv",
    "time_gpu": "nvidia_h200/figures.csv",
    "time_workloads": "workloads_cpu.csv",
    "memory_workloads": "workloads_cpu.csv",
    "scale_linear_cross_entropy": "scale_cpu.csv",
}
Rows = Sequence[Mapping[str, str]]
Points = dict[str, list[tuple[str, float]]]  # of each contender: case and value


def digest(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()[:16]


def times(rows: Rows) -> Points:
    """How many times as long as ours each takes: right of 1 is slower than we are."""
    found: Points = {"ours": []}
    for case, group in by_case(rows).items():
        found["ours"].append((case, 1.0))
        for row in group:
            if row["role"] in ("rival", "floor") and row["ratio_of_medians"]:
                name = ("floor: " if row["role"] == "floor" else "") + row["contender"]
                found.setdefault(name, []).append((case, float(row["ratio_of_medians"])))
    return found


def memory(rows: Rows) -> Points:
    """MiB beyond inputs and gradients, of the cases where that was weighed."""
    found: Points = {}
    for case, group in by_case(rows).items():
        for row in group:
            if row["role"] in ("ours", "rival") and float(row["peak_extra_bytes"] or 0):
                mib = float(row["peak_extra_bytes"]) / MIB
                found.setdefault(row["contender"], []).append((case, mib))
    return found


KINDS = {
    "time": (times, "times as long as ours (right: slower than ours, left: faster)"),
    "memory": (memory, "peak memory in MiB, beyond inputs and gradients"),
}


@contextmanager
def drawing(name: str) -> Iterator[Any]:
    """pyplot, in the style of all plots."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), TEXT)
    with matplotlib.rc_context(style | {"axes.edgecolor": GRID, "font.size": 9}):
        yield pyplot


def save(figure: Any, path: Path, made_of: str) -> None:
    data = {"Date": None, "Creator": None, "Description": made_of or None}
    figure.savefig(path, format="svg", transparent=True, metadata=data)
    lines = path.read_text().splitlines()  # without the spaces that matplotlib leaves at ends
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n")


def draw(name: str, source: Path, path: Path) -> None:
    made_of = f"drawn from {source.name}, sha256 {digest(source)}"
    drawer = {"scale": "benchmarks.curves", "front": "benchmarks.front"}.get(name.partition("_")[0])
    if drawer:  # which draws with what is here
        return importlib.import_module(drawer).draw(read_csv(source), path, made_of)
    points, label = KINDS[name.partition("_")[0]]
    found = points(read_csv(source))
    cases = list(dict.fromkeys(case for line in found.values() for case, _ in line))
    colours = cycle(COLOURS)
    with drawing(name) as pyplot:
        figure, axes = pyplot.subplots(figsize=(7.6, 1.3 + 0.2 * len(cases)), layout="constrained")
        for who, line in found.items():
            floor = who.startswith("floor: ")
            colour = OURS if who == "ours" else FLOOR if floor else next(colours)
            x, y = [value for _, value in line], [cases.index(case) for case, _ in line]
            marker = "|" if floor else "o"
            axes.scatter(x, y, s=36 if floor else 22, color=colour, marker=marker, label=who)
        axes.set_yticks(range(len(cases)), cases)
        axes.invert_yaxis()
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(label)
        axes.grid(axis="both", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
        save(figure, path, made_of)
        pyplot.close(figure)


def stale(path: Path, source: Path) -> bool:
    if not source.exists():  # nothing was measured yet, or what was is gone
        return path.exists()
    found = re.search(r"sha256 (\w+)", path.read_text()) if path.exists() else None
    return found is None or found[1] != digest(source)


def update(check: bool = False, folder: Path = FOLDER, results: Path = RESULTS) -> str:
    """Draw what is not of today's figures, or with ``check`` name it. Returns what is wrong."""
    found = {name: results / file for name, file in PLOTS.items()}
    old = [name for name, source in found.items() if stale(folder / f"{name}.svg", source)]
    if check:
        of = ", ".join(f"{name}.svg" for name in old)
        return f"{of}: not drawn from today's figures; run `{COMMAND}`" if old else ""
    for name in old:
        draw(name, found[name], folder / f"{name}.svg")
    return ""
