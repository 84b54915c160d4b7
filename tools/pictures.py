# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.pictures`` draws the attention masks of docs/guide/block_masks.md and the life
of a call of docs/how_it_works.md into docs/pictures; ``--check`` compares.

A picture is text (SVG) of colours that can be read on white and on black.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

import masked_loss_ext as mle
from masked_loss_ext.attention.interval_mask import IntervalMask

from . import diagram

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
SIDE, GAP, STRIP, HEAD = 168, 24, 6, 22  # pixels: of a mask, between two, of the strip, of a title
PER_LINE = 4
INK, TEXT, GRID = "#3d7ec7", "#757a80", "#8a8f9640"
KINDS = {"patch": "#3d7ec7", "register": "#2f9e6e", "dropped": "#d1603d", "padding": "#8a8f96"}


@dataclass(frozen=True)
class Picture:
    title: str
    mask: IntervalMask
    kinds: Sequence[str] = ()  # of the tokens, a strip beside the mask

    def svg(self, left: int, top: int) -> list[str]:
        dense = self.mask.dense()
        dense = dense.reshape(dense.shape[-2:])  # one mask, with a batch dimension or without
        rows, columns = dense.shape
        cell = SIDE / max(rows, columns)
        wide, high = columns * cell, rows * cell
        lines = [
            f'<g transform="translate({left},{top})">',
            f'<text x="0" y="-7" fill="{TEXT}">{self.title}</text>',
            f'<path d="M0 0h{wide:g}v{high:g}h{-wide:g}z" fill="none" stroke="{GRID}"/>',
            f'<path d="{"".join(_runs(dense, cell))}" fill="{INK}"/>',
        ]
        top = 0.0
        for kind, run in groupby(self.kinds):
            high = len(list(run)) * cell
            where = f'x="{-STRIP - 2}" y="{top:.4g}" width="{STRIP}" height="{high:.4g}"'
            lines.append(f'<rect {where} fill="{KINDS[kind]}"/>')
            top += high
        return [*lines, "</g>"]


def _runs(dense: torch.Tensor, cell: float) -> list[str]:
    """A rectangle for each run of keys that queries below each other see."""
    found, top = [], 0
    for row, same in groupby(dense.tolist()):
        high, at = len(list(same)), 0
        for on, run in groupby(row):
            wide = len(list(run))
            if on:
                x, y, w, h = (f"{n * cell:.5g}" for n in (at, top, wide, high))
                found.append(f"M{x} {y}h{w}v{h}h-{w}z")
            at += wide
        top += high
    return found


def sheet(pictures: Sequence[Picture], legend: Sequence[str] = ()) -> str:
    columns = min(PER_LINE, len(pictures))
    lines = -(-len(pictures) // columns)
    wide = columns * (SIDE + GAP) + GAP
    high = lines * (SIDE + HEAD + GAP) + (20 if legend else 0)
    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        'font-family="sans-serif" font-size="12" shape-rendering="crispEdges">'
    ]
    for i, picture in enumerate(pictures):
        left = GAP + (i % columns) * (SIDE + GAP)
        top = HEAD + (i // columns) * (SIDE + HEAD + GAP)
        text += picture.svg(left, top)
    for i, kind in enumerate(legend):
        at = GAP + 110 * i
        text.append(f'<rect x="{at}" y="{high - 18}" width="10" height="10" fill="{KINDS[kind]}"/>')
        text.append(f'<text x="{at + 15}" y="{high - 9}" fill="{TEXT}">{kind}</text>')
    return "\n".join([*text, "</svg>"]) + "\n"


def nested_dropout() -> str:
    """Two images of 12 and 8 patches, 8 registers each, of which 3 and 6 stay."""
    lengths, keep_k = [[12, 8], [8, 8]], [3, 6]
    layout = mle.PackedLayout(lengths, keep_k, max_seq_len=40)
    kinds = []
    for (patches, registers), kept in zip(lengths, keep_k, strict=True):
        kinds += ["patch"] * patches + ["register"] * kept + ["dropped"] * (registers - kept)
    kinds += ["padding"] * (40 - len(kinds))
    pictures = [
        Picture(f"mode {mode!r}".replace("'", "&quot;"), layout.intervals(mode), kinds)
        for mode in ("full", "causal", "causal_last")
    ]
    short = layout.compact()
    left = [kind for kind in kinds if kind in ("patch", "register")]
    picture = Picture("full, after compact()", short.layout.intervals("full"), left)
    return sheet([*pictures, picture], list(KINDS))


def sources() -> str:
    rows = mle.RowIntervals
    documents = rows.from_document_ids(torch.tensor([0] * 14 + [1] * 8 + [2] * 10))
    window, sinks = rows.sliding_window(32, (6, 0)), rows.sinks(32, 3)
    return sheet(
        [
            Picture("documents &amp; causal", documents & rows.causal(32)),
            Picture("sliding_window (6, 0)", window),
            Picture("causal &amp; (window | sinks)", rows.causal(32) & (window | sinks)),
            Picture("prefix_lm", rows.prefix_lm(32, 10)),
            Picture("from_padding, left", rows.from_padding([22], 32, side="left")),
            Picture("shared_prefix", rows.shared_prefix(10, [6, 9, 7])),
            Picture("cross", rows.cross([8, 14, 10], [10, 10, 12], [4, 10, 7])),
            Picture("block_diffusion", rows.block_diffusion(16, 4)),
        ]
    )


PICTURES = {
    "nested_dropout": nested_dropout,
    "row_intervals": sources,
    "life_of_a_call": diagram.life,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.pictures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if they differ")
    options = parser.parse_args(arguments)
    for name, made in PICTURES.items():
        path, text = FOLDER / f"{name}.svg", made()
        if not options.check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            sys.exit(
                f"docs/pictures/{name}.svg is not what is drawn; run `python -m tools.pictures`"
            )


if __name__ == "__main__":
    main()
