# SPDX-License-Identifier: BSD-3-Clause
"""Nested dropout: a block mask in one call, and random keep_k."""

from collections.abc import Iterable

import torch
from torch.nn.attention.flex_attention import BlockMask

from .._checks import check_choice, refusal
from . import ints
from .layout import PackedLayout

SAMPLING = ("uniform", "pow2", "uniform_pow2")


def nested_dropout_block_mask(
    segment_lengths: ints.Lengths,
    keep_k: ints.Lengths | None,
    mask_mode: str = "full",
    pad_to_multiple: int | None = None,
    device: ints.Device = None,
    *,
    droppable: int = -1,
    max_seq_len: int | None = None,
    align_samples: int | None = None,
    window: ints.Window | None = None,
    prefix: int | ints.Lengths | None = None,
    sinks: int = 0,
    dropped: str = "none",
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """BlockMask of packed samples whose last segment is cut to its first ``keep_k`` tokens.

    >>> lengths = [[1024, 256], [1024, 256]]  # image patches, registers
    >>> block_mask = nested_dropout_block_mask(lengths, [64, 200])
    >>> block_mask.shape
    (1, 1, 2560, 2560)

    The same as ``PackedLayout(segment_lengths, keep_k).block_mask(mask_mode)``, and in every index
    as ``create_block_mask`` over the dense mask, which is S x S:

    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> tokens = PackedLayout(lengths, [64, 200])
    >>> ids, visible = tokens.sample_ids, tokens.visible
    >>> def mask_mod(b, h, q, kv):
    ...     return (ids[q] == ids[kv]) & visible[q] & visible[kv]
    >>> dense = create_block_mask(mask_mod, None, None, 2560, 2560, device="cpu")
    >>> torch.equal(block_mask.kv_indices, dense.kv_indices)
    True

    Patches see patches and kept registers, kept registers the same; dropped registers and padding
    have no row and no column: ``flex_attention`` gives exactly 0 there.

    Args:
        segment_lengths: ``[N, G]`` ints on the host.
        keep_k: ``[N]`` list or integer tensor; on a GPU it is never read. ``[N, G]`` cuts each
            segment; None nothing. Larger than the segment keeps all of it.
        mask_mode: "full", "causal", "causal_last" (the last segment causal, the others a
            bidirectional prefix that does not see it) or "prefix".
        pad_to_multiple, max_seq_len, droppable, align_samples, device: as ``PackedLayout``
            has them; S is a multiple of 128, unless told.
        window, prefix, sinks, dropped: as ``PackedLayout.intervals`` has them.
        block_size: int, or (query block, key block).

    Returns:
        BlockMask of shape ``[1, 1, S, S]``.
    """
    layout = PackedLayout(
        segment_lengths,
        keep_k,
        droppable=droppable,
        pad_to_multiple=pad_to_multiple,
        max_seq_len=max_seq_len,
        align_samples=align_samples,
        device=device,
    )
    return layout.block_mask(mask_mode, window, prefix, sinks, dropped, block_size=block_size)


def draw_keep_k(n, mode, below, exponent, least):
    """keep_k of n, ints or tensors of them alike.

    ``below(m)`` draws from [0, m), ``exponent(m)`` is the least e with ``2 ** e >= m``, and
    ``least`` the lesser of two.
    """
    if mode == "pow2":
        return 1 << below(exponent(n) + 1)
    k = below(n) + 1
    return least(1 << exponent(k), n) if mode == "uniform_pow2" else k


def sample_keep_k(
    n: int | Iterable[int] | torch.Tensor,
    batch: int,
    mode: str = "uniform",
    generator: torch.Generator | None = None,
    device: ints.Device = None,
) -> torch.Tensor:
    """Random keep_k of nested dropout: how many of n tokens stay, for each sample.

    >>> keep_k = sample_keep_k(256, 4, generator=torch.Generator().manual_seed(0))
    >>> keep_k.shape, bool((keep_k >= 1).all()), bool((keep_k <= 256).all())
    (torch.Size([4]), True, True)

    - "uniform": 1 to n, each as likely: token j stays with probability ``(n - j) / n``;
    - "pow2": 1, 2, 4, ..., n, each as likely; n must be a power of two;
    - "uniform_pow2": uniform, rounded up to a power of two, at most n.

    Nothing waits for the device.

    Args:
        n: int, or ``[batch]`` of each sample (list, array, or integer tensor, not read on a
            device), from 1 to 2^31 - 1.
        batch: number of samples.
        mode: as above.
        generator: ``torch.Generator`` of the device.
        device: of the result. None: that of n, else the CPU.

    Returns:
        ``[batch]`` int64.
    """
    name = "sample_keep_k"
    check_choice(name, "mode", mode, SAMPLING)
    batch = ints.length(name, "batch", batch)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise refusal(
            name, "generator", "be a torch.Generator or None", type(generator).__name__, TypeError
        )
    if device is None:
        device = n.device if isinstance(n, torch.Tensor) else "cpu"
    device = torch.device(device)
    sizes = _sizes(name, n, batch, mode, device)
    uniform = torch.rand(batch, dtype=torch.float64, generator=generator, device=device)

    def below(limits):
        # A product that rounds up to its limit is the last one.
        return torch.minimum((uniform * limits).to(torch.int64), limits - 1)

    return draw_keep_k(sizes, mode, below, _log2_ceil, torch.minimum)


def _sizes(name, n, batch, mode, device):
    if isinstance(n, torch.Tensor):
        values = ints.integers(name, "n", n)
        values = values.reshape(-1).tolist() if ints.is_readable(n) else []
    elif ints.is_number(n) or not hasattr(n, "__iter__") or isinstance(n, str):
        values = [n]
    else:
        values = n = ints.listed(name, "n", n)
    for value in values:
        value = ints.length(name, "n", value, 1)
        if mode == "pow2" and value & (value - 1):
            raise refusal(name, "n", "be a power of two for mode 'pow2'", value)
    return ints.per_sample(name, "n", n, batch, device)


def _log2_ceil(x):
    """Exact: a float logarithm is not, near powers of two."""
    powers = 1 << torch.arange(62, device=x.device)
    return (powers < x.unsqueeze(-1)).sum(-1)
