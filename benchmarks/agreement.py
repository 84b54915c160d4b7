# SPDX-License-Identifier: BSD-3-Clause
"""Does a contender compute what the reference computes in float64? Before that it is not timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .harness import Contender, Problem, drop_gradients

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


def run_once(contender: Contender, index: int = 0) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results of one call and the gradients of the inputs that require one, taken from them."""
    inputs = contender.inputs[index % len(contender.inputs)]
    drop_gradients(inputs)
    if contender.prepare is not None:
        contender.prepare(*inputs)
    results = results_of(contender.call(*inputs))
    if any(isinstance(one, Tensor) and one.requires_grad for one in inputs):
        results[0].backward()
    return [result.detach() for result in results], drop_gradients(inputs)


def truth_of(problem: Problem) -> tuple[list[Tensor], list[Tensor | None]]:
    """Results and gradients of the reference, in float64, from our contender's data."""
    if problem.truth is not None:
        return problem.truth(*problem.contenders[0].inputs[0])

    def widen(value):
        wide = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().double().requires_grad_(value.requires_grad) if wide else value

    inputs = tuple(widen(value) for value in problem.contenders[0].inputs[0])
    return run_once(Contender("reference", problem.reference, [inputs]))


def gradients_error(
    gradients: list[Tensor | None], truths: list[Tensor | None], unit: float
) -> float:
    """The largest; ``unit`` is that of the first, as harness.Problem says."""
    errors = []
    for place, (gradient, truth) in enumerate(zip(gradients, truths, strict=True)):
        if gradient is not None:
            one = truth.abs().max().item() if place and truth.numel() else unit
            errors.append(relative_error(gradient, truth, one))
    return torch.tensor(errors).max().item()


def shapes_of(tensors: list[Tensor | None]) -> list[tuple | None]:
    return [None if tensor is None else tuple(tensor.shape) for tensor in tensors]


def check(contender: Contender, truth: tuple, problem: Problem) -> Agreement:
    """Does it compute what the reference computes? A failure to run is a refusal too.

    A contender may return less than the reference: the loss without the statistics.
    """
    try:
        results, gradients = run_once(contender)
    except Exception as error:  # the other contenders of the case must still be measured
        first_line = (str(error).splitlines() or ["no message"])[0]
        return Agreement(math.nan, math.nan, f"{type(error).__name__}: {first_line}")
    true_results, true_gradients = truth
    if (shapes := shapes_of(results)) != shapes_of(true_results[: len(results)]):
        return Agreement(math.nan, math.nan, f"results of shapes {shapes}")
    if (shapes := shapes_of(gradients)) != shapes_of(true_gradients):
        return Agreement(math.nan, math.nan, f"gradients of shapes {shapes}")
    errors = [relative_error(*pair) for pair in zip(results, true_results, strict=False)]
    loss_error = torch.tensor(errors).max().item()
    # "not <=" and not ">": a NaN is a refusal.
    if not loss_error <= (limit := LOSS_TOLERANCE + contender.slack):
        refusal = f"loss is off by {loss_error:.1e}, allowed {limit:.1e}"
        return Agreement(loss_error, math.nan, refusal)
    if not gradients or gradients[0] is None:
        return Agreement(loss_error, math.nan)
    gradient_error = gradients_error(gradients, true_gradients, problem.gradient_unit)
    limit = problem.gradient_tolerance + ROUNDING[gradients[0].dtype] + contender.slack
    if not gradient_error <= limit:
        refusal = f"gradient is off by {gradient_error:.1e}, allowed {limit:.1e}"
        return Agreement(loss_error, gradient_error, refusal)
    return Agreement(loss_error, gradient_error)
