# SPDX-License-Identifier: BSD-3-Clause
"""More than 2^32 logits: offsets must not wrap.

Rows that do not count take no memory, neither as logits nor as their gradient, so that this fits
into a small machine.
"""

import mmap

import pytest
import torch
from accuracy import assert_same_bits

import masked_loss_ext as mle

ROWS, CLASSES = 65_600, 65_536  # 2^32 + 2^22 bfloat16 logits, 8.6 GB of address space
COUNTED = (0, 32_790, 65_599)  # below 2^31, above it, above 2^32


def untouched(rows, classes):
    """Logits in memory that is mapped, and that nobody has touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has the name since 3.13
    storage = mmap.mmap(-1, rows * classes * 2, flags=mmap.MAP_PRIVATE | no_reserve)
    return torch.frombuffer(storage, dtype=torch.bfloat16).view(rows, classes)


def test_more_than_2_to_32_logits():
    try:
        logits = untouched(ROWS, CLASSES)
    except OSError as error:
        pytest.skip(f"8.6 GB cannot be mapped here: {error}")
    values = torch.randn(len(COUNTED), CLASSES).bfloat16()
    mask = torch.zeros(ROWS, dtype=torch.bool)
    target = torch.full((ROWS,), 7)
    for row, value in zip(COUNTED, values, strict=True):
        logits[row] = value
        mask[row] = True
    logits.requires_grad_()
    loss = mle.masked_cross_entropy(logits, target, mask)
    loss.backward()
    few = values.clone().requires_grad_()
    expected = mle.masked_cross_entropy(few, torch.full((3,), 7))
    expected.backward()
    assert_same_bits(loss.detach(), expected.detach())
    for i, row in enumerate(COUNTED):
        assert_same_bits(logits.grad[row], few.grad[i], f"row {row}")
    for row in (1, 32_789, 65_598):
        assert not logits.grad[row].any()
