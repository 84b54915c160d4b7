# SPDX-License-Identifier: BSD-3-Clause
"""A classifier as losses of hidden states take it: not called, its weight and bias are read."""

from typing import Any

import torch

from ._checks import (
    check_device,
    check_floating,
    check_tensor,
    is_dtensor,
    placements_text,
    refusal,
    shape_text,
)

Head = torch.nn.Linear | torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]

_RULE = "be a torch.nn.Linear, a weight [V, D] or (weight, bias)"


def weight_and_bias(function: str, name: str, head: Any) -> tuple[torch.Tensor, Any]:
    """Of a ``torch.nn.Linear``, a weight alone or (weight, bias)."""
    if isinstance(head, torch.nn.Linear):
        # What another forward or a hook does beyond that would be left out in silence.
        if type(head).forward is not torch.nn.Linear.forward or "forward" in head.__dict__:
            got = f"{type(head).__name__} with a forward of its own, which would not be called"
            raise refusal(function, name, _RULE, got, TypeError)
        if head._forward_hooks or head._forward_pre_hooks:
            got = "some" + _of_shards(head.weight)
            raise refusal(function, name, "have no forward hooks: it is not called", got)
        return head.weight, head.bias
    pair = head if isinstance(head, (tuple, list)) else (head, None)
    if len(pair) != 2 or not isinstance(pair[0], torch.Tensor):
        raise refusal(function, name, _RULE, type(head).__name__, TypeError)
    return pair[0], pair[1]


def _of_shards(weight):
    """What to do where the hooks are those of FSDP2 or of tensor parallelism."""
    if not is_dtensor(weight):
        return ""
    return (
        f" beside a weight that is sharded {placements_text(weight)}: fully_shard the module that "
        "calls the loss, which gathers it, and not the head alone; of a tensor parallel head give "
        "the weight"
    )


def check_layer(
    function: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
    least: int = 1,
) -> None:
    """Hidden states ``[..., D]``, a weight ``[V, D]`` and a bias ``[V]`` or None; ``least``
    classes."""
    layer = (hidden, weight) if bias is None else (hidden, weight, bias)
    for name, tensor in zip(names, layer, strict=False):
        check_tensor(function, name, tensor)
        check_floating(function, name, tensor)
        check_device(function, name, tensor, names[0], hidden)
    if hidden.dim() == 0:
        raise refusal(function, names[0], "be [..., D]", shape_text(hidden))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < least:
        some = "at least one class and " * (least > 0)
        rule = f"be [V, D] with {some}the D of {names[0]} {shape_text(hidden)}"
        raise refusal(function, names[1], rule, shape_text(weight))
    if bias is not None and bias.shape != weight.shape[:1]:
        rule = f"have one entry per class [{weight.shape[0]}]"
        raise refusal(function, names[2], rule, shape_text(bias))
