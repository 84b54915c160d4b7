# SPDX-License-Identifier: BSD-3-Clause
"""Tensors of which some pages can neither be read nor written: who does is killed."""

import contextlib
import sys

import pytest
import torch

from tools.malformed.fence import CLOSED, PAGE, READ_WRITE, between_closed_pages, protect


def rows_on_pages(values):
    """The same rows, each beginning on a page of its own."""
    *outer, columns = values.shape
    width = values.element_size()
    stride = -(-columns * width // PAGE) * PAGE // width
    apart = torch.zeros(*outer, stride, dtype=values.dtype)[..., :columns]
    return apart.copy_(values)


@contextlib.contextmanager
def closed_pages(values, excluded, at_end=False):
    """A copy of the values between closed pages, and the number of its own bytes that are closed:
    every page on which nothing lies but what ``excluded`` is on for."""
    if not sys.platform.startswith("linux"):
        pytest.skip("pages are closed by Linux's mprotect")
    tensor, width = between_closed_pages(values, at_end), values.element_size()
    extent = 1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True))
    needed = torch.zeros(extent, dtype=torch.bool)
    needed.as_strided(values.shape, values.stride()).copy_(~excluded)
    first = tensor.data_ptr() // PAGE
    pages = (torch.arange(extent) * width + tensor.data_ptr() % PAGE) // PAGE
    closed = sorted(set(pages.unique().tolist()) - set(pages[needed].unique().tolist()))
    for page in closed:
        protect((first + page) * PAGE, CLOSED)
    try:
        yield tensor, len(closed) * PAGE
    finally:
        for page in closed:
            protect((first + page) * PAGE, READ_WRITE)


@contextlib.contextmanager
def all_closed(given, excluded, at_end=False, open_ones=()):
    """closed_pages of each tensor among the named values, and the bytes of all; excluded: name ->
    where, if anywhere. Of open ones nothing is closed but what lies around."""
    nothing = torch.zeros((), dtype=torch.bool)
    with contextlib.ExitStack() as stack:
        copies, closed = dict(given), 0
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.numel() > 0:
                off = nothing if name in open_ones else excluded.get(name, nothing)
                pages = closed_pages(value, off.expand(value.shape), at_end)
                copies[name], size = stack.enter_context(pages)
                closed += size
        yield copies, closed


@contextlib.contextmanager
def closed_rows(values, closed):
    """A copy of values [N, whole pages]; who reads a row of which closed [N] is on is killed."""
    off = closed.view(-1, *[1] * (values.dim() - 1)).expand(values.shape)
    with closed_pages(values, off) as (tensor, size):
        assert size == int(closed.sum()) * values[0].numel() * values.element_size()
        yield tensor
