# SPDX-License-Identifier: BSD-3-Clause
"""No operator loses memory from call to call: not for its strings, as the C++ border of PyTorch up
to 2.13 may, 50 bytes for each. MASKED_LOSS_EXT_MEMORY_CALLS=1000000 asks longer."""

import ctypes
import gc
import os

import pytest
import torch
from operator_calls import RETURNING_STRINGS, arguments_of, operators, ops

CALLS = int(os.environ.get("MASKED_LOSS_EXT_MEMORY_CALLS", 5_000))
LARGEST_GROWTH = 5  # bytes per call


class MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
        *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
    )]  # fmt: skip


def allocated():
    """Bytes that malloc has given and not got back: exact, other than the resident memory."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("the C library has no mallinfo2 to count by")
    mallinfo2.restype = MallInfo
    found = mallinfo2()
    return found.uordblks + found.hblkhd


# What returns a string loses it in PyTorch in the same way; it is called once in a process.
@pytest.mark.parametrize("name", sorted(set(operators()) - RETURNING_STRINGS))
def test_memory_does_not_grow_with_the_calls(name):
    op, arguments = getattr(ops, name).default, arguments_of(name)
    with torch.no_grad():
        for _ in range(CALLS // 10):
            op(**arguments)
        gc.collect()
        before = allocated()
        for _ in range(CALLS):
            op(**arguments)
    gc.collect()
    growth = (allocated() - before) / CALLS
    assert growth < LARGEST_GROWTH, f"{growth:.0f} bytes per call"
