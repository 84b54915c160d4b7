# SPDX-License-Identifier: BSD-3-Clause
"""interval_block_lists, packed_rows and nested_dropout_plan: thin functions.

The schemas are in csrc/schemas.cpp, the formulas in csrc/block_mask/formula.h. All is integer:
there is no derivative.
"""

import torch

from . import block_mask_fakes  # noqa: F401  registers them

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
