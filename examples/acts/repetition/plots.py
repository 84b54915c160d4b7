# SPDX-License-Identifier: BSD-3-Clause
"""The picture of the act, a PNG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..common.plots import GREY, HELD_OUT, INK, TRAIN, save, tidy
from .generation import Texts
from .report import REAL, RUNS, SIZES, Written, decoding
from .training import History

COLORS = dict(zip(RUNS, (TRAIN, HELD_OUT), strict=True))


def plot_repetition(
    histories: Mapping[str, History], real: Texts, written: Written, path: Path
) -> None:
    """Left: what the penalty costs. Right, a panel each way of writing: what it changes."""
    temperatures = list(dict.fromkeys(temperature for _, temperature in written))
    figure, (losses, *panels) = plt.subplots(
        1, 1 + len(temperatures), figsize=(13, 4), layout="constrained"
    )
    draw_losses(losses, histories)
    for axes, temperature in zip(panels, temperatures, strict=True):
        draw_shares(axes, real, {name: written[name, temperature] for name in RUNS})
        axes.set_title(f"Written by the models, {decoding(temperature)}")
        axes.sharey(panels[0])
    panels[0].set_ylabel("share of n-grams that stood there before")
    panels[-1].legend(frameon=False, fontsize=9)  # there the bars are low
    tidy(losses, *panels)
    save(figure, path)


def draw_losses(axes: plt.Axes, histories: Mapping[str, History]) -> None:
    for place, (name, history) in enumerate(histories.items()):
        at, bits = zip(*history.held_out, strict=True)
        color = COLORS[name]
        axes.plot(at, bits, "o-", color=color, linewidth=2, markersize=4, label=name)
        note = {"xytext": (0, 8 + 12 * place), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"{bits[-1]:.3f}", (at[-1], bits[-1]), color=color, **note)
    axes.set(xlabel="step", ylabel="bits per byte", title="Held-out cross entropy")
    axes.legend(frameon=False, fontsize=9)


def draw_shares(axes: plt.Axes, real: Texts, texts: Mapping[str, Texts]) -> None:
    """Bars by n; the marks are what people wrote."""
    at, width = np.arange(len(SIZES)), 0.38
    for place, (name, some) in enumerate(texts.items()):
        shares = [some.repeated(n) for n in SIZES]
        bars = axes.bar(at + (place - 0.5) * width, shares, width, color=COLORS[name], label=name)
        axes.bar_label(bars, [f"{share:.0%}" for share in shares], fontsize=8, color=GREY)
    marks = [real.repeated(n) for n in SIZES]
    axes.hlines(marks, at - width, at + width, color=INK, linewidth=2, label=REAL)
    axes.set_xticks(at, [f"{n} bytes" for n in SIZES])
