# SPDX-License-Identifier: BSD-3-Clause
"""The runs of check_padding: unchanged, with other content in the padding, and without padding."""

import torch

from . import _notes
from ._batch import INF, NAN, OTHER, RANDOM, UNIGNORED, changed, is_floating, kinds_of
from ._report import (
    CLOSE,
    LEAK,
    LOSS,
    ROUNDING,
    SAME,
    Change,
    PaddingReport,
    Tolerance,
    distance,
)
from ._trim import cut_padding

REPETITIONS = 3  # of a step that is not reproducible, to see how far its runs differ


class Check:
    def __init__(self, entries, runner, tolerance, *, nonfinite, ignore_index):
        self.entries, self.runner, self.tolerance = entries, runner, tolerance
        self.drop = ~entries.keep
        self.ignore_index = ignore_index
        self.generator = torch.Generator().manual_seed(0)  # its own: no other one moves
        self.kinds = {
            name: kinds_of(
                entries.tensors[name], self.drop, nonfinite=nonfinite, ignore_index=ignore_index
            )
            for name in entries.checked
        }
        if not any(self.kinds.values()):
            raise ValueError(
                "check_padding: batch must hold an entry whose padding can be changed, got one "
                f"single value throughout in each of {entries.checked}"
            )
        self.changes, self.notes = [], _notes.of_entries(entries, self.kinds)

    # --- the batch as it is ------------------------------------------------------------------

    def run_unchanged(self):
        """The run that the others are compared with, twice."""
        self.before = self._run_with_leaves()
        self.tolerance.set_gradients(self.before.gradients.values())
        if not self.before.differentiated:
            self.notes.append(_notes.loss_only(self.runner))
        for _ in range(REPETITIONS):
            again = self.runner({})
            shifts = [self._loss_shift(again), *(self._gradient_shifts(again) or ())]
            for shift in shifts:
                self.tolerance.add_noise(shift)
            if all(shift.verdict == SAME for shift in shifts):
                break
        self.reproducible = not any(self.tolerance.noise.values())
        if not self.reproducible:
            self.notes.append(_notes.not_reproducible(self.tolerance.noise))
        if self.runner.step_updates_parameters:
            self.notes.append(_notes.UPDATES)
        self._add("batch", "as given", self.before)

    def _run_with_leaves(self):
        """Every floating entry is differentiated by, where the step allows it."""
        asked = {name for name, t in self.entries.tensors.items() if t.requires_grad}
        floating = {n for n in self.entries.checked if is_floating(self.entries.tensors[n])}
        self.runner.leaves = asked | floating
        if floating <= asked:
            return self.runner({})
        try:
            return self.runner({})
        except Exception:  # in-place on a leaf, or an operator without that derivative
            self.runner.leaves = asked
        before = self.runner({})
        self.notes.append(_notes.not_leaves(floating - asked))
        return before

    # --- other content in the padding ----------------------------------------------------------

    def run_changed(self):
        for name, kinds in self.kinds.items():
            for kind in kinds:
                self._run(name, kind, {name: kind})
        plain = {n: k[0] for n, k in self.kinds.items() if k and k[0] != UNIGNORED}
        if len(plain) > 1:
            floating = [name for name, kind in plain.items() if kind == RANDOM]
            available = {kind for kinds in self.kinds.values() for kind in kinds}
            self._run("all at once", RANDOM if floating else OTHER, plain)
            for kind in (NAN, INF):
                if kind in available:
                    self._run("all at once", kind, plain | dict.fromkeys(floating, kind))
        if not self.before.loss.isfinite() and not any(c.verdict == LEAK for c in self.changes):
            raise ValueError(
                "check_padding: step must return a finite loss, got "
                f"{self.before.loss.item()} whatever stands in the padding: nothing to compare"
            )

    def _run(self, label, kind, plan):
        tensors = {
            name: changed(
                self.entries.tensors[name], self.drop, k, self.generator, self.ignore_index
            )
            for name, k in plan.items()
        }
        try:
            after = self.runner(tensors)
        except Exception as error:  # the step looked at the padding, and did not like it
            self.changes.append(Change(label, kind, error=_notes.first_line(error)))
        else:
            self._add(label, kind, after)

    def _add(self, label, kind, after):
        change = Change(label, kind, self._loss_shift(after), self._gradient_shifts(after))
        change.padding = self._padding_shifts(after)
        if kind == UNIGNORED:
            change.by_label()
        self.changes.append(change)

    # --- without padding -------------------------------------------------------------------------

    def run_trimmed(self):
        """The loss of one row, padded and cut to its length."""
        if self.before.drew_random_numbers:
            self.notes.append(
                _notes.not_trimmed(
                    "the step draws random numbers (dropout?), and how many depends on the shape"
                )
            )
            return
        cut, reason = cut_padding(self.entries, self.ignore_index)
        if cut is None:
            self.notes.append(_notes.not_trimmed(reason))
            return
        try:
            padded, alone = self.runner(cut.padded), self.runner(cut.alone)
        except Exception as error:
            self.notes.append(_notes.not_trimmed(f"the step raised {_notes.first_line(error)}"))
            return
        if not padded.loss.isfinite():
            self.notes.append(_notes.not_trimmed(f"the loss of {cut.row} is not finite"))
            return
        # Other shapes, other kernels: no bits are expected, but a factor of 1 - share would show.
        judge = Tolerance(min(0.01, cut.share / 4), self.tolerance.atol)
        judge.noise = self.tolerance.noise
        shift = distance(LOSS, padded.loss, alone.loss, judge)
        if shift.verdict == ROUNDING:
            shift = shift._replace(verdict=CLOSE)
        self.changes.append(Change(cut.row, f"none: cut to {cut.length}", shift))

    # --- comparisons -----------------------------------------------------------------------------

    def _loss_shift(self, after):
        return distance(LOSS, self.before.loss, after.loss, self.tolerance)

    def _gradient_shifts(self, after):
        """Of each gradient, at kept positions."""
        if not self.before.differentiated:
            return None
        shifts = []
        for name, gradient in self.before.gradients.items():
            pair = [
                self._inside(name, g, self.entries.keep)
                for g in (gradient, after.gradients.get(name))
            ]
            shifts.append(distance(name, *pair, self.tolerance))
        return [shift for shift in shifts if shift.verdict != SAME]

    def _padding_shifts(self, after):
        """Of each gradient in the padding, from 0."""
        if not self.runner.leaves.intersection(self.entries.checked, self.before.gradients):
            return None
        shifts = []
        for name in self.entries.checked:
            inside = self._inside(name, after.gradients.get(name), self.drop)
            if inside is None or not inside.any():
                continue
            kept = self._inside(name, self.before.gradients.get(name), self.entries.keep)
            shifts.append(self._from_zero(name, inside, kept))
        return shifts

    def _from_zero(self, name, inside, kept):
        shift = distance(name, None, inside, lambda *_: LEAK)
        scale = 0.0
        if kept is not None and kept.numel():
            scale = float(kept.abs().nan_to_num(0.0, 0.0, 0.0).max())
        allowed = self.tolerance.atol + self.tolerance.relative(inside.dtype) * scale
        small = not shift.nonfinite and shift.absolute <= allowed
        relative = shift.absolute / scale if scale else float("inf")
        return shift._replace(relative=relative, verdict=ROUNDING if small else LEAK)

    def _inside(self, name, gradient, where):
        if gradient is None or name not in self.entries.checked:
            return gradient
        return gradient[where.to(gradient.device)]

    def report(self):
        return PaddingReport(
            changes=self.changes,
            notes=self.notes + _notes.of_findings(self.changes, self.entries, self.drop),
            reproducible=self.reproducible,
            kept=int(self.entries.keep.sum()),
            total=self.entries.keep.numel(),
        )
