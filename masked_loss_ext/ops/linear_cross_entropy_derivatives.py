# SPDX-License-Identifier: BSD-3-Clause
"""linear_cross_entropy: the operator and its derivatives, and the sweep.

The sweep makes loss and gradients together, where these are known but for a factor: of one number,
in training. The operator alone makes the logits a second time in its backward, for any incoming
gradients. Under torch.compile both are opaque, and the sweep's gradients are saved by the graph.
torch.func's vmap, forward mode and second derivatives are plain PyTorch, with whole logits.
"""

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import torch

from .. import reference
from ._autograd import Differentiable, Like, Signature, is_transformed
from ._swept import Sweep, multiplied, swept
from .masked_cross_entropy_derivatives import (
    reference_options,
    row_likes,
    scale_gradient,
    scheduled,
    token_weight_gradient_like,
)

NAME = "masked_linear_cross_entropy"


def _plain(a) -> tuple[torch.Tensor | None, ...]:
    options = reference_options(a, "chunk_rows", "num_valid", "fp32_logits")
    options["class_weight"] = options.pop("weight")
    options["weight"] = options.pop("linear_weight")
    if a.target is None:
        given = ("hidden", "weight", "mask", "bias", "temperature", "softcap")
        stats = reference.linear_row_statistics(**{name: options[name] for name in given})
        return stats.lse.new_zeros(()), *stats
    loss, stats = reference.masked_linear_cross_entropy(**options, return_stats=True)
    return loss, *stats


def bias_gradient_like(b) -> Like:
    return None if b.bias is None else b.bias.shape, b.hidden.dtype


operator = Differentiable(
    "linear_cross_entropy",
    lambda a: row_likes(a, a.hidden),
    _plain,
    {
        "bias": bias_gradient_like,
        "token_weight": lambda b: token_weight_gradient_like(b, b.hidden),
    },
)
_in_order = itemgetter(*operator.forward.names)
_Arguments = operator.forward.arguments
DEFAULTS = _Arguments._field_defaults


def call(a: dict[str, Any], shown: int) -> tuple[torch.Tensor, ...]:
    """The first results; a: the operator's arguments by name. In training the sweep, where the
    loss alone is asked for and is one number."""
    if torch.compiler.is_compiling():
        a = scheduled(a)
        given = _Arguments(**a)  # torch.compile knows no itemgetter
    else:
        given = _in_order(a)
    inputs = [a[name] for name in operator.inputs]
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs]
    if shown > 1 or a["reduction"] == "none" or not any(needs) or is_transformed():
        return operator.call(given, shown)
    args = (*given, *needs)
    if torch.compiler.is_compiling():
        return _sweep.op(*args)[:1]

    others = {name: value for name, value in a.items() if name not in operator.inputs}

    def again(*inputs):  # which autograd holds, and lets go of after the backward
        return _plain(_Arguments(**others, **dict(zip(operator.inputs, inputs, strict=True))))[0]

    once = f"{NAME}: there is one backward of a mean or a sum: its gradients have been handed over"
    return (swept(Sweep(inputs, lambda: _run(args, needs), scale_gradient, once, again=again)),)


def _run(args, needs):
    loss, *gradients = _sweep.op(*args)
    return loss, [x if needed else None for x, needed in zip(gradients, needs, strict=True)]


# --- the sweep's operator, for torch.compile -----------------------------------------------------


def _sweep_likes(a) -> Iterator[Like]:
    dtype = reference.accumulate_dtype(a.hidden, a.hidden)
    yield (), dtype
    yield (a.hidden.shape if a.needs_hidden else None), a.hidden.dtype
    yield (a.linear_weight.shape if a.needs_linear_weight else None), a.hidden.dtype
    needs_bias = a.needs_bias and a.bias is not None
    yield (a.bias.shape if needs_bias else None), a.hidden.dtype
    weighs = a.needs_token_weight and a.token_weight is not None
    yield (a.hidden.shape[:-1] if weighs else None), dtype


_sweep = Signature("_linear_cross_entropy_sweep")
_sweep.register_fake(_sweep_likes, NAME)


def _keep_gradients(ctx, inputs, output):
    _, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in operator.input_positions]


def _multiply_gradients(ctx, grad_loss, *_):
    found = [None] * len(ctx.needs_input_grad)
    for place, gradient, dtype in zip(
        operator.input_positions, ctx.saved_tensors, ctx.dtypes, strict=True
    ):
        if ctx.needs_input_grad[place]:
            scaled = multiplied(gradient, grad_loss)
            found[place] = None if scaled is None else scaled.to(dtype)
    return tuple(found)


torch.library.register_autograd(_sweep.name, _multiply_gradients, setup_context=_keep_gradients)
