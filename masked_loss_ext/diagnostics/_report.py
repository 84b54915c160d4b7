# SPDX-License-Identifier: BSD-3-Clause
"""What moved, by how much, and whether that is a leak; the report as a table."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ._batch import UNIGNORED

SAME, ROUNDING, NOISE, LEAK = "same", "rounding", "noise", "LEAK"
LOSS = "loss"  # the name of its Shift; those of gradients are names of entries and parameters
CLOSE = "close"  # as near as results of other shapes need be
BY_LABEL = "by label"  # the labels say what does not count: no leak
NOISE_FACTOR = 3  # a difference between two runs may well be thrice that between two others


class Shift(NamedTuple):
    """How far a loss or gradient is from what it should be."""

    name: str
    absolute: float  # largest difference of an entry (finite ones)
    relative: float  # to the largest entry of the tensor before
    nonfinite: int  # entries that became, or are no longer, NaN or inf
    verdict: str

    def __str__(self):
        if self.nonfinite:
            return f"{self.nonfinite} NaN/inf"
        if self.relative == float("inf"):
            return f"{self.absolute:.2g} (was 0)"
        if self.relative >= 10:
            return f"{self.absolute:.2g} ({self.relative:.2g}x)"
        return f"{self.absolute:.2g} ({100 * self.relative:.3g} %)"


@dataclass
class Change:
    """One run of the step with other content in the padding of ``entry``."""

    entry: str
    kind: str
    loss: Shift | None = None
    gradients: list | None = None  # Shift of each that is not the same; None: not compared
    padding: list | None = None  # Shift from 0 of each gradient in the padding; None: there is none
    error: str = ""

    def shifts(self):
        return [*filter(None, [self.loss]), *(self.gradients or ()), *(self.padding or ())]

    @property
    def verdict(self):
        if self.error:
            return BY_LABEL if self.kind == UNIGNORED else LEAK
        found = {s.verdict for s in self.shifts()}
        return next((v for v in (LEAK, BY_LABEL, NOISE, CLOSE, ROUNDING) if v in found), SAME)

    def by_label(self):
        """What moved here moved because labels say what counts: no leak."""

        def weaken(shift):
            return shift._replace(verdict=BY_LABEL) if shift.verdict == LEAK else shift

        self.loss = weaken(self.loss)
        self.gradients = self.gradients and [weaken(s) for s in self.gradients]
        self.padding = self.padding and [weaken(s) for s in self.padding]

    def cells(self):
        if self.error:
            return [self.entry, self.kind, f"raised {self.error}", "", "", self.verdict]
        loss = "same" if self.loss.verdict == SAME else str(self.loss)
        grads, inside = _worst(self.gradients, "same"), _worst(self.padding, "0")
        return [self.entry, self.kind, loss, grads, inside, self.verdict]


def _worst(shifts, nothing):
    if shifts is None:
        return "-"
    if not shifts:
        return nothing
    worst = max(shifts, key=lambda s: (s.verdict == LEAK, s.nonfinite, s.absolute))
    more = f", {len(shifts) - 1} more" if len(shifts) > 1 else ""
    return f"{worst.name}: {worst}{more}"


def distance(name, before, after, judge):
    """Shift from ``before`` to ``after``; either may be None, which counts as zeros."""
    if before is None and after is None:
        return Shift(name, 0.0, 0.0, 0, SAME)
    before = torch.zeros_like(after) if before is None else before
    after = torch.zeros_like(before) if after is None else after
    if torch.equal(before, after):
        return Shift(name, 0.0, 0.0, 0, SAME)
    dtype = before.dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    before, after = before.to(wide), after.to(wide)
    same = (before == after) | (before.isnan() & after.isnan())
    finite = before.isfinite() & after.isfinite()
    nonfinite = int((~finite & ~same).sum())
    absolute = _largest((after - before).abs()[finite])
    scale = _largest(before.abs()[before.isfinite()])
    relative = absolute / scale if scale else (float("inf") if absolute else 0.0)
    return Shift(
        name, absolute, relative, nonfinite, judge(name, dtype, absolute, scale, nonfinite)
    )


def _largest(values):
    return float(values.max()) if values.numel() else 0.0


class Tolerance:
    """Tells a leak from rounding and from the noise between runs of one batch."""

    def __init__(self, rtol, atol):
        self.rtol, self.atol = rtol, atol
        self.noise = {}  # name -> largest difference between runs of the unchanged batch
        self.smallest_scale = 0.0

    def set_gradients(self, gradients):
        """Some gradients are 0 but for rounding (that of attention's key bias), so one is judged
        beside its largest entry or a thousandth of the largest of all."""
        sizes = [_largest(g[g.isfinite()].abs()) for g in gradients if g is not None]
        self.smallest_scale = 1e-3 * max(sizes, default=0.0)

    def add_noise(self, shift):
        size = float("inf") if shift.nonfinite else shift.absolute
        self.noise[shift.name] = max(self.noise.get(shift.name, 0.0), size)

    def relative(self, dtype):
        if self.rtol is not None:
            return self.rtol
        return max(1e-6, torch.finfo(dtype).eps)

    def __call__(self, name, dtype, absolute, scale, nonfinite):
        noise = self.noise.get(name, 0.0)
        if nonfinite:
            return NOISE if noise == float("inf") else LEAK
        if absolute == 0:
            return SAME
        if name != LOSS:
            scale = max(scale, self.smallest_scale)
        if absolute <= self.atol + self.relative(dtype) * scale:
            return ROUNDING
        return NOISE if absolute <= NOISE_FACTOR * noise else LEAK


class PaddingLeak(AssertionError):
    """Raised by ``PaddingReport.raise_if_leaking``; its text is the report."""


HEAD = ["entry", "padding holds", "loss", "gradients", "gradient in padding", "verdict"]


@dataclass
class PaddingReport:
    """Result of ``check_padding``: true where nothing leaks, printed as a table.

    changes          a ``Change`` for each run: entry, kind, loss, gradients, padding, verdict
    notes            what was not checked, and what the findings may mean
    reproducible     whether runs of the unchanged batch agree in every bit
    """

    changes: list
    notes: list
    reproducible: bool
    kept: int
    total: int

    @property
    def leaks(self):
        """The changes that moved the loss or a gradient, or sent gradient into the padding."""
        return [change for change in self.changes if change.verdict == LEAK]

    def __bool__(self):
        return not self.leaks

    def raise_if_leaking(self):
        """Raise ``PaddingLeak`` (an AssertionError) with the table; else return the report."""
        if self.leaks:
            raise PaddingLeak(str(self))
        return self

    def __repr__(self):  # what pytest shows of ``assert check_padding(...)``
        if not self.leaks:
            return f"<PaddingReport: no leak in {len(self.changes)} runs>"
        names = ", ".join(dict.fromkeys(change.entry for change in self.leaks))
        return f"<PaddingReport: LEAK through {names}; print it for the table>"

    def __str__(self):
        verdict = "the step reads its padding" if self.leaks else "no leak found"
        lines = [
            f"check_padding: {verdict}. {len(self.leaks)} of {len(self.changes)} runs leak; the "
            f"mask keeps {self.kept} of {self.total} positions.",
            "",
            *_table([HEAD, *(change.cells() for change in self.changes)]),
        ]
        return "\n".join(lines + [""] * bool(self.notes) + [f"- {note}" for note in self.notes])


def _table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
