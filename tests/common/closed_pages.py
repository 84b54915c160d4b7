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
    rows = closed.nonzero().flatten().tolist()
    for row in rows:
        _protect(tensor.data_ptr() + row * PAGE, _CLOSED)
    try:
        yield tensor
    finally:
        for row in rows:
            _protect(tensor.data_ptr() + row * PAGE, _READ_WRITE)


def between_closed_pages(tensor, at_end=True):
    """A copy with the same strides, of which the last byte (else the first) lies beside a closed
    page: who reads beyond it is killed. The pages live as long as the copy."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((extent,), (1,), tensor.storage_offset())
    size = extent * tensor.element_size()
    inside = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, inside + 2 * PAGE)
    data = torch.frombuffer(memory, dtype=torch.uint8)
    start = PAGE + (inside - size) * at_end
    copy = data[start : start + size].view(tensor.dtype).copy_(flat)
    for page in (0, PAGE + inside):
        _protect(data.data_ptr() + page, _CLOSED)
    return copy.as_strided(tensor.shape, tensor.stride())


def _protect(address, access):
    """Of one page."""
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    assert protect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), access) == 0
