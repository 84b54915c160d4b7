# SPDX-License-Identifier: BSD-3-Clause
"""Tensors that are larger than they may become."""

import mmap

import torch


def untouched(rows, columns):
    """A tensor in memory that is mapped, and that nobody has touched."""
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has the name since 3.13
    storage = mmap.mmap(-1, rows * columns * 2, flags=mmap.MAP_PRIVATE | no_reserve)
    return torch.frombuffer(storage, dtype=torch.bfloat16).view(rows, columns)
