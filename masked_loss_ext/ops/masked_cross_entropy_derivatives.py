# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy: the operator and its derivatives, and the two ways that only it has.

- ``inplace_backward``: the eager backward writes the gradient over the logits;
- ``gradient_in_forward``: the sweep. The forward makes the gradient for an incoming gradient of 1;
  the backward hands it over, once, multiplied on the device by what comes in where that is not 1,
  and reads nothing else.

Of both there is one backward: a second would read a gradient in the place of logits.
"""

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch

from .. import reference
from .._checks import as_number, is_symbolic
from ._autograd import (
    Differentiable,
    Like,
    Once,
    Signature,
    is_transformed,
    refuse_derivative,
)
from ._swept import Sweep, swept

_NAME = "masked_cross_entropy"


def row_likes(a: Any, like: torch.Tensor) -> Iterator[Like]:
    """The results of the operators over rows; like: what the rows are of."""
    rows, dtype = like.shape[:-1], reference.accumulate_dtype(like, like)
    labelled = rows if a.target is not None else None
    smooths = a.schedule is not None or a.label_smoothing > 0
    yield (rows if a.reduction == "none" and labelled is not None else ()), dtype
    yield rows, dtype
    yield (rows if a.statistics else None), dtype
    yield labelled, dtype
    yield (labelled if a.statistics else None), torch.bool
    yield (rows if a.statistics else None), torch.int64
    yield (labelled if smooths else None), dtype
    yield (2,), torch.float64
    yield (*rows, 2), dtype


def token_weight_gradient_like(b: Any, like: torch.Tensor) -> Like:
    weighs = b.token_weight is not None and b.target is not None
    return (like.shape[:-1] if weighs else None), reference.accumulate_dtype(like, like)


def reference_options(a: Any, *others: str) -> dict[str, Any]:
    """Arguments as the reference takes them, without the operator's ``others``."""
    options = a._asdict()
    if a.schedule is not None:
        options |= zip(_FLOATS, a.schedule.tolist(), strict=True)
    for name in ("schedule", "statistics", *others):
        del options[name]
    options["temperature"] = 1.0 if a.temperature is None else a.temperature
    options["softcap"] = options["softcap"] or None
    return options


def _plain(a) -> tuple[torch.Tensor | None, ...]:
    options = reference_options(a)
    if a.target is None:
        z = {name: options[name] for name in ("temperature", "softcap")}
        stats = reference.row_statistics(a.logits, None, a.mask, **z)
        return stats.lse.new_zeros(()), *stats
    loss, stats = reference.masked_cross_entropy(**options, return_stats=True)
    return loss, *stats


operator = Differentiable(
    _NAME,
    lambda a: row_likes(a, a.logits),
    _plain,
    {"token_weight": lambda b: token_weight_gradient_like(b, b.logits)},
)
_in_order = itemgetter(*operator.forward.names)
_FLOATS = operator.forward.floats
_Arguments = operator.forward.arguments
DEFAULTS = _Arguments._field_defaults


# --- the ways ------------------------------------------------------------------------------------


def call(a: dict[str, Any], shown: int, inplace_backward: bool) -> tuple[torch.Tensor, ...]:
    """a: the operator's arguments by name."""
    if torch.compiler.is_compiling():
        a = scheduled(a)
        args = _Arguments(**a)
    else:
        args = _in_order(a)
    return operator.call(args, shown, _overwrite if inplace_backward else None)


def scheduled(a: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are inputs of a compiled graph, as a schedule moves them, in a tensor on the CPU
    that is read when the graph runs: a float of an operator is a part of the graph, and each new
    value would compile another one."""
    numbers = [a[name] for name in _FLOATS]
    if not (torch.compiler.is_dynamo_compiling() and any(map(is_symbolic, numbers))):
        return a
    schedule = torch.stack([as_number(value, "cpu") for value in numbers])
    return {**a, **dict.fromkeys(_FLOATS, 0.0), "schedule": schedule}


def overwriting(signature: Signature, of: Differentiable, name: str) -> Once:
    """The backward that writes over the logits, by the operator ``signature``."""

    def write_over(args):
        # The gradient is a new tensor on the storage of the logits, whose version goes up so that
        # whoever saved them is told.
        b = dict(zip(of.backward.names, args, strict=True))
        grad_token_weight = signature.op(*[b[name] for name in signature.names])
        torch.autograd.graph.increment_version(b["logits"])
        return b["logits"].data, grad_token_weight

    option = f"{name}: inplace_backward=True has"
    return Once(write_over, f"{option} one backward: the gradient stands where the logits were")


def call_sweep(a: dict[str, Any], inplace_backward: bool) -> tuple[torch.Tensor, ...]:
    """The loss alone, in a tuple; a: without statistics."""
    token_weight = a["token_weight"]
    if (
        not (torch.is_grad_enabled() and a["logits"].requires_grad)
        or (token_weight is not None and token_weight.requires_grad)
        or torch.compiler.is_compiling()
        or is_transformed()
    ):
        return call(a, 1, inplace_backward)
    run = _sweep_over if inplace_backward else _sweep_beside
    args = _in_order(a)
    option = f"{_NAME}: gradient_in_forward=True has"
    once = f"{option} one backward: the gradient has been handed over"
    refused = f"{option} no second derivative; call it without, or backward without create_graph"
    return (swept(Sweep((a["logits"],), lambda: run(args), scale_gradient, once, refused)),)


def _sweep_over(args):
    loss = _overwriting_sweep.op(*args)
    gradient = args[0].detach()  # with the version of the logits: all see the other
    torch.autograd.graph.increment_version(gradient)
    return loss, (gradient,)


def _sweep_beside(args):
    loss, gradient = _sweep.op(*args)
    return loss, (gradient,)


def scale_gradient(gradient: torch.Tensor, grad_loss: torch.Tensor) -> None:
    """gradient *= grad_loss []; where that is 1 nothing is read."""
    if gradient.dim() == 0:  # the weight of the one token of hidden states [D]
        gradient = gradient.view(1)
    _scale.op(gradient, grad_loss)


# --- the operators without a derivative ----------------------------------------------------------


def _sweep_likes(a) -> Iterator[Like]:
    yield (), reference.accumulate_dtype(a.logits, a.logits)
    yield a.logits.shape, a.logits.dtype


_overwriting = Signature("_masked_cross_entropy_backward_")
_sweep = Signature("_masked_cross_entropy_sweep")
_overwriting_sweep = Signature("_masked_cross_entropy_sweep_")
_scale = Signature("_masked_cross_entropy_scale_gradient_")
_overwrite = overwriting(_overwriting, operator, _NAME)
for _signature, _of, _instead in (
    (_overwriting, lambda b: [operator.gradient_like(b, "token_weight")], "inplace_backward"),
    (_sweep, _sweep_likes, "gradient_in_forward"),
    (_overwriting_sweep, lambda a: [*_sweep_likes(a)][:1], "gradient_in_forward"),
    (_scale, lambda a: [], "gradient_in_forward"),
):
    _signature.register_fake(_of, _NAME)
    refuse_derivative(_signature.op, f"{_NAME}({_instead}=True)")
