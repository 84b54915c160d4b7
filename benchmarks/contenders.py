# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmarks have in common: data in place, compiled formulas, and what bounds the times.

A bound is made of the reads and writes alone that a computation cannot do without. It is timed in
the same rounds as the contenders, because a machine's bandwidth changes from minute to minute.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .harness import Contender

COPY, FILL = "copy", "fresh fill"
HUGE_PAGE = 1 << 21
MADV_HUGEPAGE = 14


def compiled(formula: Callable) -> Callable:
    """torch.compile at its best: one graph for exactly these shapes and no other kept."""
    torch._dynamo.reset()
    return torch.compile(formula, fullgraph=True, dynamic=False)


def placed(data: tuple, device: str, gradient: bool = True) -> list[tuple]:
    """On CUDA enough copies that together they are four times the L2 cache (at most 8)."""
    copies = 1
    if torch.device(device).type == "cuda":
        size = sum(tensor.nbytes for tensor in data)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        copies = min(8, max(1, math.ceil(4 * cache / size)))
    sets = [tuple(tensor.to(device, copy=True) for tensor in data) for _ in range(copies)]
    for first, *_ in sets:
        first.requires_grad_(gradient)
    return sets


def plain_copy(bytes_moved: int, device: str) -> Contender:
    """Reads half of ``bytes_moved`` and writes the other half, to pages already there."""
    source = torch.ones(bytes_moved // 2, dtype=torch.uint8, device=device)
    pair = (source, torch.ones_like(source))

    def copy(source: Tensor, target: Tensor) -> Tensor:
        return target.copy_(source)

    return Contender(COPY, copy, [pair], weigh=False, role="information")


def fresh_fill(gradient_bytes: int, device: str) -> Contender:
    """What a write of the gradient costs in memory that was just asked for."""
    like = torch.empty(0, dtype=torch.uint8, device=device)

    def fill(like: Tensor) -> Tensor:
        return like.new_empty(gradient_bytes).fill_(1)

    return Contender(FILL, fill, [(like,)], weigh=False, role="information")


def huge_empty(size: int, device: str) -> Tensor:
    """[size] bytes nobody has touched, in huge pages where the system grants them on request."""
    if torch.device(device).type != "cpu" or sys.platform != "linux":
        return torch.empty(size, dtype=torch.uint8, device=device)
    # From one boundary to the next, or the first and the last page would be small ones.
    whole = math.ceil(size / HUGE_PAGE) * HUGE_PAGE
    block = torch.empty(whole + HUGE_PAGE, dtype=torch.uint8)
    skip = -block.data_ptr() % HUGE_PAGE
    # Advice only: a kernel without huge pages says no, and the small ones are what it has.
    start, length = ctypes.c_void_p(block.data_ptr() + skip), ctypes.c_size_t(whole)
    ctypes.CDLL(None).madvise(start, length, MADV_HUGEPAGE)
    return block[skip : skip + size]


READS = {"sum": torch.sum, "amax": torch.amax, "dot": lambda flat: torch.dot(flat, flat)}


def fastest_read(flat: Tensor) -> Callable[[Tensor], Tensor]:
    """Of PyTorch's reductions that read all of ``flat`` once, the fastest on this machine."""

    def best_time(read: Callable) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            read(flat).item()
            times.append(time.perf_counter() - start)
        return min(times)

    return min(READS.values(), key=best_time)


def as_words(rows: Tensor) -> Tensor:
    """The bytes of contiguous ``rows`` as float32 [...], the dtype that is read fastest."""
    data = rows.detach().reshape(-1).view(torch.uint8)
    return data[: data.numel() // 4 * 4].view(torch.float32)
