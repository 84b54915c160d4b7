# SPDX-License-Identifier: BSD-3-Clause
"""Until the operators land."""

from ..reference import attention as a


def packed_rows(offsets, kept, rows, mode, left, right, prefix, sinks, dropped):
    n, g = kept.shape
    off = offsets.tolist()
    lengths = [[off[i * g + j + 1] - off[i * g + j] for j in range(g)] for i in range(n)]
    tokens = a.packed_tokens(lengths, kept.tolist(), rows)
    mask = a.packed_attention_mask(tokens, mode, (left, right), prefix, sinks, dropped)
    two = (left is not None or right is not None) and (sinks or mode in ("causal_last", "prefix"))
    return a.mask_to_intervals(mask, g * 2 if two else g)


def interval_block_lists(lo, hi, kv_len, q_block, kv_block, transposes=True):
    return a.block_lists(a.interval_mask(lo, hi, kv_len), q_block, kv_block, transposes)


def nested_dropout_plan(*args):
    *args, q_block, kv_block = args
    lo, hi = packed_rows(*args)
    return (lo, hi, *interval_block_lists(lo[None], hi[None], args[2], q_block, kv_block))
