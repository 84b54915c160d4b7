# SPDX-License-Identifier: BSD-3-Clause
"""Nothing is left of a call, be it good or refused: not of its strings, as the C++ border of
PyTorch up to 2.13 may, 50 bytes for each, nor of an error's text and traceback.
``python -m tools.memory`` asks a million times."""

import pytest
import torch
from growth import (
    CALLED_OFTEN,
    REFUSING_NOTHING,
    can_count,
    good_call,
    growth,
    refused,
    refused_call,
)

from tests.contracts.test_error_memory import CALLS as REFUSED_IN_PYTHON

CALLS, REFUSED = 5_000, 1_000
LARGEST_GROWTH = 5  # bytes per call
LARGEST_BLOCKS = 0.05  # of Python's, per call

if not can_count():
    pytest.skip("the C library has no mallinfo2 to count by", allow_module_level=True)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # of tiny calls the start of threads would take longest


def assert_none(found):
    assert found.bytes < LARGEST_GROWTH, f"{found.bytes:.0f} bytes per call"
    assert found.blocks < LARGEST_BLOCKS, f"{found.blocks:.2f} of Python's blocks per call"


@pytest.mark.parametrize("name", CALLED_OFTEN)
def test_memory_does_not_grow_with_the_calls(name):
    assert_none(growth(good_call(name), CALLS))


@pytest.mark.parametrize("name", sorted(set(CALLED_OFTEN) - REFUSING_NOTHING))
def test_nor_with_refused_calls(name):
    assert_none(growth(refused_call(name), REFUSED))


@pytest.mark.parametrize("name", REFUSED_IN_PYTHON)
def test_nor_with_calls_that_python_refuses(name):
    x = torch.randn(2, 5, requires_grad=True)
    assert_none(growth(refused(lambda: REFUSED_IN_PYTHON[name](x)), REFUSED))


def test_what_is_kept_is_seen():
    kept = []
    assert growth(lambda: kept.append(torch.empty(10)), 100).bytes > LARGEST_GROWTH
    assert growth(lambda: kept.append([1.5]), 100).blocks > LARGEST_BLOCKS
