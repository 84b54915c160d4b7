# SPDX-License-Identifier: BSD-3-Clause
"""interval_block_lists, packed_rows and nested_dropout_plan: fakes and thin functions.

The schemas are in csrc/schemas.cpp, the formulas in csrc/block_mask.h. Everything is integer:
there is no derivative.
"""

import torch

_lists_op = torch.ops.masked_loss_ext.interval_block_lists.default
_rows_op = torch.ops.masked_loss_ext.packed_rows.default
_plan_op = torch.ops.masked_loss_ext.nested_dropout_plan.default


def interval_block_lists(lo, hi, kv_len, q_block=128, kv_block=128, transposes=True):
    """The eight index tensors of a BlockMask, as create_block_mask makes them, from row intervals.

    Args:
        lo, hi: ``[B, R, Sq]`` int32, R <= 8. Query q attends to kv where ``lo[b, r, q] <= kv <
            hi[b, r, q]`` for any r.
        transposes: False leaves the last four, which only a backward reads, without elements.

    Returns:
        (kv_num_blocks ``[B, 1, nq]``, kv_indices ``[B, 1, nq, nk]``, full_kv_num_blocks,
        full_kv_indices, q_num_blocks ``[B, 1, nk]``, q_indices ``[B, 1, nk, nq]``,
        full_q_num_blocks, full_q_indices), int32.
    """
    return _lists_op(lo, hi, kv_len, q_block, kv_block, transposes)


def packed_rows(
    segment_offsets,
    kept,
    rows,
    mode="full",
    window_left=None,
    window_right=None,
    prefix=None,
    sinks=0,
    dropped="none",
):
    """Row intervals (lo, hi) of packed samples, ``[R, rows]`` int32; arguments as in the schema."""
    return _rows_op(
        segment_offsets, kept, rows, mode, window_left, window_right, prefix, sinks, dropped
    )


def nested_dropout_plan(
    segment_offsets,
    kept,
    rows,
    mode="full",
    window_left=None,
    window_right=None,
    prefix=None,
    sinks=0,
    dropped="none",
    q_block=128,
    kv_block=128,
):
    """packed_rows and interval_block_lists in one call: (lo, hi, and the eight lists)."""
    return _plan_op(
        *(segment_offsets, kept, rows, mode, window_left, window_right, prefix, sinks, dropped),
        *(q_block, kv_block),
    )


def _refuse_two_devices(function, tensor, *others):
    for other in others:
        if other is not None and other.device != tensor.device:
            raise ValueError(
                f"{function}: all tensors must be on one device, got {tensor.device} "
                f"and {other.device}"
            )


def _empty_lists(like, batch, rows, kv_len, q_block, kv_block, transposes=True):
    nq, nk = (rows + q_block - 1) // q_block, (kv_len + kv_block - 1) // kv_block
    shapes = [(batch, 1, nq), (batch, 1, nq, nk)] * 2
    shapes += [(batch, 1, nk), (batch, 1, nk, nq)] * 2 if transposes else [(0,)] * 4
    return tuple(like.new_empty(shape, dtype=torch.int32) for shape in shapes)


@torch.library.register_fake("masked_loss_ext::interval_block_lists")
def _lists_fake(lo, hi, kv_len, q_block=128, kv_block=128, transposes=True):
    _refuse_two_devices("interval_block_lists", lo, hi)
    return _empty_lists(lo, lo.shape[0], lo.shape[2], kv_len, q_block, kv_block, transposes)


def _slots(kept, mode, window_left, window_right, sinks):
    window = window_left is not None or window_right is not None
    return kept.shape[1] * (2 if window and (sinks > 0 or mode in ("causal_last", "prefix")) else 1)


@torch.library.register_fake("masked_loss_ext::packed_rows")
def _rows_fake(
    segment_offsets,
    kept,
    rows,
    mode="full",
    window_left=None,
    window_right=None,
    prefix=None,
    sinks=0,
    dropped="none",
):
    _refuse_two_devices("packed_rows", kept, segment_offsets, prefix)
    shape = (_slots(kept, mode, window_left, window_right, sinks), rows)
    return kept.new_empty(shape, dtype=torch.int32), kept.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("masked_loss_ext::nested_dropout_plan")
def _plan_fake(
    segment_offsets,
    kept,
    rows,
    mode="full",
    window_left=None,
    window_right=None,
    prefix=None,
    sinks=0,
    dropped="none",
    q_block=128,
    kv_block=128,
):
    _refuse_two_devices("nested_dropout_plan", kept, segment_offsets, prefix)
    shape = (_slots(kept, mode, window_left, window_right, sinks), rows)
    intervals = tuple(kept.new_empty(shape, dtype=torch.int32) for _ in range(2))
    return intervals + _empty_lists(kept, 1, rows, rows, q_block, kv_block)
