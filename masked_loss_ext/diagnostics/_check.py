# SPDX-License-Identifier: BSD-3-Clause
"""The runs of check_padding: unchanged, with other content in the padding, and without padding."""

import torch

from .._checks import refusal
from ._batch import (
    INF,
    NAN,
    OTHER,
    RANDOM,
    UNIGNORED,
    changed,
    cut_padding,
    inside,
    is_floating,
    kinds_of,
    shape_of,
)
from ._report import (
    CLOSE,
    CUT,
    LEAK,
    LOSS,
    ROUNDING,
    SAME,
    Change,
    PaddingReport,
    Tolerance,
    suggestions,
)
from ._step import NAME

REPETITIONS = 3  # of a step that is not reproducible, to see how far its runs differ


class Check:
    """What the runs found: ``changes``, and the ``notes`` about what was not checked."""

    def __init__(self, entries, runner, tolerance, *, nonfinite, ignore_index):
        self.entries, self.runner, self.tolerance = entries, runner, tolerance
        self.drop, self.ignore_index = ~entries.keep, ignore_index
        self.generator = torch.Generator().manual_seed(0)  # its own: no other one moves
        options = {"nonfinite": nonfinite, "ignore_index": ignore_index}
        self.kinds = {
            name: kinds_of(entries.tensors[name], self.drop, **options) for name in entries.checked
        }
        if not any(self.kinds.values()):
            rule = "hold an entry whose padding can be changed"
            got = f"one single value throughout in each of {entries.checked}"
            raise refusal(NAME, "batch", rule, got)
        self.changes, self.notes = [], []
        self._note_what_is_left_alone()

    def _note_what_is_left_alone(self):
        masks, others = self.entries.masks, self.entries.others
        if masks:
            self.notes.append(f"taken for the mask and left alone: {', '.join(masks)}.")
        if others:
            shapes = ", ".join(f"{name} {shape_of(self.entries.tensors[name])}" for name in others)
            keep = list(self.drop.shape)
            self.notes.append(f"not checked, shape does not begin with {keep}: {shapes}.")
        constant = ", ".join(name for name, kinds in self.kinds.items() if not kinds)
        if constant:
            self.notes.append(f"not checked, there is no other value to put in: {constant}.")

    # --- the batch as it is ------------------------------------------------------------------

    def run_unchanged(self):
        """The run that the others are compared with, twice."""
        self.before = self._run_with_leaves()
        self.tolerance.set_gradients(self.before.gradients.values())
        if not self.before.differentiated:
            self.notes.append(
                "no gradient was compared: the step returned a loss that is detached or whose "
                "graph is used up, and left no gradients behind."
                if self.runner.leaves or self.runner.parameters
                else "no gradient was compared: the batch has no floating entry; give "
                "parameters=model."
            )
        for _ in range(REPETITIONS):
            again = self.runner({})
            shifts = [self._loss_shift(again), *(self._gradient_shifts(again) or ())]
            for shift in shifts:
                self.tolerance.add_noise(shift)
            if all(shift.verdict == SAME for shift in shifts):
                break
        noise = self.tolerance.noise
        self.reproducible = not any(noise.values())
        if not self.reproducible:
            name = max(noise, key=lambda name: noise[name])
            self.notes.append(
                "runs of the unchanged batch differ (random numbers from elsewhere, state, or "
                f"nondeterministic kernels), most in {name}: {noise[name]:.1e}. Only what exceeds "
                "three times that counts."
            )
        if self.runner.updates_parameters:
            self.notes.append(
                "the step updates its parameters. They were put back after each run; an "
                "optimiser's own state was not: leave its step out."
            )
        self._add("batch", "as given", self.before)

    def _run_with_leaves(self):
        """Every floating entry is differentiated by, where the step allows it."""
        tensors = self.entries.tensors
        asked = {name for name, tensor in tensors.items() if tensor.requires_grad}
        floating = {name for name in self.entries.checked if is_floating(tensors[name])}
        self.runner.leaves = asked | floating
        if floating <= asked:
            return self.runner({})
        try:
            return self.runner({})
        except Exception:  # in-place on a leaf, or an operator without that derivative
            self.runner.leaves = asked
        before = self.runner({})
        self.notes.append(
            f"no gradient of {', '.join(sorted(floating - asked))}: the step raises an error when "
            "it is to be differentiated by."
        )
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
            got = f"{self.before.loss.item()} whatever stands in the padding: nothing to compare"
            raise refusal(NAME, "step", "return a finite loss", got)

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
            self.changes.append(Change(label, kind, error=_first_line(error)))
        else:
            self._add(label, kind, after)

    def _add(self, label, kind, after):
        shifts = self._loss_shift(after), self._gradient_shifts(after), self._padding_shifts(after)
        self.changes.append(Change(label, kind, *shifts))

    # --- without padding -------------------------------------------------------------------------

    def run_trimmed(self):
        """The loss of one row, padded and cut to its length."""
        reason = self._trim()
        if reason:
            self.notes.append(f"whether the amount of padding matters was not checked: {reason}.")

    def _trim(self):
        """Why it was not done, if it was not."""
        if self.before.drew_random_numbers:
            return "the step draws random numbers (dropout?), and how many depends on the shape"
        cut = cut_padding(self.entries, self.ignore_index)
        if isinstance(cut, str):
            return cut
        try:
            padded, alone = self.runner(cut.padded), self.runner(cut.alone)
        except Exception as error:
            return f"the step raised {_first_line(error)}"
        if not padded.loss.isfinite():
            return f"the loss of {cut.row} is not finite"
        # Other shapes, other kernels: no bits are expected, but a factor of 1 - share would show.
        judge = Tolerance(min(0.01, cut.share / 4), self.tolerance.atol)
        judge.noise = self.tolerance.noise
        shift = judge.shift(LOSS, padded.loss, alone.loss)
        if shift.verdict == ROUNDING:
            shift = shift._replace(verdict=CLOSE)
        self.changes.append(Change(cut.row, f"{CUT}: cut to {cut.length}", shift))

    # --- comparisons -----------------------------------------------------------------------------

    def _loss_shift(self, after):
        return self.tolerance.shift(LOSS, self.before.loss, after.loss)

    def _gradient_shifts(self, after):
        """Of each gradient, at kept positions."""
        if not self.before.differentiated:
            return None
        shifts = [
            self.tolerance.shift(name, self._kept(name, self.before), self._kept(name, after))
            for name in self.before.gradients
        ]
        return [shift for shift in shifts if shift.verdict != SAME]

    def _padding_shifts(self, after):
        """Of each gradient in the padding, from 0."""
        if not self.runner.leaves.intersection(self.entries.checked, self.before.gradients):
            return None
        shifts = []
        for name in self.entries.checked:
            gradient = after.gradients.get(name)
            padding = None if gradient is None else inside(gradient, self.drop)
            if padding is not None and padding.any():
                kept = self._kept(name, self.before)
                shifts.append(self.tolerance.from_zero(name, padding, kept))
        return shifts

    def _kept(self, name, outcome):
        gradient = outcome.gradients.get(name)
        if gradient is None or name not in self.entries.checked:
            return gradient
        return inside(gradient, self.entries.keep)

    def report(self):
        return PaddingReport(
            changes=self.changes,
            notes=self.notes + [*suggestions(self.changes, self.entries)],
            reproducible=self.reproducible,
            kept=int(self.entries.keep.sum()),
            total=self.entries.keep.numel(),
        )


def _first_line(error):
    text = (str(error).strip().splitlines() or [""])[0]
    text = text if len(text) <= 70 else text[:67] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
