# SPDX-License-Identifier: BSD-3-Clause
"""The picture of the act, as a PNG file."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from ..common.plots import GREY, HELD_OUT, INK, save, tidy
from .data import Batch
from .measure import FlatErrors, Quality, reconstruct
from .model import Tokenizer

SHOWN = 6  # crops
SHOWN_KEEP_K = (1, 4, 16, 64)


def plot_reconstructions(
    model: Tokenizer, batch: Batch, by_keep_k: dict[int, Quality], flat: FlatErrors, path: Path
) -> None:
    """Left: a column per crop, original above, then from 1, 4, 16, 64 registers. Right: error."""
    rows = {"original": batch.images(batch.patches)}
    for k in SHOWN_KEEP_K:
        name = f"keep_k = {k}\n{k * model.code} numbers\nerror {by_keep_k[k].mse:.3f}"
        rows[name] = reconstruct(model, batch, k)
    chosen = choose(rows["original"])
    figure = plt.figure(figsize=(14, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.7, 1.0))
    left.suptitle("An image through its first registers: the more are kept, the sharper")
    grid = left.subplots(len(rows), len(chosen), squeeze=False)
    for cells, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, i in zip(cells, chosen, strict=True):
            image = ((images[i] + 1) / 2).permute(1, 2, 0).numpy()
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        place = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 10}
        cells[0].set_ylabel(name, color=INK, **place)
    draw_error(right.subplots(), batch, by_keep_k, flat)
    save(figure, path)


def choose(originals: list[Tensor]) -> list[int]:
    """By the originals alone: of the half with most to see (the steps between neighbours, summed),
    those spread evenly from the bluest to the reddest."""
    detail = [sum(x.diff(dim=axis).abs().sum().item() for axis in (1, 2)) for x in originals]
    busy = np.argsort(detail)[len(originals) // 2 :].tolist()
    busy.sort(key=lambda i: (originals[i][0] - originals[i][2]).mean().item())
    places = np.linspace(0, len(busy) - 1, min(SHOWN, len(busy))).round().astype(int)
    return [busy[place] for place in places]


def draw_error(
    axes: plt.Axes, batch: Batch, by_keep_k: dict[int, Quality], flat: FlatErrors
) -> None:
    errors = [quality.mse for quality in by_keep_k.values()]
    axes.plot(list(by_keep_k), errors, "o-", color=HELD_OUT, linewidth=2, markersize=5)
    for k, quality in by_keep_k.items():
        place = {"xytext": (4, 6), "textcoords": "offset points", "fontsize": 9}
        axes.annotate(f"{quality.mse:.3f}", (k, quality.mse), color=INK, **place)
    lines = {"grey image": flat.grey, "each crop's mean colour": flat.mean_colour}
    for name, error in lines.items():
        axes.axhline(error, color=GREY, linestyle="--", linewidth=1)
        above = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": 9, "ha": "right"}
        axes.annotate(f"{name}: {error:.3f}", (max(by_keep_k), error), color=GREY, **above)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(by_keep_k), [str(k) for k in by_keep_k])
    axes.set(
        xlabel="keep_k, registers kept",
        ylabel="squared error of pixels in [-1, 1]",
        title=f"Error, mean of {len(batch.shapes)} crops never trained on",
        ylim=(0, 1.12 * max(*errors, flat.grey)),
    )
    axes.margins(x=0.1)
    tidy(axes)
