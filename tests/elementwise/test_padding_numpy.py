# SPDX-License-Identifier: BSD-3-Clause
"""Lengths that come from NumPy; apart, so that test_padding.py runs without it."""

import numpy as np
import pytest
import torch

import masked_loss_ext as mle
from tests.elementwise.test_padding import check_bad_lengths, check_lengths


@pytest.mark.parametrize(
    "lengths",
    [
        np.array([0, 1, 2]),
        np.array([0, 1, 2], dtype=np.uint16),
        np.array([2, 1, 0])[::-1],
        np.array([0, 1, 2], dtype=object),
        np.array([0, 1, 2], dtype=">i4"),
        np.frombuffer(bytes([0, 1, 2]), dtype=np.uint8),
        [np.int64(0), 1, torch.tensor(2)],
    ],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}",
)
def test_lengths_of_any_kind(lengths):
    check_lengths(lengths)


def test_no_lengths():
    assert mle.lengths_to_mask(np.array([])).shape == (0, 0)


@pytest.mark.parametrize(
    "lengths,text",
    [
        (np.array([True]), "lengths must be integers, got torch.bool"),
        (np.array([1.5]), "lengths must be integers, got torch.float32"),
        (np.array(3), "lengths must have 1 dimensions [B], got []"),
        (np.array(0), "lengths must have 1 dimensions [B], got []"),
    ],
)
def test_bad_lengths(lengths, text):
    check_bad_lengths((lengths,), ValueError, text)
