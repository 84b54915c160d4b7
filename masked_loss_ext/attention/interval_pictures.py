# SPDX-License-Identifier: BSD-3-Clause
"""What a mask of intervals looks like: block statistics, characters, a picture file.

``stats``, ``ascii`` and ``png`` are methods of ``RowIntervals``.
"""

from os import PathLike
from typing import Any, NamedTuple

import torch

from . import ints

COLOURS = ((255, 255, 255), (164, 196, 232), (38, 84, 148))  # no, some, all pairs allowed
LINE = (222, 222, 222)
LARGEST_PICTURE = 1 << 15  # pixels a side


class MaskStats(NamedTuple):
    """Pairs and blocks of a mask, over the whole batch."""

    pairs: int  # allowed
    density: float  # of all pairs
    blocks: int
    full_blocks: int
    partial_blocks: int
    empty_blocks: int
    empty_rows: int  # queries that attend to nothing


def stats(intervals: Any, block_size: int | tuple[int, int] = 128) -> MaskStats:
    """MaskStats: allowed pairs and blocks by kind. Waits for the device."""
    block = ints.block_pair("RowIntervals.stats", block_size)
    merged = intervals.merged()
    lo, hi = merged.lo.clamp_min(0).long(), merged.hi.clamp_max(intervals.kv_len).long()
    per_row = (hi - lo).clamp_min(0).sum(-2)
    pairs, all_pairs = int(per_row.sum()), per_row.numel() * intervals.kv_len
    lists = intervals._block_lists(block, False)
    partial, full = int(lists[0].sum()), int(lists[2].sum())
    q_blocks, kv_blocks = -(-intervals.q_len // block[0]), -(-intervals.kv_len // block[1])
    blocks = per_row.numel() // max(intervals.q_len, 1) * q_blocks * kv_blocks
    return MaskStats(
        pairs=pairs,
        density=pairs / all_pairs if all_pairs else 0.0,
        blocks=blocks,
        full_blocks=full,
        partial_blocks=partial,
        empty_blocks=blocks - full - partial,
        empty_rows=int((per_row == 0).sum()),
    )


def ascii(intervals: Any, width: int = 64, batch: int = 0) -> str:
    """Picture of one character per cell: # all pairs allowed, + some, . none."""
    name = "RowIntervals.ascii"
    width = ints.length(name, "width", width, 1, None)
    longer = max(intervals.q_len, intervals.kv_len, 1)
    cells = _cells(intervals, -(-longer // width), batch, name)
    return "\n".join(["".join([".+#"[value] for value in row]) for row in cells.tolist()])


def png(
    intervals: Any,
    path: str | PathLike,
    *,
    size: int = 768,
    block_size: int | None = 128,
    batch: int = 0,
) -> None:
    """Writes a picture of the mask: dark = allowed, light = partly, with lines between blocks.

    Needs Pillow or matplotlib.

    Args:
        path: file name.
        size: the longer side in pixels, about.
        block_size: distance of the lines; None draws none.
        batch: which mask of ``[B, ...]``; 0 where there is no B.
    """
    name = "RowIntervals.png"
    size = ints.length(name, "size", size, 1, LARGEST_PICTURE)
    if block_size is not None:
        block_size = ints.length(name, "block_size", block_size, 1)
    longer = max(intervals.q_len, intervals.kv_len, 1)
    cell = max(1, -(-longer // size))
    cells = _cells(intervals, cell, batch, name)
    scale = max(1, size // max(cells.shape))
    pixels = torch.tensor(COLOURS, dtype=torch.uint8)[cells.long()]
    pixels = pixels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    if block_size is not None and block_size * scale >= 8 * cell:  # else lines alone would be seen
        for dim in (0, 1):
            ends = range(block_size, cells.shape[dim] * cell, block_size)
            lines = torch.tensor([end * scale // cell for end in ends], dtype=torch.int64)
            line = torch.tensor(LINE, dtype=torch.uint8)
            view = pixels.transpose(0, dim)
            view[lines] = torch.minimum(view[lines], line)
    _write(pixels, path)


def _cells(intervals, cell, batch, name):
    """``[rows, columns]`` uint8 on the host: 0 no pair of the cell is allowed, 1 some, 2 all."""
    size = intervals.lo.shape[0] if intervals.lo.dim() == 3 else 1
    batch = ints.length(name, "batch", batch, -size, size - 1)
    if intervals.lo.dim() == 3:
        intervals = type(intervals)(intervals.lo[batch], intervals.hi[batch], intervals.kv_len)
    lists = intervals._block_lists((cell, cell), False)[:4]
    some, some_at, full, full_at = (x[0, 0].cpu() for x in lists)
    cells = torch.zeros(some_at.shape, dtype=torch.uint8)
    order = torch.arange(some_at.shape[1])
    for value, count, at in ((1, some, some_at), (2, full, full_at)):
        row, slot = (order < count.unsqueeze(1)).nonzero(as_tuple=True)
        cells[row, at[row, slot].long()] = value
    return cells


def _write(pixels, path):
    height, width, _ = pixels.shape
    try:
        from PIL import Image
    except ImportError:
        try:
            from matplotlib.image import imsave
        except ImportError:
            raise ImportError(
                "RowIntervals.png: Pillow or matplotlib is needed to write a picture: "
                "pip install pillow"
            ) from None
        imsave(path, pixels.numpy())
        return
    Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist())).save(path)
