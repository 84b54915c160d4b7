# SPDX-License-Identifier: BSD-3-Clause
"""The look that the pictures of all acts share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor looked for

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

DPI = 130
TRAIN, HELD_OUT, INK, GREY = "#5b8db8", "#c8553d", "#333333", "#888888"


def tidy(*panels: plt.Axes) -> None:
    for axes in panels:
        axes.grid(True, alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_training_loss(
    axes: plt.Axes, train: Sequence[float], name: str = "training", color: str = TRAIN
) -> None:
    """Thin: each step, whose data differ; thick: a running mean."""
    steps = np.arange(1, len(train) + 1)
    axes.plot(steps, train, color=color, alpha=0.3, linewidth=0.8)
    window = max(1, len(train) // 10)
    smooth = np.convolve(train, np.ones(window) / window, mode="valid")
    label = f"{name}, mean of {window} steps" if window > 1 else name
    axes.plot(steps[window - 1 :], smooth, color=color, linewidth=2, label=label)
