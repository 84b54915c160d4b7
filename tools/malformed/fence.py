# SPDX-License-Identifier: BSD-3-Clause
"""Tensors with a closed page on either side: who reads beyond one is killed."""

from __future__ import annotations

import ctypes
import mmap

import torch

PAGE = mmap.PAGESIZE
READ_WRITE, CLOSED = 3, 0  # PROT_READ | PROT_WRITE, PROT_NONE


def protect(address: int, access: int) -> None:
    """Of one page."""
    call = ctypes.CDLL(None, use_errno=True).mprotect
    if call(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), access) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def between_closed_pages(tensor: torch.Tensor, at_end: bool = True) -> torch.Tensor:
    """A copy with the same strides, of which the last byte (else the first) lies beside a closed
    page. The pages live as long as the copy."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.detach().as_strided((extent,), (1,), tensor.storage_offset())
    size = extent * tensor.element_size()
    inside = -(-size // PAGE) * PAGE
    data = torch.frombuffer(mmap.mmap(-1, inside + 2 * PAGE), dtype=torch.uint8)
    start = PAGE + (inside - size) * at_end
    copy = data[start : start + size].view(tensor.dtype).copy_(flat)
    for page in (0, PAGE + inside):
        protect(data.data_ptr() + page, CLOSED)
    return copy.as_strided(tensor.shape, tensor.stride())
