# SPDX-License-Identifier: BSD-3-Clause
"""More than 2^32 elements: offsets must not wrap, in any operator that reads rows.

Rows that do not count take no memory, neither as inputs nor as their gradient, so that this fits
into a small machine. ``make test ARGS='-m huge'`` has tensors of which every element counts.
"""

import resource

import pytest
import torch
from accuracy import assert_same_bits
from untouched import untouched

import masked_loss_ext as mle
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

ROWS, COLUMNS = 65_600, 65_536  # 2^32 + 2^22 elements of bfloat16, 8.6 GB of address space
COUNTED = (0, 32_790, 65_599)  # below 2^31, above it, above 2^32
HEAD = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()


def peak_kib():
    """Of this process so far; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def every_element(mask):
    """As an element mask, of the same entries all along a row."""
    return mask.unsqueeze(-1).expand(-1, COLUMNS)


LOSSES = {
    "masked_cross_entropy": lambda x, y, on: mle.masked_cross_entropy(x, y, on),
    "gradient_in_forward": lambda x, y, on: mle.masked_cross_entropy(
        x, y, on, gradient_in_forward=True
    ),
    "row_statistics": lambda x, y, on: mle.row_statistics(x, y, on).entropy.sum(),
    "cross_entropy_terms": lambda x, y, on: cross_entropy_terms(
        x[None], y[None], on[None]
    ).log_prob.sum(),
    "squared_error": lambda x, y, on: mle.masked_mse(x, x.detach()[:1].expand_as(x), on),
    "element_mask": lambda x, y, on: mle.masked_mse(x, HEAD[:1].expand_as(x), every_element(on)),
    "linear_cross_entropy": lambda x, y, on: mle.masked_linear_cross_entropy(
        x, HEAD, y.remainder(3), on
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_more_than_2_to_32_elements(name):
    try:
        x = untouched(ROWS, COLUMNS)
    except OSError as error:
        pytest.skip(f"8.6 GB cannot be mapped here: {error}")
    values = torch.randn(len(COUNTED), COLUMNS).bfloat16()
    mask = torch.zeros(ROWS, dtype=torch.bool)
    for row, value in zip(COUNTED, values, strict=True):
        x[row] = value
        mask[row] = True
    x.requires_grad_()
    highest = peak_kib()
    loss = LOSSES[name](x, torch.full((ROWS,), 7), mask)
    loss.backward()
    assert peak_kib() - highest < 1 << 18, "a gradient of three rows takes their memory"
    few = values.clone().requires_grad_()
    expected = LOSSES[name](few, torch.full((3,), 7), torch.ones(3, dtype=torch.bool))
    expected.backward()
    assert_same_bits(loss.detach(), expected.detach())
    for i, row in enumerate(COUNTED):
        assert_same_bits(x.grad[row], few.grad[i], f"row {row}")
    for row in (1, 32_789, 65_598):
        assert not x.grad[row].any()
    assert (few.grad != 0).any()
