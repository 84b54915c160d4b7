# SPDX-License-Identifier: BSD-3-Clause
"""PackedLayout: where each sample and segment lies in one packed sequence, and what is dropped.

Sizes are known on the host, keep_k may live on the device: nothing here waits for it but
``compact``, whose result has the size of what is kept.
"""

from itertools import accumulate

import torch
from torch.nn.attention.flex_attention import BlockMask

from .._checks import check_choice, check_int
from ..ops.block_mask import nested_dropout_plan, packed_rows
from . import _host, _tokens
from ._compact import CompactPlan
from ._cut import Cut
from .intervals import RowIntervals, block_pair, interval_mask_mod, window_pair

MODES = ("full", "causal", "causal_last", "prefix")
DROPPED = ("none", "self", "attend")


class PackedLayout:
    """Samples of several segments, packed into one sequence, with segments cut to ``keep_k``.

    >>> layout = PackedLayout([[4, 3], [2, 3]], keep_k=[1, 2], pad_to_multiple=4)
    >>> layout.sample_ids.tolist()  # 12 tokens of two samples
    [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    >>> print("".join("x" if v else "." for v in layout.visible))
    xxxxx..xxxx.
    >>> block_mask = layout.block_mask("causal_last")  # for flex_attention

    ``allowed(q, k)`` = same sample, both visible, and the relation of a mode (see ``intervals``). A
    token is visible if it is not padding and lies before ``keep_k`` in its segment.

    Attributes of each token, ``[S]`` on ``device``: ``sample_ids``, ``positions`` (in its sample)
    and ``segment_ids``, int32, with -1, 0 and -1 in padding; ``visible``, bool. ``cu_seqlens``
    ``[N + 1]`` int32 is where samples begin, ``kept`` ``[N, G]`` int64 how much of each segment
    stays. On the host: ``segment_lengths``, ``sample_starts``, ``max_seqlen``, ``num_samples``,
    ``num_segments``, ``total_len``, ``padded_len`` (S), and ``kept_lengths``, None where keep_k is
    on a device. The S-sized ones are made when they are first asked for.

    Args:
        segment_lengths: ``[N, G]`` ints on the host, G segments (patches, registers) per sample;
            or ``[N]`` for samples of one segment. Lists, ranges, arrays or CPU tensors; at most
            2^31 - 1 tokens in all, padding included.
        keep_k: ``[N]`` how many tokens of the droppable segment stay, or ``[N, G]`` of each; a list
            or an integer tensor. More than the segment holds keeps all of it. Negative ones are
            refused, but on a device, where keep_k is never read, they count as 0. None keeps all.
        droppable: which segment an ``[N]`` keep_k cuts; the last, unless told.
        pad_to_multiple: S is a multiple of this (1: no padding). None: 128, or ``max_seq_len``.
        max_seq_len: S itself. ValueError where the samples do not fit.
        align_samples: each sample begins at a multiple of this; the gaps are padding. Samples that
            begin with a block have fewer partial blocks.
        device: of the tensors. None: that of a keep_k tensor, else PyTorch's default.
    """

    def __init__(
        self,
        segment_lengths,
        keep_k=None,
        *,
        droppable=-1,
        pad_to_multiple=None,
        max_seq_len=None,
        align_samples=None,
        device=None,
    ):
        name = "PackedLayout"
        rows = _host.length_rows(name, "segment_lengths", segment_lengths)
        samples, segments = len(rows), len(rows[0])
        if max_seq_len is not None and pad_to_multiple is not None:
            raise ValueError(f"{name}: Only one of max_seq_len and pad_to_multiple may be given")
        check_int(name, "droppable", droppable)
        if not -segments <= droppable < segments:
            raise ValueError(
                f"{name}: droppable must be one of {segments} segments, got {droppable}"
            )
        keep, tensor = None, None
        if keep_k is not None:
            keep, tensor = _host.keep_rows(name, keep_k, samples, segments)
        self.segment_lengths, self.num_samples, self.num_segments = rows, samples, segments
        self.device = _host.device_of(keep_k, device)
        self.align_samples = _positive(name, "align_samples", align_samples, 1)
        self.sample_starts = _starts(rows, self.align_samples)
        _host.check_total(name, "segment_lengths", self.sample_starts[-1])
        self.total_len = sum(map(sum, rows))
        self.padded_len = _padded_len(name, self.sample_starts[-1], pad_to_multiple, max_seq_len)
        self._droppable, self._keep, self._keep_tensor = droppable % segments, keep, tensor
        self._cut = Cut(rows, self.sample_starts, self._droppable, keep, tensor, self.device)
        self._cache = {}

    def __repr__(self):
        kept = "on the device" if self.kept_lengths is None else sum(map(sum, self.kept_lengths))
        return (
            f"PackedLayout({self.num_samples} samples of {self.num_segments} segments, "
            f"{self.total_len} tokens in {self.padded_len}, kept: {kept})"
        )

    def intervals(self, mode="full", window=None, prefix=None, sinks=0, dropped="none"):
        """The mask as ``RowIntervals``, to combine, look at, slice or make dense.

        With p the position in the sample, of visible q and k of one sample:

        - "full": every pair; "causal": ``p(k) <= p(q)``;
        - "prefix": ``p(k) < prefix`` or causal (a bidirectional prefix, then causal);
        - "causal_last": the same with all but the last segment as the prefix.

        Args:
            mode: as above.
            window: ``(left, right)``: only keys with ``p(q) - left <= p(k) <= p(q) + right``, and
                the prefix. An int n is ``(n, n)``; None in it is no limit.
            prefix: int, 0-d tensor or ``[N]``, of each sample; for mode "prefix" alone.
            sinks: the first so many positions of a sample are seen from outside the window too.
                Window, prefix and sinks may be longer than a sample: all of it.
            dropped: what a query that is dropped attends to: "none" (its output is exactly 0),
                "self" (itself alone), or "attend" (what it would see if it were visible).
        """
        arguments = self._arguments("intervals", mode, window, prefix, sinks, dropped)
        lo, hi = packed_rows(*arguments)
        if self._gap_rows_attend(dropped):
            lo, hi = self._without_gaps(lo, hi)
        return RowIntervals(lo, hi, self.padded_len)

    def block_mask(
        self,
        mode="full",
        window=None,
        prefix=None,
        sinks=0,
        dropped="none",
        *,
        block_size=128,
    ):
        """A BlockMask for ``flex_attention``, in O(S + blocks): arguments as in ``intervals``.

        Equal in every index to ``create_block_mask`` of the same mask. ``block_size`` is an int or
        (query block, key block). Rows and blocks come from one operator, so it can be built inside
        ``torch.compile(fullgraph=True)``.
        """
        q_block, kv_block = block_pair("PackedLayout.block_mask", block_size)
        if self._gap_rows_attend(dropped):
            return self.intervals(mode, window, prefix, sinks, dropped).block_mask(block_size)
        arguments = self._arguments("block_mask", mode, window, prefix, sinks, dropped)
        lo, hi, *lists = nested_dropout_plan(*arguments, q_block, kv_block)
        length = self.padded_len
        return BlockMask(
            (length, length),
            *lists,
            BLOCK_SIZE=(q_block, kv_block),
            mask_mod=interval_mask_mod(lo, hi),
        )

    def _arguments(self, function, mode, window, prefix, sinks, dropped):
        name = f"PackedLayout.{function}"
        check_choice(name, "mode", mode, MODES)
        check_choice(name, "dropped", dropped, DROPPED)
        sinks = _host.reach(name, "sinks", sinks)
        if (prefix is not None) != (mode == "prefix"):
            wrong = "must be given for" if prefix is None else "is for"
            raise ValueError(f"{name}: prefix {wrong} mode 'prefix', got mode {mode!r}")
        left, right = window_pair(name, window)
        if mode == "prefix":
            prefix = _host.per_sample(name, "prefix", prefix, self.num_samples, self.device)
        elif mode == "causal_last":  # the operator sees joined segments
            mode, prefix = "prefix", self._cached("_before_last")
        cut = self._cut
        return cut.offsets, cut.kept, self.padded_len, mode, left, right, prefix, sinks, dropped

    def _gap_rows_attend(self, dropped):
        # To the operator a gap is a dropped end of the last segment.
        return dropped != "none" and self.sample_starts[-1] != self.total_len

    def _without_gaps(self, lo, hi):
        real = self.sample_ids >= 0
        return torch.where(real, lo, 0), torch.where(real, hi, 0)

    def compact(self, align=None, bucket=None):
        """A plan that drops the tokens for good: see ``CompactPlan``. What it saves beside masking:
        ``python -m benchmarks compaction``.

        Args:
            align: each sample begins at a multiple of this.
            bucket: the length becomes a multiple of this, so that fewer lengths occur.
        """
        align = _positive("PackedLayout.compact", "align", align, None)
        bucket = _positive("PackedLayout.compact", "bucket", bucket, None)
        return CompactPlan(self, align, bucket)

    def pack(self, samples, *, dim=-2, fill=None):
        """``[[patches, registers], ...]`` -> one sequence, zeros in the padding. Differentiable.

        Args:
            samples: per sample a list of G tensors ``[..., n, D]`` (or one tensor, for G = 1) whose
                lengths along ``dim`` are ``segment_lengths``.
            dim: that of the tokens.
            fill: number to put where tokens are dropped; None leaves them. NaN that is stored in a
                dropped key reaches every query (0 * NaN), so take 0 where NaN may be.

        Returns:
            ``[..., S, D]``, dtype and device of the first.
        """
        return _tokens.pack(self, samples, dim, fill)

    def unpack(self, packed, *, dim=-2, fill=0):
        """One sequence ``[..., S, D]`` -> per sample a list of G tensors ``[..., n, D]``.

        Dropped tokens become ``fill`` (None leaves them): attention gives 0 there, but what follows
        it in a network does not.
        """
        return _tokens.unpack(self, packed, dim, fill)

    @property
    def max_seqlen(self):
        return max(map(sum, self.segment_lengths))

    @property
    def kept_lengths(self):
        if self._keep_tensor is not None:
            return None
        return _tokens.kept_lengths(self.segment_lengths, self._keep, self._droppable)

    @property
    def kept(self):
        return self._cached("kept")

    @property
    def cu_seqlens(self):
        return self._cached("cu_seqlens")

    @property
    def sample_ids(self):
        return self._cached("sample_ids")

    @property
    def positions(self):
        return self._cached("positions")

    @property
    def segment_ids(self):
        return self._cached("segment_ids")

    @property
    def visible(self):
        return self._cached("visible")

    def _cached(self, name):
        if name not in self._cache:
            self._cache.update(_tokens.attributes(self, name))
        return self._cache[name]


def _positive(name, argument, value, default):
    return default if value is None else _host.length(name, argument, value, 1)


def _starts(rows, align):
    """Where each sample begins, and where the last one ends."""
    if align == 1:
        return tuple(accumulate(map(sum, rows), initial=0))
    starts, end = [], 0
    for row in rows:
        start = -(-end // align) * align
        starts.append(start)
        end = start + sum(row)
    return (*starts, end)


def _padded_len(name, end, pad_to_multiple, max_seq_len):
    if max_seq_len is None:
        multiple = _positive(name, "pad_to_multiple", pad_to_multiple, 128)
        length = max(1, -(-end // multiple)) * multiple
        _host.check_total(name, "segment_lengths, padded,", length)
        return length
    max_seq_len = _host.length(name, "max_seq_len", max_seq_len)
    if max_seq_len < max(1, end):
        raise ValueError(f"{name}: max_seq_len must hold all {end} tokens, got {max_seq_len}")
    return max_seq_len
