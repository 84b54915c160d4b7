# SPDX-License-Identifier: BSD-3-Clause
"""Does a contender compute what the reference computes in float64? Before that it is not timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .harness import Contender, Problem

LOSS_TOLERANCE = 1e-5  # one long fp32 sum, or a few: arithmetic is fp32 inside for both dtypes
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}  # of the gradient, at the end
BLOCK = 1 << 24  # elements compared at a time: float64 copies of all would be larger than the data


@dataclass(frozen=True)
class Agreement:
    loss_error: float  # relative; the largest one where there are more results than the loss
    gradient_error: float  # largest relative error of an element; NaN where there is no gradient
    refusal: str = ""  # why this contender is not timed; empty: it agrees


def relative_error(value: Tensor, truth: Tensor, unit: float = 0.0) -> float:
    """Largest |value - truth| / max(|truth|, unit); where the truth is 0 only an exact 0 is no
    error."""
    tiny, worst = torch.finfo(torch.float32).tiny, []
    blocks = (tensor.detach().reshape(-1).split(BLOCK) for tensor in (value, truth))
    for some, exact in zip(*blocks, strict=True):
        exact = exact.double()
        scale = exact.abs().clamp_min_(max(unit, tiny)).masked_fill_(exact == 0, tiny)
        difference = (some.double() - exact).abs_()
        worst.append(difference.div_(scale).max() if exact.numel() else exact.new_zeros(()))
    return torch.stack(worst).max().item()  # not Python's max: it may lose a NaN


def results_of(returned: Tensor | tuple | None) -> list[Tensor]:
    """The tensors of what a call returned, in order; a statistic that is None is left out."""
    if isinstance(returned, tuple):
        return [tensor for part in returned for tensor in results_of(part)]
    return [] if returned is None else [returned]


def run_once(contender: Contender, index: int = 0) -> tuple[list[Tensor], Tensor | None]:
    """Results and gradient of one call, the gradient taken away from the input."""
    inputs = contender.inputs[index % len(contender.inputs)]
    inputs[0].grad = None
    if contender.prepare is not None:
        contender.prepare(*inputs)
    results = results_of(contender.call(*inputs))
    if inputs[0].requires_grad:
        results[0].backward()
    gradient, inputs[0].grad = inputs[0].grad, None
    return [result.detach() for result in results], gradient


def truth_of(problem: Problem) -> tuple[list[Tensor], Tensor | None]:
    """Results and gradient of the reference, in float64, from our contender's data."""

    def widen(value):
        wide = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().double() if wide else value

    inputs = problem.contenders[0].inputs[0]
    leaf, *rest = (widen(value) for value in inputs)
    leaf.requires_grad_(inputs[0].requires_grad)
    return run_once(Contender("reference", problem.reference, [(leaf, *rest)]))


def check(contender: Contender, truth: tuple, problem: Problem) -> Agreement:
    """Does it compute what the reference computes? A failure to run is a refusal too.

    A contender may return less than the reference: the loss without the statistics.
    """
    try:
        results, gradient = run_once(contender)
    except Exception as error:  # the other contenders of the case must still be measured
        first_line = (str(error).splitlines() or ["no message"])[0]
        return Agreement(math.nan, math.nan, f"{type(error).__name__}: {first_line}")
    true_results, true_gradient = truth
    shapes = [tuple(result.shape) for result in results]
    if shapes != [tuple(result.shape) for result in true_results[: len(shapes)]]:
        return Agreement(math.nan, math.nan, f"results of shapes {shapes}")
    if (gradient is None) != (true_gradient is None) or (
        gradient is not None and gradient.shape != true_gradient.shape
    ):
        got = None if gradient is None else tuple(gradient.shape)
        return Agreement(math.nan, math.nan, f"gradient of shape {got}")
    errors = [relative_error(*pair) for pair in zip(results, true_results, strict=False)]
    loss_error = torch.tensor(errors).max().item()
    # "not <=" and not ">": a NaN is a refusal.
    if not loss_error <= (limit := LOSS_TOLERANCE + contender.slack):
        refusal = f"loss is off by {loss_error:.1e}, allowed {limit:.1e}"
        return Agreement(loss_error, math.nan, refusal)
    if gradient is None:
        return Agreement(loss_error, math.nan)
    gradient_error = relative_error(gradient, true_gradient, problem.gradient_unit)
    limit = problem.gradient_tolerance + ROUNDING[gradient.dtype] + contender.slack
    if not gradient_error <= limit:
        refusal = f"gradient is off by {gradient_error:.1e}, allowed {limit:.1e}"
        return Agreement(loss_error, gradient_error, refusal)
    return Agreement(loss_error, gradient_error)
