# SPDX-License-Identifier: BSD-3-Clause
"""What the losses of a mixture of experts share: its choices, checked, masked and counted."""

import torch

from .._checks import _functorch_is_active, check_device, check_integers, shape_text
from ..attention._host import _modes, is_readable
from ._arguments import check_size
from ._rows import check_floating, cleaned, row_mask

_MOST_EXPERTS = 2**24  # 64 MB for each of a balancer's counts


def load_balance(gate, indices, valid, num_experts):
    choices = (valid.sum() * indices.shape[-1]).clamp(min=1)
    probability = cleaned(gate.softmax(-1), valid).sum(0) / choices
    # Not counts / choices, of integers: that is of the default dtype.
    counts = choice_counts(indices, valid, num_experts).to(probability.dtype)
    return num_experts * (probability * (counts / choices)).sum()


def choice_counts(indices, valid, num_experts):
    """How often each expert was chosen, [E] int64: exact, and the device is not asked how many."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=indices.device)
    inside = (indices >= 0) & (indices < num_experts)  # on a device nobody has looked
    on = (valid.unsqueeze(-1) & inside).long()
    return counts.index_add(0, indices.clamp(0, num_experts - 1).flatten(), on.flatten())


def routed(function, name, gate, expert_indices, num_experts, attention_mask):
    """[N, E] gate and [N, k] indices, 0 in rows that do not count, and which do [N]."""
    check_floating(function, name, gate, num_experts, "num_experts")
    check_integers(function, "expert_indices", expert_indices)
    check_device(function, "expert_indices", expert_indices, name, gate)
    if expert_indices.shape == gate.shape[:-1]:  # one choice per token
        expert_indices = expert_indices.unsqueeze(-1)
    if expert_indices.shape[:-1] != gate.shape[:-1]:
        raise ValueError(
            f"{function}: expert_indices must be [N, k] for {name} {shape_text(gate)}, got "
            f"{shape_text(expert_indices)}"
        )
    valid = row_mask(function, attention_mask, name, gate)
    indices = expert_indices.reshape(-1, expert_indices.shape[-1]).long()
    if can_be_looked_at(indices):
        _refuse_index(function, indices, valid, num_experts)
    gate = cleaned(gate.reshape(-1, num_experts), valid)
    return gate, torch.where(valid.unsqueeze(-1), indices, 0), valid


def can_be_looked_at(indices):
    return is_readable(indices) and not (_modes() or _functorch_is_active())


def _refuse_index(function, indices, valid, num_experts):
    outside = ((indices < 0) | (indices >= num_experts)) & valid.unsqueeze(-1)
    if outside.any():
        row = int(outside.any(-1).nonzero()[0])
        raise IndexError(
            f"{function}: expert_indices at row {row} must be in [0, {num_experts}), got "
            f"{indices[row].tolist()}"
        )


def check_experts(function, num_experts):
    check_size(function, "num_experts", num_experts, 1, _MOST_EXPERTS)
