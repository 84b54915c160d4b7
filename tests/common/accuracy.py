# SPDX-License-Identifier: BSD-3-Clause
"""The one accuracy rule of the suite.

truth    the reference on float64 copies of the inputs
allowed  2 * (largest relative error of the reference in this dtype * size + one rounding of truth)

element by element, and never less than the smallest number of the output dtype. size is what is
summed, without its signs: where terms do not cancel it is the truth, as in a squared error; where
they do, as in p - 1, accuracy_cross_entropy.py says what it is.
Places of exact zeros, NaN and inf are compared apart and must agree.
"""

import math

import torch

from masked_loss_ext import reference

INPUTS = ("prediction", "target", "weighting")  # what has a gradient
WEIGHTS = ("foreground_weight", "background_weight")
ROUNDINGS_OF_A_TERM = 8  # difference, square, edit weight (3), weighting, scale (2)


def widened(inputs):
    """float64 copies of the floating inputs; masks stay as they are."""
    return {
        name: value.double() if name in INPUTS and value is not None else value
        for name, value in inputs.items()
    }


def evaluate(function, inputs, grad_loss=None, **options):
    """{"loss": ..., "grad prediction": ..., ...} of function(**inputs, **options)."""
    leaves = {n: inputs[n].detach().requires_grad_() for n in INPUTS if inputs.get(n) is not None}
    loss = function(**{**inputs, **leaves}, **options)
    if grad_loss is None:
        grad_loss = torch.ones_like(loss)
    grads = torch.autograd.grad(loss, list(leaves.values()), grad_loss.to(loss.dtype))
    results = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"loss": loss.detach(), **results}


class Expected:
    """What the reference says: in the inputs' dtypes, in truth, and how exact that is.

    ``size`` is the sum of what is summed without its signs: grad_loss and weights may make terms
    cancel.
    ``relative_error`` is the reference's largest, and at least the bound of a pairwise sum: one sum
    may be exact by luck. In float64 the truth is the reference itself, so the roundings of a term
    count too.
    """

    def __init__(self, inputs, grad_loss=None, **options):
        function = reference.masked_squared_error
        wide = widened(inputs)
        self.floor, self.sums = {}, ()
        self.in_dtype = evaluate(function, inputs, grad_loss, **options)
        self.truth = evaluate(function, wide, grad_loss, **options)
        self.size = self.truth
        signs = _negative(inputs["weighting"]) or any(options.get(w, 1.0) < 0 for w in WEIGHTS)
        if grad_loss is not None or signs:
            grad_loss = None if grad_loss is None else grad_loss.abs()
            if wide["weighting"] is not None:
                wide["weighting"] = wide["weighting"].abs()
            unsigned = options | {w: abs(options[w]) for w in WEIGHTS if w in options}
            self.size = evaluate(function, wide, grad_loss, **unsigned)
        self.relative_error = {
            name: _relative_error(self.in_dtype[name], self.truth[name], self.size[name])
            for name in self.truth
        }
        for name, error in self.relative_error.items():
            bound = self._pairwise_bound(inputs["prediction"].numel(), name)
            self.relative_error[name] = max(error, bound)

    def _pairwise_bound(self, terms, name):
        """log2(terms per result) roundings, each of half a unit in the last place."""
        dtype, result = self.in_dtype["loss"].dtype, self.in_dtype[name]
        # A result that is wider than what it is computed in shows the roundings of a term, too.
        shown = torch.finfo(result.dtype).eps < torch.finfo(dtype).eps
        in_a_term = ROUNDINGS_OF_A_TERM if dtype == torch.float64 or shown else 0
        roundings = math.log2(max(terms / max(result.numel(), 1), 1)) + in_a_term
        return roundings * torch.finfo(dtype).eps / 2


def _negative(tensor):
    return tensor is not None and bool((tensor < 0).any())


def _relative_error(result, truth, size):
    normal = (size.abs() >= torch.finfo(result.dtype).tiny) & result.isfinite() & truth.isfinite()
    relative = ((result.double() - truth).abs() / size.abs())[normal]
    return relative.max().item() if relative.numel() else 0.0


def assert_accurate(actual, expected, name, what=""):
    """``actual``: the result called ``name`` of ``evaluate``; expected: an Expected."""
    what = f"{what} {name}"
    same_dtype, truth = expected.in_dtype[name], expected.truth[name]
    assert actual.dtype == same_dtype.dtype, f"{what}: {actual.dtype} for {same_dtype.dtype}"
    assert actual.shape == truth.shape, f"{what}: {list(actual.shape)} for {list(truth.shape)}"
    rounded = truth.to(actual.dtype)
    assert_same_places(actual.isnan(), truth.isnan(), f"{what}: NaN")
    assert_same_places(actual.isinf(), rounded.isinf(), f"{what}: inf")
    zeros = truth == 0
    if name in expected.sums:
        zeros &= expected.size[name] == 0
    assert_same_places(zeros & (actual == 0), zeros, f"{what}: exact zero")
    info = torch.finfo(actual.dtype)
    allowed = 2 * (
        expected.relative_error[name] * expected.size[name].abs() + info.eps * truth.abs()
    )
    allowed = allowed.clamp(min=max(info.smallest_normal * info.eps, expected.floor.get(name, 0.0)))
    finite = rounded.isfinite() & same_dtype.isfinite() & allowed.isfinite()
    error = (actual.double() - truth).abs()
    excess = torch.where(finite, error - allowed, error.new_full((), -1.0))
    if excess.numel() and excess.max() > 0:
        at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{what} at {at}: got {actual[at].item()!r}, reference in this dtype "
            f"{same_dtype[at].item()!r}, truth {truth[at].item()!r}, error {error[at].item():.3g}, "
            f"allowed {allowed[at].item():.3g}; {int((excess > 0).sum())} of {excess.numel()} over"
        )


def assert_same_places(actual, expected, what):
    wrong = (actual != expected).nonzero()
    assert len(wrong) == 0, f"{what} in other places, first {wrong[0].tolist()} of {len(wrong)}"


def assert_all_accurate(actual, expected, what=""):
    """The same for all results of ``evaluate``."""
    assert actual.keys() == expected.truth.keys()
    for name in actual:
        assert_accurate(actual[name], expected, name, what)


def assert_same_bits(actual, expected, what=""):
    """Same dtype, shape and bytes (NaN and the sign of zero included)."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    same = actual.contiguous().reshape(-1).view(torch.uint8)
    other = expected.contiguous().reshape(-1).view(torch.uint8)
    assert torch.equal(same, other), f"{what}: bits differ"
