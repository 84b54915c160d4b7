# SPDX-License-Identifier: BSD-3-Clause
"""The operators for a shard of the vocabulary on each of several ranks: before and after the one
message, and their derivatives, which need none.

The schemas are in csrc/schemas.cpp, what is sent in csrc/cross_entropy/shards.h. A derivative of a
derivative would need messages in the backward, which are not there: it is refused.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from ._autograd import (
    Differentiable,
    Like,
    Once,
    Signature,
    _functorch_is_active,
    needs_plain,
    refuse_derivative,
)
from .linear_cross_entropy_derivatives import bias_gradient_like
from .masked_cross_entropy_derivatives import (
    overwriting,
    row_likes,
    scheduled,
    token_weight_gradient_like,
)

_HEADER = 6  # numbers, of csrc/cross_entropy/shards.h


def _refused(name):
    way = "forward-mode derivatives" if needs_plain() else "vmap and second derivatives"
    return NotImplementedError(
        f"{name}: {way} would need further messages between the ranks and do not exist; gather the "
        "logits and call masked_cross_entropy"
    )


def _refuse_plain(a):
    raise _refused("vocab_parallel_linear_cross_entropy" if "hidden" in a._fields else NAME)


def refuse_transforms(name: str) -> None:
    """Before a message: there is none of a batch, and none of tangents."""
    batched = False
    if _functorch_is_active():
        stack = torch._C._functorch.get_interpreter_stack() or []
        batched = any(one.key() == torch._C._functorch.TransformType.Vmap for one in stack)
    if batched or forward_ad._current_level >= 0:
        raise _refused(name)


def _message_like(a, like) -> Like:
    smooths = a.schedule is not None or a.label_smoothing > 0
    numbers = 4 + 2 * bool(a.statistics) + 2 * (smooths and a.target is not None)
    rows = 1
    for size in like.shape[:-1]:
        rows = rows * size
    return (rows * numbers + _HEADER,), torch.float64


class Sharded(NamedTuple):
    """One form of the operators: what makes a message, and what makes results of all messages."""

    sums: Signature
    results: Differentiable
    rows: str  # the argument that all that is per row goes by


def _sharded(name, rows, gradient_likes):
    likes = {"token_weight": lambda b: token_weight_gradient_like(b, getattr(b, rows))}
    results = Differentiable(
        name, lambda a: row_likes(a, getattr(a, rows)), _refuse_plain, gradient_likes | likes
    )
    sums = Signature(f"_{name}_sums")
    sums.register_fake(lambda a: [_message_like(a, getattr(a, rows))], name)
    refuse_derivative(sums.op, name)
    return Sharded(sums, results, rows)


NAME = "vocab_parallel_cross_entropy"
rows_of_logits = _sharded(NAME, "logits", {})
rows_of_hidden = _sharded(
    "vocab_parallel_linear_cross_entropy", "hidden", {"bias": bias_gradient_like}
)
_overwriting = Signature(f"_{NAME}_backward_")
_overwriting.register_fake(
    lambda b: [rows_of_logits.results.gradient_like(b, "token_weight")], NAME
)
refuse_derivative(_overwriting.op, f"{NAME}(inplace_backward=True)")
overwrite: Once = overwriting(_overwriting, rows_of_logits.results, NAME)


def message_of(form: Sharded, a: dict[str, Any]) -> torch.Tensor:
    """What this rank's shard has to tell; a: the operator's arguments by name."""
    with torch.no_grad():
        return form.sums.op(*[a[name] for name in form.sums.names])


def results_of(
    form: Sharded, a: dict[str, Any], messages: torch.Tensor, shown: int, once: Once | None = None
) -> tuple[torch.Tensor, ...]:
    """The first results, of whole rows; messages: [ranks, numbers] of all, in their order."""
    a = {**a, "messages": messages}
    return form.results.call(form.results.forward.arguments(**a), shown, once)


def prepared(a: dict[str, Any]) -> dict[str, Any]:
    return scheduled(a) if torch.compiler.is_compiling() else a
