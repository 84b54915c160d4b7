# SPDX-License-Identifier: BSD-3-Clause
"""The pictures of the act, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

from ..common.cost import OURS, Cost
from ..common.plots import GREY, HELD_OUT, INK, TRAIN, draw_training_loss, save, tidy
from .data import END, Batch
from .head import HeadRun
from .training import History

MOST_BITS = 8.0  # end of the colour scale: a byte of which nothing is known
LINES, COLUMNS = 16, 72  # of the function that is shown letter by letter


def plot_losses(masked: History, counted: History, path: Path) -> None:
    """Left: what each run reports while it trains. Right: held-out texts, the truth beside it."""
    figure, (train, held_out) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    runs = (("padding masked", masked, TRAIN), ("padding counted", counted, HELD_OUT))
    for name, run, color in runs:
        draw_training_loss(train, run.train, name, color)
        at, true, reported = zip(*run.held_out, strict=True)
        held_out.plot(at, true, "o-", color=color, linewidth=2, markersize=4, label=name)
        note = {"xytext": (0, 6), "textcoords": "offset points", "ha": "right", "color": color}
        if run is counted:
            label = f"{name}, as it reports"
            held_out.plot(at, reported, "o--", color=color, markersize=3, label=label)
            held_out.annotate(f"{reported[-1]:.2f}", (at[-1], reported[-1]), **note)
        else:
            held_out.annotate(f"{true[-1]:.2f}", (at[-1], true[-1]), **note)
    train.set(xlabel="step", ylabel="bits per byte", title="Training loss as reported, t+1")
    held_out.set(xlabel="step", ylabel="bits per byte", title="Held-out functions, t+1")
    for axes in (train, held_out):
        axes.set_ylim(0, None)
        axes.legend(frameon=False, fontsize=9)
    tidy(train, held_out)
    save(figure, path)


def plot_costs(costs: Sequence[Cost], path: Path) -> None:
    """A row per vocabulary: time and peak memory of the loss alone."""
    figure, grid = plt.subplots(
        len(costs), 2, figsize=(10.5, 1.9 * len(costs)), layout="constrained", squeeze=False
    )
    for cost, (time, memory) in zip(costs, grid, strict=True):
        names = list(cost.step_us)[::-1]
        colors = [TRAIN if name.startswith("masked_loss_ext") else GREY for name in names]
        draw_bars(time, names, [cost.step_us[n] / 1000 for n in names], colors, "ms")
        time.set_title(f"{cost.shape[-1]} classes: forward + backward of the loss", fontsize=10)
        memory.set_title("peak memory, gradients included", fontsize=10)
        if cost.peak_bytes is None:
            memory.set_axis_off()
            continue
        draw_bars(memory, names, [cost.peak_bytes[n] / 2**20 for n in names], colors, "MiB")
        memory.set_yticklabels([])
    save(figure, path)


def plot_heads(run: HeadRun, path: Path) -> None:
    """The losses, which lie on one another, and what a step takes by each form."""
    cost = run.cost
    figure, (losses, time, memory) = plt.subplots(1, 3, figsize=(13, 3.2), layout="constrained")
    shown = {name: "without logits" if name == OURS else name for name in cost.step_us}
    styles = zip(shown, (TRAIN, INK, HELD_OUT), ("-", "--", ":"), (4, 2, 2), strict=True)
    for name, color, style, width in styles:
        steps = range(1, len(run.losses[name]) + 1)
        line = {"color": color, "linestyle": style, "linewidth": width}
        losses.plot(steps, run.losses[name], label=shown[name], **line)
    losses.set(xlabel="step", ylabel="nats per word", title="Training loss")
    losses.legend(frameon=False, fontsize=8)
    tidy(losses)
    names = list(shown)[::-1]
    labels = [shown[name].replace(", ", ",\n") for name in names]
    colors = [TRAIN if name.startswith(OURS) else GREY for name in names]
    draw_bars(time, labels, [cost.step_us[n] / 1000 for n in names], colors, "ms")
    time.set_title(f"{cost.shape[-1]} classes: a training step", fontsize=10)
    memory.set_title("peak memory, gradients included", fontsize=10)
    if cost.peak_bytes is None:
        memory.set_axis_off()
    else:
        draw_bars(memory, labels, [cost.peak_bytes[n] / 2**20 for n in names], colors, "MiB")
        memory.set_yticklabels([])
    save(figure, path)


def draw_bars(
    axes: plt.Axes, names: Sequence[str], values: Sequence[float], colors: Sequence[str], unit: str
) -> None:
    bars = axes.barh(names, values, color=colors, height=0.65)
    axes.bar_label(bars, [f"{value:.1f} {unit}" for value in values], padding=3, fontsize=9)
    axes.margins(x=0.18)
    tidy(axes)
    axes.tick_params(labelsize=9)


def plot_bits(batch: Batch, bits: Tensor, path: Path) -> None:
    """Left: a whole batch, padding grey. Right: the start of one function, letter by letter.

    bits [B, S]: what the byte at each position cost the model; 0 at the first one and in padding.
    """
    mask, tokens = batch.attention_mask.cpu(), batch.tokens.cpu()
    figure, (whole, text) = plt.subplots(
        1, 2, figsize=(13, 4.6), layout="constrained", width_ratios=(1.0, 1.5)
    )
    colors = plt.get_cmap("YlOrRd").copy()
    colors.set_bad("#dddddd")
    shown = np.ma.masked_array(bits.cpu().numpy(), ~mask.numpy())
    drawn = whole.imshow(
        shown, cmap=colors, vmin=0, vmax=MOST_BITS, aspect="auto", interpolation="nearest"
    )
    whole.set(xlabel="byte", ylabel="function", title="A held-out batch; grey: padding")
    figure.colorbar(drawn, ax=whole, label="bits per byte")
    lengths = mask.sum(1)
    row = int((lengths - LINES * COLUMNS // 3).abs().argmin())
    draw_text(text, tokens[row, : lengths[row]].tolist(), bits[row].tolist(), colors)
    text.set_title("One of them: what each letter cost")
    save(figure, path)


def draw_text(
    axes: plt.Axes, text: Sequence[int], bits: Sequence[float], colors: plt.Colormap
) -> None:
    line = column = 0
    for byte, cost in zip(text, bits, strict=False):
        if line < LINES and column < COLUMNS and byte != END:
            shade = colors(cost / MOST_BITS)
            axes.add_patch(plt.Rectangle((column, -line), 1, 1, facecolor=shade, linewidth=0))
            letter = chr(byte) if 32 < byte < 127 else " "
            style = {"family": "monospace", "fontsize": 8, "color": INK, "parse_math": False}
            axes.text(column + 0.5, 0.45 - line, letter, ha="center", va="center", **style)
        line, column = (line + 1, 0) if byte == ord("\n") else (line, column + 1)
    axes.set(xlim=(0, COLUMNS), ylim=(1 - LINES, 1))
    axes.set_axis_off()
