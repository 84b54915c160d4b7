# SPDX-License-Identifier: BSD-3-Clause
"""What the block-mask operators make of tensors without data: the shapes of the results, or the
same refusals as of csrc/block_mask/call.h, in the same words.

A size that is kept symbolic is not looked at: a comparison would be one more guard of a graph.
"""

import torch

from .._checks import LARGEST_LENGTH, shape_text

MAX_LENGTH = 2**31 - 1  # kMaxLength of csrc/block_mask/call.h
MAX_INTERVALS = 8
MODES = ("full", "causal", "causal_last", "prefix")
DROPPED = ("none", "self", "attend")


def check_range(op, name, value, least=0, most=MAX_LENGTH):
    if isinstance(value, int) and not least <= value <= most:
        raise ValueError(f"{op}: {name} must be in [{least}, {most}], got {value}")


def _refuse(condition, text):
    """Refuses what is true; what a symbolic size leaves open passes."""
    if isinstance(condition, bool) and condition:
        raise ValueError(text)


def _differ(a, b):
    """Whether two numbers differ, where both are known."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def _exceeds(a, most):
    return isinstance(a, int) and a > most


def _check_kind(op, name, tensor, dtype, dims, layout):
    kind = str(dtype).removeprefix("torch.")
    _refuse(
        tensor.dtype != dtype or tensor.dim() != dims,
        f"{op}: {name} must be {kind} {layout}, got {tensor.dtype} {shape_text(tensor)}",
    )


def _refuse_two_devices(op, tensor, *others):
    for other in others:
        if other is not None and other.device != tensor.device:
            raise ValueError(
                f"{op}: all tensors must be on one device, got {tensor.device} and {other.device}"
            )


def _empty_lists(op, like, batch, rows, kv_len, q_block, kv_block, transposes=True):
    check_range(op, "q_block", q_block, 1)
    check_range(op, "kv_block", kv_block, 1)
    nq, nk = (rows + q_block - 1) // q_block, (kv_len + kv_block - 1) // kv_block
    if all(isinstance(n, int) for n in (batch, nq, nk)) and batch * nq * nk > LARGEST_LENGTH:
        raise ValueError(
            f"{op}: q_block and kv_block must leave at most {LARGEST_LENGTH} pairs of blocks, got "
            f"{batch} x {nq} x {nk}"
        )
    shapes = [(batch, 1, nq), (batch, 1, nq, nk)] * 2
    shapes += [(batch, 1, nk), (batch, 1, nk, nq)] * 2 if transposes else [(0,)] * 4
    return tuple(like.new_empty(shape, dtype=torch.int32) for shape in shapes)


@torch.library.register_fake("masked_loss_ext::interval_block_lists")
def _lists_fake(lo, hi, kv_len, q_block=128, kv_block=128, transposes=True):
    op = "interval_block_lists"
    _check_kind(op, "lo", lo, torch.int32, 3, "[B, R, Sq]")
    _refuse(
        _exceeds(lo.shape[1], MAX_INTERVALS),
        f"{op}: lo must have at most {MAX_INTERVALS} intervals per row, got {shape_text(lo)}",
    )
    check_range(op, "the number of rows", lo.shape[2])
    _check_kind(op, "hi", hi, torch.int32, 3, "[B, R, Sq]")
    _refuse(
        any(_differ(a, b) for a, b in zip(lo.shape, hi.shape, strict=True)),
        f"{op}: hi must have the shape of lo {shape_text(lo)}, got {shape_text(hi)}",
    )
    _refuse_two_devices(op, lo, hi)
    check_range(op, "kv_len", kv_len)
    return _empty_lists(op, lo, lo.shape[0], lo.shape[2], kv_len, q_block, kv_block, transposes)


def _check_packed(op, offsets, kept, rows, mode, left, right, prefix, sinks, dropped):
    """Checks all arguments; the number of intervals per row."""
    _check_kind(op, "segment_offsets", offsets, torch.int64, 1, "[N * G + 1]")
    _check_kind(op, "kept", kept, torch.int64, 2, "[N, G]")
    samples, segments = kept.shape
    text = f"{op}: kept must have a segment per sample, got {shape_text(kept)}"
    _refuse(isinstance(segments, int) and segments < 1, text)
    known = isinstance(samples, int) and isinstance(segments, int)
    _refuse(
        known and _differ(offsets.shape[0], samples * segments + 1),
        f"{op}: segment_offsets must have one entry more than kept {shape_text(kept)}, got "
        f"{shape_text(offsets)}",
    )
    _refuse_two_devices(op, kept, offsets, prefix)
    check_range(op, "rows", rows)
    text = f"{op}: mode must be full, causal, causal_last or prefix, got {mode}"
    _refuse(mode not in MODES, text)
    for name, side in (("window_left", left), ("window_right", right)):
        check_range(op, name, side, most=LARGEST_LENGTH)
    _check_prefix(op, kept, mode, prefix)
    check_range(op, "sinks", sinks, most=LARGEST_LENGTH)
    _refuse(dropped not in DROPPED, f"{op}: dropped must be none, self or attend, got {dropped}")
    window = left is not None or right is not None
    pieces = 2 if window and (sinks > 0 or mode in ("causal_last", "prefix")) else 1
    where = " where a window stands beside a prefix or sinks" if pieces == 2 else ""
    _refuse(
        _exceeds(segments, MAX_INTERVALS // pieces),
        f"{op}: kept must have at most {MAX_INTERVALS // pieces} segments per sample{where}, got "
        f"{shape_text(kept)}",
    )
    return segments * pieces


def _check_prefix(op, kept, mode, prefix):
    _refuse(
        (prefix is not None) != (mode == "prefix"),
        f"{op}: prefix must be given for mode prefix and for no other, got "
        f"{'None' if prefix is None else 'one'} for mode {mode}",
    )
    if prefix is None:
        return
    _check_kind(op, "prefix", prefix, torch.int64, 1, "[N]")
    _refuse(
        _differ(prefix.shape[0], kept.shape[0]),
        f"{op}: prefix must have an entry per sample of kept {shape_text(kept)}, got "
        f"{shape_text(prefix)}",
    )


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
    given = (segment_offsets, kept, rows, mode, window_left, window_right, prefix, sinks, dropped)
    shape = (_check_packed("packed_rows", *given), rows)
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
    op = "nested_dropout_plan"
    given = (segment_offsets, kept, rows, mode, window_left, window_right, prefix, sinks, dropped)
    shape = (_check_packed(op, *given), rows)
    intervals = tuple(kept.new_empty(shape, dtype=torch.int32) for _ in range(2))
    return intervals + _empty_lists(op, kept, 1, rows, rows, q_block, kv_block)
