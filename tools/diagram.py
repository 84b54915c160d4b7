# SPDX-License-Identifier: BSD-3-Clause
"""The life of a call, for docs/how_it_works.md: boxes and arrows."""

from __future__ import annotations

from dataclasses import dataclass

INK, TEXT, BORDER = "#3d7ec7", "#757a80", "#8a8f96"
WIDE, HIGH = 720, 520


@dataclass(frozen=True)
class Box:
    x: int
    y: int
    wide: int
    title: str
    words: str  # below, smaller
    file: str = ""  # of the repository

    high = 58

    def svg(self) -> list[str]:
        middle = self.x + self.wide / 2
        lines = [(self.title, 20, 13, INK), (self.words, 36, 11, TEXT), (self.file, 51, 10, TEXT)]
        return [
            f'<rect x="{self.x}" y="{self.y}" width="{self.wide}" height="{self.high}" rx="6" '
            f'fill="none" stroke="{BORDER}"/>',
            *(
                f'<text x="{middle:g}" y="{self.y + down}" font-size="{size}" fill="{colour}" '
                f'text-anchor="middle">{text}</text>'
                for text, down, size, colour in lines
                if text
            ),
        ]


def arrow(x0: int, y0: int, x1: int, y1: int) -> str:
    return f'<path d="M{x0} {y0}L{x1} {y1}" stroke="{BORDER}" marker-end="url(#end)"/>'


CALL = Box(180, 8, 360, "masked_cross_entropy(logits, labels, mask)", "keywords by the "
           "operator's names; masks become bool", "ops/masked_cross_entropy.py")  # fmt: skip
WAYS = [
    Box(10, 104, 165, "torch.func", "jvp, vmap: plain PyTorch", "ops/_autograd.py"),
    Box(190, 104, 165, "torch.compile", "the operator, in the graph", "ops/_autograd.py"),
    Box(370, 104, 165, "eager, with gradient", "autograd.Function", "ops/_autograd.py"),
    Box(550, 104, 165, "no gradient", "straight to the operator", ""),
]
OPERATOR = Box(180, 200, 360, "torch.ops.masked_loss_ext.masked_cross_entropy", "PyTorch's "
               "dispatcher, by one schema", "csrc/schemas.cpp")  # fmt: skip
RUN = Box(180, 288, 360, "RowForward::run", "checks what it got, allocates, describes "
          "the rows: once for all devices", "csrc/cross_entropy/call.h")  # fmt: skip
CPU = Box(20, 384, 320, "CPU", "chunks to threads; AVX-512, AVX2 or neither; one read",
          "csrc/cross_entropy/cpu/")  # fmt: skip
CUDA = Box(380, 384, 320, "CUDA", "lanes, blocks or parts of a row; one read; no host wait",
           "csrc/cross_entropy/cuda/")  # fmt: skip
FORMULA = Box(180, 456, 360, "sums to loss, statistics, coefficients", "the same formula for both",
              "csrc/cross_entropy/formula.h")  # fmt: skip


def life() -> str:
    boxes = [CALL, *WAYS, OPERATOR, RUN, CPU, CUDA, FORMULA]
    arrows = [arrow(360, 66, way.x + way.wide // 2, way.y - 2) for way in WAYS]
    arrows += [arrow(way.x + way.wide // 2, 162, 360, 198) for way in WAYS]
    arrows += [arrow(360, 258, 360, 286), arrow(360, 346, 180, 382), arrow(360, 346, 540, 382)]
    arrows += [arrow(180, 442, 250, 454), arrow(540, 442, 470, 454)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {HIGH}" '
            'font-family="sans-serif">',
            '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{BORDER}"/></marker>'
            "</defs>",
            *arrows,
            *(line for box in boxes for line in box.svg()),
            "</svg>",
            "",
        ]
    )
