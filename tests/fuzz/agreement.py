# SPDX-License-Identifier: BSD-3-Clause
"""The accuracy rule of the suite, quickly.

What is within twice a unit in the last place of the truth passes that rule whatever the size of its
terms is, and so does what is within the smallest error that the rule takes the reference for. Most
results are; only for the others is it worth 10 ms to find out how exact the reference is.
"""

import math

import torch
from accuracy import assert_same_bits

INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_close(actual, truth, terms=1, sizes=None):
    """Whether {name: tensor} surely pass; NaN, inf and a 0 that is none are left to the rule.

    terms: that are summed, at least. sizes: a lower bound of the rule's size of a result, the truth
    itself where there is none.
    """
    sizes = sizes or {}
    for name, result in actual.items():
        true = truth[name]
        if result.shape != true.shape:
            return False
        if not result.dtype.is_floating_point:
            if not torch.equal(result, true):
                return False
            continue
        if result.numel() == 0:
            continue
        wide = torch.float64 if result.dtype == torch.float64 else torch.float32
        eps = torch.finfo(wide).eps
        size = true.abs()
        allowed = sizes.get(name, size) * ((math.log2(max(terms, 1)) + 8) * eps)
        allowed = allowed + size * (2 * torch.finfo(result.dtype).eps)
        if not ((result.double() - true).abs() <= allowed).all():
            return False
        if name in sizes and ((true == 0) & (result != 0)).any():
            return False
    return True


def assert_bits(actual, expected, what):
    """{name: tensor} to the bit."""
    assert actual.keys() == expected.keys(), f"{what}: {list(actual)} for {list(expected)}"
    for name, result in actual.items():
        other = expected[name]
        if result.dtype == other.dtype and result.shape == other.shape:
            view = INTEGER_VIEW[result.dtype.itemsize]
            same = (result, other) if result.dim() else (result.reshape(1), other.reshape(1))
            if torch.equal(*(x.contiguous().view(view) for x in same)):
                continue
        assert_same_bits(result, other, f"{what}: {name}")
