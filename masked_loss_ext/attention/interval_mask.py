# SPDX-License-Identifier: BSD-3-Clause
"""IntervalMask: lo, hi and kv_len, what can be asked of them, and masks made of other masks."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn.attention.flex_attention import BlockMask

from .._checks import check_flags, check_int, check_tensor, refusal, shape_text
from ..ops.block_mask import MAX_INTERVALS, interval_block_lists
from . import interval_pictures, ints

Mask = TypeVar("Mask", bound="IntervalMask")
_NOWHERE = 2**31 - 1


class IntervalMask:
    """What ``RowIntervals`` says, without its sources."""

    MAX_INTERVALS = MAX_INTERVALS

    def __init__(self, lo: torch.Tensor, hi: torch.Tensor, kv_len: int) -> None:
        name = "RowIntervals"
        for argument, tensor in (("lo", lo), ("hi", hi)):
            check_tensor(name, argument, tensor)
            if tensor.dtype != torch.int32:
                raise refusal(name, argument, "be torch.int32", tensor.dtype)
        if lo.shape != hi.shape or not 1 <= lo.dim() <= 3:
            rule = "be [R, Sq] or [B, R, Sq] of one shape"
            raise refusal(name, "lo and hi", rule, f"{shape_text(lo)} and {shape_text(hi)}")
        kv_len = ints.length(name, "kv_len", kv_len)
        if lo.dim() == 1:
            lo, hi = lo.unsqueeze(0), hi.unsqueeze(0)
        if not 1 <= lo.shape[-2] <= MAX_INTERVALS:
            raise refusal(name, "lo", f"have 1 to {MAX_INTERVALS} intervals per row", lo.shape[-2])
        self.lo, self.hi, self.kv_len = lo, hi, kv_len

    @classmethod
    def _of(cls: type[Mask], lo: torch.Tensor, hi: torch.Tensor, kv_len: int) -> Mask:
        """Of what this package has computed: nothing to check."""
        mask = cls.__new__(cls)
        mask.lo, mask.hi, mask.kv_len = lo, hi, kv_len
        return mask

    @classmethod
    def _where_any(cls: type[Mask], lo: torch.Tensor, hi: torch.Tensor, kv_len: int) -> Mask:
        """Of any integers: int32, and (0, 0) where there is nothing between them."""
        empty = hi <= lo
        lo, hi = (x.masked_fill(empty, 0).to(torch.int32) for x in (lo, hi))
        return cls._of(lo, hi, kv_len)

    @property
    def q_len(self) -> int:
        return self.lo.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.lo.device

    def __repr__(self):
        rows = "" if self.lo.dim() == 2 else f"{self.lo.shape[0]} x "
        return (
            f"RowIntervals({rows}{self.q_len} queries, {self.kv_len} keys, "
            f"{self.lo.shape[-2]} per row, {self.device})"
        )

    def to(self: Mask, device: torch.device | str) -> Mask:
        if self.lo.device == device:
            return self
        return self._of(self.lo.to(device), self.hi.to(device), self.kv_len)

    def rows(self: Mask, q0: int, q1: int) -> Mask:
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
        return self._of(self.lo[..., q0:q1], self.hi[..., q0:q1], self.kv_len)

    def __and__(self: Mask, other: Mask) -> Mask:
        return _combine(self, other, _intersection, "&")

    def __or__(self: Mask, other: Mask) -> Mask:
        return _combine(self, other, _union, "|")

    def merged(self: Mask, slots: int | None = None) -> Mask:
        """The same mask with sorted intervals that neither overlap nor touch.

        ``slots``: so many per row, the last ones empty. None keeps their number; 0 takes as many as
        are needed, which waits for the device. Too few are refused, where the mask is on the CPU.
        """
        name, held = "RowIntervals.merged", self.lo.shape[-2]
        if slots is not None:
            slots = ints.length(name, "slots", slots, 0, MAX_INTERVALS)
        lo, hi = _merge(self.lo, self.hi, slots)
        if slots and slots > held:
            added = (0, 0, 0, slots - held)
            lo, hi = (torch.nn.functional.pad(x, added) for x in (lo, hi))
        elif slots and slots < held and ints.is_readable(self.lo):
            needed = _merge(self.lo, self.hi, 0)[0].shape[-2]
            if needed > slots:
                raise refusal(name, "slots", f"be at least {needed}, which some row needs", slots)
        return self._of(lo, hi, self.kv_len)

    def _block_lists(self, block, transposes):
        lo, hi = self.lo, self.hi
        if lo.dim() == 2:
            lo, hi = lo.unsqueeze(0), hi.unsqueeze(0)
        return interval_block_lists(lo, hi, self.kv_len, *block, transposes)

    def block_mask(self, block_size: int | tuple[int, int] = 128, with_q: bool = True) -> BlockMask:
        """A BlockMask for ``flex_attention``, equal in every index to ``create_block_mask``'s.

        Args:
            block_size: int, or (query block, key block).
            with_q: False leaves out what only the backward reads.
        """
        block = ints.block_pair("RowIntervals.block_mask", block_size)
        check_flags("RowIntervals.block_mask", {"with_q": with_q})
        lists = self._block_lists(block, with_q)
        if not with_q:
            lists = (*lists[:4], None, None, None, None)
        return block_mask_of((self.q_len, self.kv_len), lists, block, self.mask_mod())

    def mask_mod(self) -> Callable[..., torch.Tensor]:
        """``mask_mod(b, h, q, kv)`` that looks up the query's row alone.

        Closures of one code object over fresh tensors: a new mask in each step does not recompile,
        as long as the number of intervals per row stays. Made inside a compiled function on the CPU
        it reads a copy of them: inductor's FlexAttention takes none that it has computed itself.
        """
        return interval_mask_mod(self.lo, self.hi, opaque)

    def dense(self) -> torch.Tensor:
        """``[Sq, kv_len]`` bool, or ``[B, 1, Sq, kv_len]``: broadcasts over batch and heads.

        For ``F.scaled_dot_product_attention`` and for tests; takes O(Sq * kv_len) memory.
        """
        kv = torch.arange(self.kv_len, dtype=torch.int32, device=self.device)
        first, *others = zip(self.lo.unbind(-2), self.hi.unbind(-2), strict=True)
        mask = _inside(kv, *first)
        for lo, hi in others:
            mask = mask | _inside(kv, lo, hi)
        return mask if self.lo.dim() == 2 else mask.unsqueeze(1)

    stats = interval_pictures.stats
    ascii = interval_pictures.ascii
    png = interval_pictures.png


def _inside(kv, lo, hi):
    return (kv >= lo.unsqueeze(-1)) & (kv < hi.unsqueeze(-1))


# --- masks of masks ------------------------------------------------------------------------------


def _combine(a, b, rule, sign):
    if not isinstance(b, type(a)):
        return NotImplemented
    batches = [x.lo.shape[0] for x in (a, b) if x.lo.dim() == 3 and x.lo.shape[0] != 1]
    what = None
    if (a.q_len, a.kv_len) != (b.q_len, b.kv_len):
        what = "have as many queries and keys"
        got = f"{a.q_len} x {a.kv_len} and {b.q_len} x {b.kv_len}"
    elif a.device != b.device:
        what, got = "be on one device", f"{a.device} and {b.device}"
    elif len(batches) == 2 and batches[0] != batches[1]:
        what, got = "have one batch size", f"{batches[0]} and {batches[1]}"
    if what is not None:
        raise ValueError(f"RowIntervals: both sides of {sign} must {what}, got {got}")
    lo, hi = rule(a, b)
    if lo.shape[-2] > MAX_INTERVALS:  # rare: only then are the intervals looked at
        lo, hi = _merge(lo, hi, 0)
    return type(a)(lo, hi, a.kv_len)


def _intersection(a, b):
    lo = torch.maximum(a.lo.unsqueeze(-2), b.lo.unsqueeze(-3)).flatten(-3, -2)
    hi = torch.minimum(a.hi.unsqueeze(-2), b.hi.unsqueeze(-3)).flatten(-3, -2)
    if lo.shape[-2] == 1:
        empty = hi <= lo
        return lo.masked_fill(empty, 0), hi.masked_fill(empty, 0)
    # m and n maximal intervals meet in at most m + n - 1.
    return _merge(lo, hi, a.lo.shape[-2] + b.lo.shape[-2] - 1)


def _union(a, b):
    parts = [(x.lo, x.hi) for x in (a, b)]
    if a.lo.shape[:-2] != b.lo.shape[:-2]:
        batch = torch.broadcast_shapes(a.lo.shape[:-2], b.lo.shape[:-2])
        parts = [(lo.expand(*batch, -1, -1), hi.expand(*batch, -1, -1)) for lo, hi in parts]
    return _merge(torch.cat([p[0] for p in parts], -2), torch.cat([p[1] for p in parts], -2), None)


def _merge(lo, hi, slots):
    """Maximal intervals, ascending, then (0, 0); ``slots`` per row (None: as before, 0: needed)."""
    lo = lo.clamp_min(0)
    empty = hi <= lo
    lo, order = lo.masked_fill(empty, _NOWHERE).sort(dim=-2)
    hi = hi.masked_fill(empty, 0).gather(-2, order)
    # Not an assignment to a slice of bools: what inductor makes of one does not compile.
    reached = torch.nn.functional.pad(hi.cummax(-2).values[..., :-1, :], (0, 0, 1, 0), value=-1)
    starts = (lo > reached) & (lo != _NOWHERE)
    group = (starts.cumsum(-2) - 1).clamp_min(0)
    merged_lo = torch.full_like(lo, _NOWHERE).scatter_reduce(-2, group, lo, "amin")
    merged_hi = torch.zeros_like(hi).scatter_reduce(-2, group, hi, "amax")
    merged_lo = merged_lo.masked_fill(merged_hi == 0, 0)
    if slots == 0:
        slots = max(1, int(starts.sum(-2).max())) if starts.numel() else 1
    return merged_lo[..., :slots, :], merged_hi[..., :slots, :]


# --- block masks ---------------------------------------------------------------------------------


def opaque(tensor):
    """What a mask_mod may capture: inductor's CPU template takes only inputs of the graph and
    results of operators that it does not know. Elsewhere the tensor itself."""
    if torch.compiler.is_compiling() and tensor.device.type == "cpu":
        return torch.ops.masked_loss_ext._snapshot(tensor)
    return tensor


def block_mask_of(lengths, lists, block, mask_mod):
    return BlockMask(lengths, *lists, BLOCK_SIZE=block, mask_mod=mask_mod)


def interval_mask_mod(lo, hi, through=lambda tensor: tensor):
    # Separate 1-D tensors, not one stacked: kernels that turn a mask_mod into intervals of their
    # own understand only these, and 2-D indexing is slow in others.
    if lo.dim() == 3 and lo.shape[0] == 1:  # the same for every batch row
        lo, hi = lo[0], hi[0]
    if lo.dim() == 2 and lo.shape[0] == 1:  # most masks; two unbinds cost three times as much
        return one_interval(through(lo[0]), through(hi[0]))
    los, his = ([through(x) for x in bounds.unbind(-2)] for bounds in (lo, hi))
    if lo.dim() == 2 and len(los) == 2:
        return _two_intervals(*los, *his)
    return _several_intervals(los, his, lo.dim() == 3)


def one_interval(lo, hi):
    def mask_mod(b, h, q, kv):
        return (kv >= lo[q]) & (kv < hi[q])

    return mask_mod


def _two_intervals(lo0, lo1, hi0, hi1):
    def mask_mod(b, h, q, kv):
        return ((kv >= lo0[q]) & (kv < hi0[q])) | ((kv >= lo1[q]) & (kv < hi1[q]))

    return mask_mod


def _several_intervals(los, his, batched):
    def mask_mod(b, h, q, kv):
        row = (b, q) if batched else q
        allowed = (kv >= los[0][row]) & (kv < his[0][row])
        for lo, hi in zip(los[1:], his[1:], strict=True):
            allowed = allowed | ((kv >= lo[row]) & (kv < hi[row]))
        return allowed

    return mask_mod
