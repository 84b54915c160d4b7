# SPDX-License-Identifier: BSD-3-Clause
"""What the losses of a mixture of experts share: its choices, checked, masked and counted."""

import torch

from .._checks import check_device, check_integers, check_length, shape_text
from ._rows import check_floating, cleaned, row_mask


def load_balance(gate, indices, valid, num_experts):
    choices = (valid.sum() * indices.shape[-1]).clamp(min=1)
    probability = cleaned(gate.softmax(-1), valid).sum(0) / choices
    return (
        num_experts * (probability * (choice_counts(indices, valid, num_experts) / choices)).sum()
    )


def choice_counts(indices, valid, num_experts):
    """How often each expert was chosen, [E] int64: exact, and the device is not asked how many."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=indices.device)
    on = valid.unsqueeze(-1).expand_as(indices).long()
    return counts.index_add(0, indices.flatten(), on.flatten())


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
    gate = cleaned(gate.reshape(-1, num_experts), valid)
    return gate, torch.where(valid.unsqueeze(-1), indices, 0), valid


def check_experts(function, num_experts):
    check_length(function, "num_experts", num_experts)
    if num_experts == 0:
        raise ValueError(f"{function}: num_experts must be at least 1, got 0")
