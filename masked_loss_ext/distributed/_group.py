# SPDX-License-Identifier: BSD-3-Clause
"""What a ``group`` argument may be: None, a process group or a 1-D DeviceMesh."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .._checks import refusal
from ..ops._autograd import is_batch

# By the name that torch has for it: from 2.13 on the other is deprecated.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def process_group(function: str, group: Any = None) -> Any:
    """The process group that is meant.

    None is all ranks, and what is returned where torch.distributed is not initialised: a world of
    one. A group or mesh that the caller is no member of is refused.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is None:
            return None
        rule = "be None where torch.distributed is not initialized"
        raise refusal(function, "group", rule, type(group).__name__)
    if group is None:
        return dist.group.WORLD
    if isinstance(group, dist.DeviceMesh):
        group = _of_mesh(function, group)
    elif not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
        rule, got = "be None, a process group or a DeviceMesh", type(group).__name__
        raise refusal(function, "group", rule, got, TypeError)
    if dist.get_rank(group) < 0:
        raise _no_member(function)
    return group


def group_size(group: Any) -> int:
    """Of what process_group returned."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Any) -> int:
    """The caller's place in what process_group returned."""
    return 0 if group is None else dist.get_rank(group)


def _of_mesh(function, mesh):
    if mesh.ndim != 1:
        got = f"{mesh.ndim} dimensions {mesh.mesh_dim_names or ''}".rstrip()
        got += '; one of them is mesh["name"]'
        raise refusal(function, "group", "be a DeviceMesh of 1 dimension", got)
    if mesh.get_coordinate() is None:
        raise _no_member(function)
    return mesh.get_group()


def check_in_order(function: str, given: Any, group: Any) -> None:
    """A mesh numbers its ranks as they are listed, its group in ascending order: what is spread by
    the one would be put together by the other. group: process_group of what is given."""
    if not isinstance(given, dist.DeviceMesh) or torch.compiler.is_compiling():
        return
    listed = given.mesh.flatten().tolist()
    if listed != dist.get_process_group_ranks(group):
        raise refusal(function, "group", "be a DeviceMesh whose ranks ascend", listed)


def _no_member(function):
    here = f"a group that rank {dist.get_rank()} is not in"
    return refusal(function, "group", "contain the rank that calls", here)


def gathered(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """[ranks, n] of each rank's [n], in their order; of one rank without a message."""
    ranks = group_size(group)
    if ranks == 1:
        return tensor.unsqueeze(0)
    every = tensor.new_empty(ranks * tensor.shape[0])
    _all_gather(every, tensor, group=group)
    return every.view(ranks, -1)


class _GradientSum(torch.autograd.Function):
    @staticmethod
    def forward(tensor, group):
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        if not torch.compiler.is_compiling() and is_batch(gradient):
            raise NotImplementedError("is_grads_batched: ranks have no message for a batch")
        gradient = gradient.contiguous()  # made for this tensor, which nobody else has
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def with_gradient_sum(group: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, whose gradient is added up over the ranks."""
    return tensor if group_size(group) == 1 else _GradientSum.apply(tensor, group)
