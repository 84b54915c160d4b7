# SPDX-License-Identifier: BSD-3-Clause
"""CompactPlan: the kept tokens alone, gathered into a shorter sequence and scattered back."""

import numbers
from itertools import chain
from typing import Any

import torch

from .._checks import check_int, check_tensor, refusal, shape_text
from . import ints


class CompactPlan:
    """Dropped tokens removed for good, where a mask only hides them from attention.

    >>> layout = PackedLayout([[4, 3], [2, 3]], keep_k=[1, 2], pad_to_multiple=1)
    >>> plan = layout.compact()
    >>> plan.index.tolist()  # of 12 tokens 9 stay
    [0, 1, 2, 3, 4, 7, 8, 9, 10]
    >>> x = torch.randn(1, 12, 16)
    >>> y = plan.gather(x)  # [1, 9, 16]; then the network, with plan.layout.block_mask(...)
    >>> torch.equal(plan.scatter(y), torch.where(layout.visible[:, None], x, 0))
    True

    When to mask and when to compact. A mask saves attention to dropped tokens and nothing else: the
    rest of the network still works on them, which for wide networks is most of the work (a
    transformer of width 1792 on 1024 + 256 tokens with uniform keep_k saves about 1 % by masking
    and 10 % by compacting; on 256 + 256 tokens 1 % and 24 %). So compact wherever the outputs of
    dropped tokens are not needed. Mask where shapes must not change (CUDA graphs,
    ``dynamic=False``), where every row must exist, or where keep_k is on a GPU: the plan's size
    depends on it, so making one waits for the device.

    ``align`` keeps samples on block boundaries; without it packing shifts them, and most of what
    the blocks of FlexAttention save is lost again. For kernels that take ``cu_seqlens`` leave it at
    None. ``bucket`` rounds the length up, so that a compiled network sees few lengths.

    Attributes: ``layout``, a PackedLayout of the kept tokens, with the segments of the old one;
    ``index`` ``[S']`` int64, which token stands here (-1: padding); ``cu_seqlens`` ``[N + 1]``
    int32 and ``max_seqlen``, for variable-length attention. Embeddings want positions in the old
    sample: ``plan.gather(layout.positions, dim=0)``. Windows count kept tokens only.
    """

    def __init__(self, layout: Any, align: int | None = None, bucket: int | None = None) -> None:
        lengths = layout.kept_lengths
        if lengths is None:
            lengths = tuple(tuple(row) for row in layout.kept.tolist())
        self.layout = type(layout)(
            lengths,
            pad_to_multiple=1 if bucket is None else bucket,
            align_samples=align,
            device=layout.device,
        )
        self.source_len = layout.padded_len
        source = _segment_starts(layout.sample_starts, layout.segment_lengths)
        target = _segment_starts(self.layout.sample_starts, lengths)
        kept = _on_host(chain.from_iterable(lengths))
        count = self.layout.total_len
        # Where the token stands in all that is kept, and from there to both sequences.
        place = torch.arange(count, device="cpu")
        first = kept.cumsum(0) - kept
        source, target = (
            (start - first).repeat_interleave(kept, output_size=count).add_(place)
            for start in (source, target)
        )
        index = torch.full((self.layout.padded_len,), -1, device="cpu")
        self.index = index.index_copy_(0, target, source).to(layout.device)
        # Without gaps the kept tokens are the front of the new sequence.
        self._is_front = self.layout.sample_starts[-1] == count
        self._target = target.to(layout.device)
        self._source = source.to(layout.device)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return self.layout.cu_seqlens

    @property
    def max_seqlen(self) -> int:
        return self.layout.max_seqlen

    def gather(self, x: torch.Tensor, dim: int = -2) -> torch.Tensor:
        """``[..., S, D]`` -> ``[..., S', D]``, zeros in the padding. Differentiable, any dtype."""
        check_tokens("CompactPlan.gather", "x", x, dim, self.source_len)
        kept = x.index_select(dim, self._source)
        if self.layout.padded_len == self._source.numel():
            return kept
        return _spread(kept, dim, self._target, self.layout.padded_len, 0)

    def scatter(
        self, y: torch.Tensor, fill: float | torch.Tensor = 0, dim: int = -2
    ) -> torch.Tensor:
        """``[..., S', D]`` -> ``[..., S, D]``, ``fill`` where tokens are dropped or padding.

        Differentiable; the gradient of padding in y is exactly 0, whatever is stored there.
        """
        check_tokens("CompactPlan.scatter", "y", y, dim, self.layout.padded_len)
        check_fill("CompactPlan.scatter", fill)
        if self._is_front:
            kept = y.narrow(dim, 0, self._source.numel())
        else:
            kept = y.index_select(dim, self._target)
        return _spread(kept, dim, self._source, self.source_len, fill)

    def __repr__(self):
        return f"CompactPlan({self.source_len} -> {self.layout.padded_len} tokens)"


def check_tokens(function, name, x, dim, length):
    check_tensor(function, name, x)
    check_int(function, "dim", dim)
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != length:
        raise refusal(function, name, f"have {length} tokens in dimension {dim}", shape_text(x))


def check_fill(function, fill):
    is_number = isinstance(fill, (numbers.Number, torch.SymInt, torch.SymFloat))
    if not is_number and not (isinstance(fill, torch.Tensor) and fill.dim() == 0):
        raise refusal(function, "fill", "be a number", type(fill).__name__, TypeError)


def _spread(kept, dim, index, length, fill):
    shape = list(kept.shape)
    shape[dim] = length
    return kept.new_full(shape, fill).index_copy(dim, index, kept)


def _on_host(numbers):
    return ints.to_device(list(numbers), torch.device("cpu"))


def _segment_starts(sample_starts, lengths):
    """Where each segment begins, ``[N * G]`` on the host."""
    lengths = _on_host(chain.from_iterable(lengths)).view(len(lengths), -1)
    starts = lengths.cumsum(1) - lengths
    return (starts + _on_host(sample_starts)[:-1].unsqueeze(1)).flatten()
