# SPDX-License-Identifier: BSD-3-Clause
"""Calls that once were refused in somebody else's words: what random ones found, by name."""

import re

import pytest
import torch
from operator_calls import arguments_of, ops

# PyTorch's stable ABI does not list the dtype, so that asking for it raised of itself.
NO_DTYPE = [
    ("masked_cross_entropy", "target"),
    ("masked_cross_entropy", "segment_ids"),
    ("masked_cross_entropy", "weight"),
    ("masked_cross_entropy", "schedule"),
    ("_masked_cross_entropy_backward", "row_sums"),
    ("_masked_cross_entropy_backward", "grad_loss"),
    ("_masked_cross_entropy_backward", "grad_lse"),
    ("_masked_cross_entropy_backward", "totals"),
    ("_masked_squared_error_backward", "grad_loss"),
    ("_masked_squared_error_backward", "count"),
    ("linear_cross_entropy", "target"),
    ("vocab_parallel_cross_entropy", "messages"),
    ("cross_entropy_terms", "context_before"),
    ("cross_entropy_terms", "classes"),
    ("interval_block_lists", "hi"),
    ("packed_rows", "kept"),
    ("repetition_counts", "tokens"),
    ("_snapshot", "tensor"),
]


def refused(operator, text, **bad):
    with pytest.raises(ValueError, match=re.escape(text)):
        getattr(ops, operator)(**{**arguments_of(operator), **bad})


@pytest.mark.parametrize("operator,name", NO_DTYPE)
def test_a_dtype_that_the_stable_abi_does_not_list(operator, name):
    shape = {"weight": 4, "schedule": 4}.get(name, (1, 2) if "tokens" in name else 2)
    bad = torch.empty(shape, dtype=torch.uint4)
    refused(operator, f": {name} must be of a dtype that PyTorch computes with", **{name: bad})


def test_no_logits_beside_a_temperature():
    """None passes as a tensor by PyTorch's schemas, and was asked for its device."""
    for operator in ("cross_entropy_terms", "_cross_entropy_terms_backward"):
        text = f"{operator}: logits must be a tensor, got None"
        refused(operator, text, logits=None, temperature=torch.tensor(0.8))


@pytest.mark.parametrize(
    "operator",
    ["linear_cross_entropy", "_linear_cross_entropy_sweep", "_linear_cross_entropy_backward"],
)
def test_a_number_for_the_weight_of_a_layer(operator):
    """Its classes were asked for before its dimensions were looked at."""
    text = "weight must be [V, D] with at least one class and the D of hidden [2, 4], got []"
    refused(operator, text, linear_weight=torch.tensor(1.0))
