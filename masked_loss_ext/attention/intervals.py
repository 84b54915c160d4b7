# SPDX-License-Identifier: BSD-3-Clause
"""RowIntervals: an attention mask as a few intervals of keys per query, O(S) memory."""

import torch
from torch.nn.attention.flex_attention import BlockMask

from .._checks import check_flags, check_int, check_tensor, shape_text
from ..ops.block_mask import interval_block_lists
from . import _algebra, _documents, _host, _pictures, _sources


class RowIntervals:
    r"""An attention mask: query q may see key k where ``lo[r][q] <= k < hi[r][q]`` for any r.

    >>> documents = RowIntervals.from_document_ids(torch.tensor([7, 7, 7, 2, 2, 2, 2, 2]))
    >>> mask = documents & RowIntervals.causal(8)
    >>> print(mask.ascii())
    #.......
    ##......
    ###.....
    ...#....
    ...##...
    ...###..
    ...####.
    ...#####
    >>> block_mask = mask.block_mask()  # for flex_attention; mask.dense() for any other

    Masks that are intervals: documents, padding, causal, windows, prefixes, sinks, cross attention,
    nested dropout, shared prefixes, block diffusion; and what ``&`` and ``|`` make of them. For the
    rest (a pattern with holes in each row, equal ids that are not contiguous) take
    ``create_block_mask``.

    The sources ``from_...``, ``full``, ``causal``, ``sliding_window``, ``prefix_lm``, ``sinks``,
    ``cross``, ``shared_prefix`` and ``block_diffusion`` say what they take;
    ``PackedLayout.intervals`` is the one for packed samples with nested dropout.

    Args:
        lo, hi: ``[R, Sq]``, ``[B, R, Sq]`` or ``[Sq]`` int32, R <= 8; empty where ``hi <= lo``.
            Without B, or with B = 1, it is the mask of every batch row, of however many.
        kv_len: number of keys; intervals are cut to ``[0, kv_len)``.
    """

    MAX_INTERVALS = 8

    def __init__(self, lo, hi, kv_len):
        name = "RowIntervals"
        for argument, tensor in (("lo", lo), ("hi", hi)):
            check_tensor(name, argument, tensor)
            if tensor.dtype != torch.int32:
                raise ValueError(f"{name}: {argument} must be torch.int32, got {tensor.dtype}")
        if lo.shape != hi.shape or not 1 <= lo.dim() <= 3:
            raise ValueError(
                f"{name}: lo and hi must be [R, Sq] or [B, R, Sq] of one shape, got "
                f"{shape_text(lo)} and {shape_text(hi)}"
            )
        kv_len = _host.length(name, "kv_len", kv_len)
        if lo.dim() == 1:
            lo, hi = lo.unsqueeze(0), hi.unsqueeze(0)
        if not 1 <= lo.shape[-2] <= self.MAX_INTERVALS:
            raise ValueError(
                f"{name}: lo must have 1 to {self.MAX_INTERVALS} intervals per row, got "
                f"{lo.shape[-2]}"
            )
        self.lo, self.hi, self.kv_len = lo, hi, kv_len

    @property
    def q_len(self):
        return self.lo.shape[-1]

    @property
    def device(self):
        return self.lo.device

    def __repr__(self):
        rows = "" if self.lo.dim() == 2 else f"{self.lo.shape[0]} x "
        return (
            f"RowIntervals({rows}{self.q_len} queries, {self.kv_len} keys, "
            f"{self.lo.shape[-2]} per row, {self.device})"
        )

    def to(self, device):
        if self.lo.device == device:
            return self
        return RowIntervals(self.lo.to(device), self.hi.to(device), self.kv_len)

    def rows(self, q0, q1):
        """The mask of queries q0 to q1 - 1, all keys: for decoding and chunked prefill.

        >>> RowIntervals.causal(8).rows(5, 7).dense().int()
        tensor([[1, 1, 1, 1, 1, 1, 0, 0],
                [1, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.int32)

        A sliced ``BlockMask`` keeps its old lengths and is refused by ``flex_attention``; the block
        mask of sliced rows is one of its own.
        """
        for argument, bound in (("q0", q0), ("q1", q1)):
            check_int("RowIntervals.rows", argument, bound)
        if not 0 <= q0 <= q1 <= self.q_len:
            raise ValueError(
                f"RowIntervals.rows: q0 and q1 must be within the {self.q_len} queries, got {q0} "
                f"and {q1}"
            )
        return RowIntervals(self.lo[..., q0:q1], self.hi[..., q0:q1], self.kv_len)

    def __and__(self, other):
        return _algebra.combine(self, other, _algebra.intersection, "&")

    def __or__(self, other):
        return _algebra.combine(self, other, _algebra.union, "|")

    def merged(self, slots=None):
        """The same mask with sorted intervals that neither overlap nor touch.

        ``slots``: so many per row, the last ones empty. None keeps their number; 0 takes as many as
        are needed, which waits for the device. Too few are refused, where the mask is on the CPU.
        """
        if slots is not None:
            slots = _host.length("RowIntervals.merged", "slots", slots, 0, self.MAX_INTERVALS)
        return RowIntervals(*_algebra.merge_into(self.lo, self.hi, slots), self.kv_len)

    def block_mask(self, block_size=128, with_q=True):
        """A BlockMask for ``flex_attention``, equal in every index to ``create_block_mask``'s.

        Args:
            block_size: int, or (query block, key block).
            with_q: False leaves out what only the backward reads.
        """
        q_block, kv_block = block_pair("RowIntervals.block_mask", block_size)
        check_flags("RowIntervals.block_mask", {"with_q": with_q})
        lo, hi = self.lo, self.hi
        if lo.dim() == 2:
            lo, hi = lo.unsqueeze(0), hi.unsqueeze(0)
        lists = interval_block_lists(lo, hi, self.kv_len, q_block, kv_block, with_q)
        if not with_q:
            lists = (*lists[:4], None, None, None, None)
        return BlockMask(
            (self.q_len, self.kv_len),
            *lists,
            BLOCK_SIZE=(q_block, kv_block),
            mask_mod=self.mask_mod(),
        )

    def mask_mod(self):
        """``mask_mod(b, h, q, kv)`` that looks up the query's row alone.

        Closures of one code object over fresh tensors: a new mask in each step does not recompile,
        as long as the number of intervals per row stays. Made inside a compiled function on the CPU
        it reads a copy of them: inductor's FlexAttention takes none that it has computed itself.
        """
        return interval_mask_mod(self.lo, self.hi, opaque)

    def dense(self):
        """``[Sq, kv_len]`` bool, or ``[B, 1, Sq, kv_len]``: broadcasts over batch and heads.

        For ``F.scaled_dot_product_attention`` and for tests; takes O(Sq * kv_len) memory.
        """
        kv = torch.arange(self.kv_len, dtype=torch.int32, device=self.device)
        mask = None
        for lo, hi in zip(self.lo.unbind(-2), self.hi.unbind(-2), strict=True):
            inside = (kv >= lo.unsqueeze(-1)) & (kv < hi.unsqueeze(-1))
            mask = inside if mask is None else mask | inside
        return mask if self.lo.dim() == 2 else mask.unsqueeze(1)

    def stats(self, block_size=128):
        """MaskStats: allowed pairs and blocks by kind. Waits for the device."""
        return _pictures.stats(self, block_pair("RowIntervals.stats", block_size))

    def ascii(self, width=64, batch=0):
        """Picture of one character per cell: # all pairs allowed, + some, . none."""
        return _pictures.ascii(self, width, batch)

    def png(self, path, *, size=768, block_size=128, batch=0):
        """Writes a picture of the mask: dark = allowed, light = partly, with lines between blocks.

        Needs Pillow or matplotlib.

        Args:
            path: file name.
            size: the longer side in pixels, about.
            block_size: distance of the lines; None draws none.
            batch: which mask of ``[B, ...]``; 0 where there is no B.
        """
        return _pictures.png(self, path, size, block_size, batch)

    full = staticmethod(_sources.full)
    causal = staticmethod(_sources.causal)
    sliding_window = staticmethod(_sources.sliding_window)
    prefix_lm = staticmethod(_sources.prefix_lm)
    sinks = staticmethod(_sources.sinks)
    from_document_ids = staticmethod(_documents.from_document_ids)
    from_position_ids = staticmethod(_documents.from_position_ids)
    from_cu_seqlens = staticmethod(_documents.from_cu_seqlens)
    from_padding = staticmethod(_documents.from_padding)
    cross = staticmethod(_sources.cross)
    shared_prefix = staticmethod(_sources.shared_prefix)
    block_diffusion = staticmethod(_sources.block_diffusion)


def opaque(tensor):
    """What a mask_mod may capture: inductor's CPU template takes only inputs of the graph and
    results of operators that it does not know. Elsewhere the tensor itself."""
    if tensor.device.type == "cpu" and torch.compiler.is_compiling():
        return torch.ops.masked_loss_ext._snapshot(tensor)
    return tensor


def interval_mask_mod(lo, hi, through=lambda tensor: tensor):
    # Separate 1-D tensors, not one stacked: kernels that turn a mask_mod into intervals of their
    # own understand only these, and 2-D indexing is slow in others.
    if lo.dim() == 3 and lo.shape[0] == 1:  # the same for every batch row
        lo, hi = lo.squeeze(0), hi.squeeze(0)
    if lo.dim() == 2 and lo.shape[0] == 1:  # most masks; two unbinds cost three times as much
        return _one(through(lo.squeeze(0)), through(hi.squeeze(0)))
    los, his = ([through(x) for x in bounds.unbind(-2)] for bounds in (lo, hi))
    if lo.dim() == 3:
        return _batched(los, his)
    if len(los) == 2:
        return _two(*los, *his)
    return _several(los, his)


def _one(lo, hi):
    def mask_mod(b, h, q, kv):
        return (kv >= lo[q]) & (kv < hi[q])

    return mask_mod


def _two(lo0, lo1, hi0, hi1):
    def mask_mod(b, h, q, kv):
        return ((kv >= lo0[q]) & (kv < hi0[q])) | ((kv >= lo1[q]) & (kv < hi1[q]))

    return mask_mod


def _several(los, his):
    def mask_mod(b, h, q, kv):
        allowed = (kv >= los[0][q]) & (kv < his[0][q])
        for lo, hi in zip(los[1:], his[1:], strict=True):
            allowed = allowed | ((kv >= lo[q]) & (kv < hi[q]))
        return allowed

    return mask_mod


def _batched(los, his):
    def mask_mod(b, h, q, kv):
        allowed = (kv >= los[0][b, q]) & (kv < his[0][b, q])
        for lo, hi in zip(los[1:], his[1:], strict=True):
            allowed = allowed | ((kv >= lo[b, q]) & (kv < hi[b, q]))
        return allowed

    return mask_mod


def block_pair(function, block_size):
    """block_size -> (query block, key block)."""
    if type(block_size) is int:
        return (_host.length(function, "block_size", block_size, 1),) * 2
    pair = _pair(function, "block_size", block_size)
    if len(pair) != 2:
        raise ValueError(f"{function}: block_size must be an int or a pair, got {block_size!r}")
    return tuple([_host.length(function, "block_size", size, 1) for size in pair])


def window_pair(function, window):
    """window -> (left, right), None for no limit."""
    if window is None:
        return None, None
    pair = _pair(function, "window", window)
    if len(pair) != 2:
        raise ValueError(f"{function}: window must be an int or (left, right), got {window!r}")
    return tuple([side if side is None else _host.reach(function, "window", side) for side in pair])


def _pair(function, name, value):
    if isinstance(value, (list, tuple)):
        return value
    if value is None or type(value) is int:
        return value, value
    if not hasattr(value, "__iter__") or _host.is_number(value) or isinstance(value, str):
        return value, value
    return _host.listed(function, name, value, "an int or a pair of ints")
