# SPDX-License-Identifier: BSD-3-Clause
"""The one picture of README.md: seconds and MiB of one case beside what people use today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .plots import FLOOR, GRID, MIB, OURS, drawing, save

CASE = "train"  # of linear_cross_entropy_cpu.csv
# Contender: what a reader calls it.
NAMES = {
    "ours": "masked_loss_ext",
    "cut-cross-entropy compiled": "cut-cross-entropy, compiled",
    "compile": "F.cross_entropy, torch.compile",
    "eager": "F.cross_entropy",
    "TRL": "TRL's log-probabilities",
    "torch chunked": "torch's linear_cross_entropy",
}


def draw(rows: Sequence[Mapping[str, str]], path: Path, made_of: str) -> None:
    found = {row["contender"]: row for row in rows if row["case"] == CASE}
    who = [name for name in NAMES if found.get(name, {}).get("status") == "timed"]
    places = range(len(who))
    colours = [OURS if name == "ours" else FLOOR for name in who]
    seconds = [float(found[name]["median_us"]) / 1e6 for name in who]
    mib = [float(found[name]["peak_extra_bytes"]) / MIB for name in who]
    panels = (
        ("seconds, loss and gradient", seconds, "{:.2f}"),
        ("MiB beyond inputs and gradients", mib, "{:.0f}"),
    )
    with drawing("front") as pyplot:
        figure, both = pyplot.subplots(1, 2, sharey=True, figsize=(7.6, 2.2), layout="constrained")
        for axes, (label, values, form) in zip(both, panels, strict=True):
            bars = axes.barh(places, values, color=colours, height=0.66)
            axes.bar_label(bars, [form.format(value) for value in values], padding=3)
            axes.set_xlabel(label)
            axes.set_yticks(places, [NAMES[name] for name in who])
            axes.margins(x=0.16)
            axes.tick_params(length=0)
            axes.grid(axis="x", color=GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "bottom"]].set_visible(False)
        both[0].invert_yaxis()
        save(figure, path, made_of)
        pyplot.close(figure)
