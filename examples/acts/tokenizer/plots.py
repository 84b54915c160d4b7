# SPDX-License-Identifier: BSD-3-Clause
"""The picture of the act, as a PNG file."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from ..common.plots import GREY, HELD_OUT, save, tidy
from .data import Batch
from .measure import Quality, reconstruct
from .model import Tokenizer

SHOWN = 4  # crops
SHOWN_KEEP_K = (1, 4, 16, 64)


def plot_reconstructions(
    model: Tokenizer, batch: Batch, by_keep_k: dict[int, Quality], path: Path
) -> None:
    """Left: a row per crop, original first, then from 1, 4, 16, 64 registers. Right: the error."""
    columns = {"original": batch.images(batch.patches)}
    for k in SHOWN_KEEP_K:
        columns[f"keep_k = {k}"] = reconstruct(model, batch, k)
    chosen = choose(columns["original"])
    figure = plt.figure(figsize=(13, 1.75 * len(chosen) + 0.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.75, 1.0))
    grid = left.subplots(len(chosen), len(columns), squeeze=False)
    for cells, (name, images) in zip(grid.T, columns.items(), strict=True):
        for axes, i in zip(cells, chosen, strict=True):
            image = ((images[i] + 1) / 2).permute(1, 2, 0).numpy()
            axes.imshow(image, interpolation="nearest")
            axes.set_axis_off()
        cells[0].set_title(name, fontsize=10)
    draw_error(right.subplots(), batch, by_keep_k)
    save(figure, path)


def choose(originals: list[Tensor]) -> list[int]:
    """Those with most to see, by the originals alone: the sum of the steps between neighbours."""
    detail = [sum(x.diff(dim=axis).abs().sum().item() for axis in (1, 2)) for x in originals]
    return sorted(np.argsort(detail)[::-1][:SHOWN].tolist())


def draw_error(axes: plt.Axes, batch: Batch, by_keep_k: dict[int, Quality]) -> None:
    errors = [quality.mse for quality in by_keep_k.values()]
    axes.plot(list(by_keep_k), errors, "o-", color=HELD_OUT, linewidth=2, markersize=5)
    for k, quality in by_keep_k.items():
        place = {"xytext": (4, 6), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(f"{quality.mse:.3f}", (k, quality.mse), color=GREY, **place)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(by_keep_k), [str(k) for k in by_keep_k])
    axes.set(
        xlabel="keep_k, registers kept",
        ylabel="squared error of pixels in [-1, 1]",
        title=f"{len(batch.shapes)} crops never trained on",
        ylim=(0, 1.12 * max(errors)),
    )
    axes.margins(x=0.1)
    tidy(axes)
