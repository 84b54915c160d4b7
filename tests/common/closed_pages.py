# SPDX-License-Identifier: BSD-3-Clause
"""Tensors of which some rows may not be read: each row is a page, and a page can be closed."""

import contextlib
import ctypes
import mmap
import sys

import pytest
import torch

PAGE = mmap.PAGESIZE
_READ_WRITE, _CLOSED = 3, 0


@contextlib.contextmanager
def closed_rows(values, closed):
    """A copy of values [N, PAGE bytes]; who reads a row of which closed [N] is on is killed."""
    if not sys.platform.startswith("linux"):
        pytest.skip("pages are closed by Linux's mprotect")
    assert values[0].numel() * values.element_size() == PAGE
    memory = mmap.mmap(-1, len(values) * PAGE)
    tensor = torch.frombuffer(memory, dtype=values.dtype).view(values.shape).copy_(values)
    protect = ctypes.CDLL(None, use_errno=True).mprotect

    def allow(row, access):
        address = ctypes.c_void_p(tensor.data_ptr() + row * PAGE)
        assert protect(address, ctypes.c_size_t(PAGE), access) == 0

    rows = closed.nonzero().flatten().tolist()
    for row in rows:
        allow(row, _CLOSED)
    try:
        yield tensor
    finally:
        for row in rows:
            allow(row, _READ_WRITE)
