# SPDX-License-Identifier: BSD-3-Clause
"""The pictures of the demo, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor

from ..common.plots import GREY, HELD_OUT, INK, draw_training_loss, save, tidy
from .quality import Reconstruction

if TYPE_CHECKING:
    from .act import History

SHOWN = 4  # crops in the picture of reconstructions


def plot_training(history: History, noisy_psnr: float, path: Path) -> None:
    """Left: loss of training and of held-out crops. Right: PSNR of held-out crops."""
    figure, (losses, quality) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    at, held_out, psnr = zip(*history.held_out, strict=True)
    draw_training_loss(losses, history.train)
    losses.plot(at, held_out, "o-", color=HELD_OUT, linewidth=2, markersize=4, label="held out")
    losses.set(xlabel="step", ylabel="AttentionMaskMseLoss", title="Loss", ylim=(0, None))
    losses.legend(frameon=False)
    quality.plot(at, psnr, "o-", color=HELD_OUT, linewidth=2, markersize=4, label="denoised")
    for value, name, colour in ((psnr[0], "Wiener filter", GREY), (noisy_psnr, "noisy", INK)):
        quality.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=name)
    for value in (psnr[-1], psnr[0], noisy_psnr):
        put = {"xy": (at[-1], value), "xytext": (0, 5), "textcoords": "offset points"}
        quality.annotate(f"{value:.1f}", ha="right", **put)
    quality.set(xlabel="step", ylabel="PSNR in dB", title="Held-out crops")
    quality.margins(y=0.12)
    quality.legend(frameon=False, loc="center right")
    tidy(losses, quality)
    save(figure, path)


def choose(rows: Sequence[Reconstruction]) -> list[Reconstruction]:
    """Those with most to see, by the original alone, in turn from each photograph."""
    ranked = sorted(rows, key=Reconstruction.detail, reverse=True)
    photos = sorted({row.photo for row in rows})
    by_photo = [[row for row in ranked if row.photo == photo] for photo in photos]
    turns = [row for turn in zip_longest(*by_photo) for row in turn if row is not None]
    return sorted(turns[:SHOWN], key=lambda row: row.photo)


def plot_reconstructions(rows: Sequence[Reconstruction], path: Path) -> None:
    """A column per crop, all at one scale: noisy, denoised, original."""
    chosen = choose(rows)
    widths = [row.clean.shape[2] for row in chosen]
    height = max(row.clean.shape[1] for row in chosen)
    inches = 1.0 / 48  # per pixel of a crop
    figure, grid = plt.subplots(
        3,
        len(chosen),
        squeeze=False,
        figsize=(sum(widths) * inches + 0.4, 3 * (height * inches + 0.4)),
        width_ratios=widths,
        layout="constrained",
    )
    for column, row in zip(grid.T, chosen, strict=True):
        show(column[0], row.noisy, f"noisy {row.psnr(row.noisy):.1f} dB")
        show(column[1], row.denoised, f"denoised {row.psnr(row.denoised):.1f} dB")
        show(column[2], row.clean, f"original {size_text(row.clean)}")
        top, left, box_height, box_width = row.box
        column[0].add_patch(
            Rectangle((left - 0.5, top - 0.5), box_width, box_height, fill=False, color="white")
        )
    figure.suptitle("Regions never trained on; in the white frame the noise is stronger")
    save(figure, path)


def size_text(image: Tensor) -> str:
    return f"{image.shape[2]} x {image.shape[1]}"


def show(axes: plt.Axes, image: Tensor, title: str) -> None:
    """image [3, H, W] in [-1, 1]; the axes hug it."""
    axes.imshow(((image + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
