# SPDX-License-Identifier: BSD-3-Clause
"""What moved, by how much, whether that is a leak and what it suggests; the report as a table."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ._batch import INF, NAN, OTHER, UNIGNORED, inside, largest

SAME, ROUNDING, NOISE, LEAK = "same", "rounding", "noise", "LEAK"
CLOSE = "close"  # as near as results of other shapes need be
BY_LABEL = "by label"  # the labels say what does not count: no leak
LOSS = "loss"  # the name of its Shift; those of gradients are names of entries and parameters
CUT = "none"  # what the padding holds where it is cut off
NOISE_FACTOR = 3  # a difference between two runs may well be thrice that between two others
HEAD = ["entry", "padding holds", "loss", "gradients", "gradient in padding", "verdict"]


class Shift(NamedTuple):
    """How far a loss or gradient is from what it should be."""

    name: str
    absolute: float  # largest difference of an entry (finite ones)
    relative: float  # to the largest entry of the tensor before
    nonfinite: int  # entries that became, or are no longer, NaN or inf
    verdict: str

    def __str__(self) -> str:
        if self.nonfinite:
            return f"{self.nonfinite} NaN/inf"
        if self.relative == float("inf"):
            return f"{self.absolute:.2g} (was 0)"
        if self.relative >= 10:
            return f"{self.absolute:.2g} ({self.relative:.2g}x)"
        return f"{self.absolute:.2g} ({100 * self.relative:.3g} %)"


class Tolerance:
    """Tells a leak from rounding and from the noise between runs of one batch."""

    def __init__(self, rtol, atol):
        self.rtol, self.atol = rtol, atol
        self.noise = {}  # name -> largest difference between equal runs
        self.smallest_scale = 0.0

    def set_gradients(self, gradients):
        """Some gradients are 0 but for rounding (that of attention's key bias), so one is judged
        beside its largest entry or a thousandth of the largest of all."""
        sizes = [largest(gradient) for gradient in gradients if gradient is not None]
        self.smallest_scale = 1e-3 * max(sizes, default=0.0)

    def add_noise(self, shift):
        size = float("inf") if shift.nonfinite else shift.absolute
        self.noise[shift.name] = max(self.noise.get(shift.name, 0.0), size)

    def shift(self, name, before, after):
        """From ``before`` to ``after``; None counts as zeros."""
        if before is None and after is None:
            return Shift(name, 0.0, 0.0, 0, SAME)
        before = torch.zeros_like(after) if before is None else before
        after = torch.zeros_like(before) if after is None else after
        same = (before == after) | (before.isnan() & after.isnan())
        if same.all():
            return Shift(name, 0.0, 0.0, 0, SAME)
        wide = torch.complex128 if before.is_complex() else torch.float64
        moved = after.to(wide) - before.to(wide)
        nonfinite = int((~moved.isfinite() & ~same).sum())
        absolute, scale, noise = largest(moved), largest(before), self.noise.get(name, 0.0)
        least = 0.0 if name == LOSS else self.smallest_scale
        if nonfinite:
            verdict = NOISE if noise == float("inf") else LEAK
        elif absolute <= self._allowed(before, max(scale, least)):
            verdict = ROUNDING
        else:
            verdict = NOISE if absolute <= NOISE_FACTOR * noise else LEAK
        return Shift(name, absolute, _ratio(absolute, scale), nonfinite, verdict)

    def from_zero(self, name, padding, kept):
        """Of a gradient in the padding; rounding is judged beside that at kept positions."""
        absolute, scale = largest(padding), 0.0 if kept is None else largest(kept)
        nonfinite = int((~padding.isfinite()).sum())
        small = not nonfinite and absolute <= self._allowed(padding, scale)
        verdict = ROUNDING if small else LEAK
        return Shift(name, absolute, _ratio(absolute, scale), nonfinite, verdict)

    def _allowed(self, tensor, scale):
        rtol = max(1e-6, torch.finfo(tensor.dtype).eps) if self.rtol is None else self.rtol
        return self.atol + rtol * scale


def _ratio(absolute, scale):
    return absolute / scale if scale else float("inf") * absolute if absolute else 0.0


@dataclass
class Change:
    """One run of the step with other content in the padding of ``entry``."""

    entry: str
    kind: str
    loss: Shift | None = None
    gradients: list[Shift] | None = None  # of those that are not the same; None: not compared
    padding: list[Shift] | None = None  # from 0, of gradients in the padding; None: there is none
    error: str = ""

    @property
    def verdict(self) -> str:
        shifts = [*filter(None, [self.loss]), *(self.gradients or ()), *(self.padding or ())]
        found = {LEAK} if self.error else {shift.verdict for shift in shifts}
        worst = next((v for v in (LEAK, NOISE, CLOSE, ROUNDING) if v in found), SAME)
        return BY_LABEL if worst == LEAK and self.kind == UNIGNORED else worst

    def cells(self) -> list[str]:
        """Its line of the table."""
        if self.error or self.loss is None:
            return [self.entry, self.kind, f"raised {self.error}", "", "", self.verdict]
        loss = "same" if self.loss.verdict == SAME else str(self.loss)
        grads, padding = _worst(self.gradients, "same"), _worst(self.padding, "0")
        return [self.entry, self.kind, loss, grads, padding, self.verdict]


def _worst(shifts, nothing):
    if not shifts:
        return "-" if shifts is None else nothing
    worst = max(shifts, key=lambda s: (s.verdict == LEAK, s.nonfinite, s.absolute))
    more = f", {len(shifts) - 1} more" if len(shifts) > 1 else ""
    return f"{worst.name}: {worst}{more}"


class PaddingLeak(AssertionError):
    """Raised by ``PaddingReport.raise_if_leaking``; its text is the report."""


@dataclass
class PaddingReport:
    """Result of ``check_padding``: true where nothing leaks, printed as a table.

    changes          a ``Change`` for each run: entry, kind, loss, gradients, padding, verdict
    notes            what was not checked, and what the findings may mean
    reproducible     whether runs of the unchanged batch agree in every bit
    """

    changes: list[Change]
    notes: list[str]
    reproducible: bool
    kept: int
    total: int

    @property
    def leaks(self) -> list[Change]:
        """The changes that moved the loss or a gradient, or sent gradient into the padding."""
        return [change for change in self.changes if change.verdict == LEAK]

    def __bool__(self) -> bool:
        return not self.leaks

    def raise_if_leaking(self) -> "PaddingReport":
        """Raise ``PaddingLeak`` (an AssertionError) with the table; else return the report."""
        if self.leaks:
            raise PaddingLeak(str(self))
        return self

    def __repr__(self) -> str:  # what pytest shows of ``assert check_padding(...)``
        if not self.leaks:
            return f"<PaddingReport: no leak in {len(self.changes)} runs>"
        names = ", ".join(dict.fromkeys(change.entry for change in self.leaks))
        return f"<PaddingReport: LEAK through {names}; print it for the table>"

    def __str__(self) -> str:
        verdict = "the step reads its padding" if self.leaks else "no leak found"
        rows = [HEAD, *(change.cells() for change in self.changes)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        lines = [
            f"check_padding: {verdict}. {len(self.leaks)} of {len(self.changes)} runs leak; the "
            f"mask keeps {self.kept} of {self.total} positions.",
            "",
        ]
        for row in rows:
            lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
        return "\n".join(lines + [""] * bool(self.notes) + [f"- {note}" for note in self.notes])


def suggestions(changes, entries):
    """What the pattern of leaks suggests."""
    leaks = [change for change in changes if change.verdict == LEAK]
    kept_still = all(c.loss and c.loss.verdict == SAME and not c.gradients for c in leaks)
    only_nonfinite = all(change.kind in (NAN, INF) for change in leaks)
    if leaks and only_nonfinite and kept_still:
        yield (
            "nothing kept has moved, but NaN or inf in the padding comes back as NaN in its "
            "gradient, and goes on to whatever computed the padding: a backward multiplies by 0 "
            "(torch.where on a result, F.cross_entropy with ignore_index). If such values cannot "
            "occur there: nonfinite=False."
        )
    elif leaks and only_nonfinite:
        yield (
            "only NaN and inf leak: the padding is multiplied by 0 (0 * NaN = NaN), not left out. "
            "If a loss or a pooling does that, torch.where on its inputs mends it. Every weight's "
            "gradient and PyTorch's attention do it too: for a model of floating inputs, "
            "nonfinite=False."
        )
    elif leaks and kept_still:
        yield "nothing kept has moved, but the step sends gradient into the padding."
    if any(change.kind.startswith(CUT) for change in leaks):
        yield (
            "the loss depends on how much padding there is: a mean over B * T, or positions that "
            "count the padding?"
        )
    by_label = [change.entry for change in changes if change.verdict == BY_LABEL]
    if by_label:
        yield (
            f"{', '.join(by_label)}: here the labels themselves exclude the padding, not the mask. "
            "That is no leak."
        )
    # Of a step that finds its padding by value the loss does not know how much there is. Only of
    # it: whoever forgets the mask must not be told how to silence this.
    if any(c.kind.startswith(CUT) and c.loss and c.loss.relative < 1e-5 for c in changes):
        for name in dict.fromkeys(c.entry for c in leaks if c.kind == OTHER):
            if name in entries.tensors:
                yield from _own_padding_value(name, entries)


def _own_padding_value(name, entries):
    tensor = entries.tensors[name]
    values = inside(tensor, ~entries.keep).unique()
    if values.numel() == 1 and not (inside(tensor, entries.keep) == values).any():
        value = int(values)
        yield (
            f"{name} holds {value} in the padding and nowhere else: if the step itself leaves "
            f"out what holds {value}, this is no leak: ignore_index={value}."
        )
