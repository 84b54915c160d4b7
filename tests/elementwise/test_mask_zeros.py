# SPDX-License-Identifier: BSD-3-Clause
"""What of a mask is off: 0 and -0 of floats, and of integers 0 alone, the sign bit by itself is on.

Two of every four values select, whatever the dtype is; the others stand before a NaN.
"""

import math

import pytest
import torch

import masked_loss_ext as mle

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SIGNED = (torch.int64, torch.int32, torch.int16, torch.int8)
UNSIGNED = (torch.uint8, torch.bool)
ROWS = 40  # more than a line of 64 bytes


def mask_of(dtype):
    """[ROWS, 4]: off, on, off, on."""
    if dtype.is_floating_point:
        values = [0.0, torch.finfo(dtype).smallest_normal / 2, -0.0, 0.5]  # a denormal number
    elif dtype in SIGNED:
        values = [0, torch.iinfo(dtype).min, 0, 1]
    else:
        values = [0, 1, 0, 255]
    return torch.tensor([values], dtype=torch.float64).to(dtype).expand(ROWS, 4).contiguous()


def dressed(mask):
    """As it is, and with strides."""
    return mask, mask.repeat_interleave(2, 1)[:, ::2]


every_dtype = pytest.mark.parametrize("dtype", FLOATING + SIGNED + UNSIGNED, ids=str)


@every_dtype
def test_of_elements(dtype):
    for mask in dressed(mask_of(dtype)):
        x = torch.full((ROWS, 4), 3.0)
        x[:, ::2] = math.nan
        x.requires_grad_()
        loss = mle.masked_mse(x, torch.ones(ROWS, 4), mask)
        loss.backward()
        assert loss == 4
        expected = torch.tensor([0.0, 2 * 2 / (2 * ROWS)] * 2).expand(ROWS, 4)
        torch.testing.assert_close(x.grad, expected)


@every_dtype
def test_of_rows(dtype):
    for mask in dressed(mask_of(dtype)):
        logits = torch.zeros(ROWS, 4, 2)
        logits[:, ::2] = math.nan
        loss = mle.masked_cross_entropy(logits, torch.zeros(ROWS, 4, dtype=torch.int64), mask)
        assert loss == pytest.approx(math.log(2))
