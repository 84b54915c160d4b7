# SPDX-License-Identifier: BSD-3-Clause
"""The block-mask operators, as the dispatcher has them: signatures in csrc/schemas.cpp, formulas in
csrc/block_mask/formula.h. All is integer: there is no derivative.

Below is what they make of tensors without data: the shapes of the results, or the same refusals as
of csrc/block_mask/call.h, in the same words. A size that is kept symbolic is not looked at: a
comparison would be one more guard of a graph.
"""

import torch

from .._checks import LARGEST_LENGTH, shape_text

MAX_LENGTH = 2**31 - 1  # kMaxLength of csrc/block_mask/call.h
MAX_INTERVALS = 8
MODES = ("full", "causal", "causal_last", "prefix")
DROPPED = ("none", "self", "attend")

# lo, hi [B, R, Sq] -> the eight index tensors of a BlockMask, as create_block_mask makes them
interval_block_lists = torch.ops.masked_loss_ext.interval_block_lists.default
# segment_offsets [N * G + 1], kept [N, G] -> row intervals lo, hi [R, rows] of packed samples
packed_rows = torch.ops.masked_loss_ext.packed_rows.default
# both in one call: lo, hi, and the eight of them
nested_dropout_plan = torch.ops.masked_loss_ext.nested_dropout_plan.default


def _fake(operator):
    """Registers a function of the operator's name and all its arguments, by name."""
    defaults = {argument.name: argument.default_value for argument in operator._schema.arguments}
    op = operator._schema.name

    def register(function):
        @torch.library.register_fake(op)
        def fake(*args, **keywords):
            given = dict(zip(defaults, args, strict=False)) | keywords
            return function(op.removeprefix("masked_loss_ext::"), **(defaults | given))

        return function

    return register


def _refuse(op, condition, text):
    """Refuses what is true; what a symbolic size leaves open passes."""
    if condition is True:
        raise ValueError(f"{op}: {text}")


def _check_range(op, name, value, least=0, most=MAX_LENGTH):
    outside = isinstance(value, int) and not least <= value <= most
    _refuse(op, outside, f"{name} must be in [{least}, {most}], got {value}")


def _check_kind(op, name, tensor, dtype, layout):
    wrong = tensor.dtype != dtype or tensor.dim() != layout.count(",") + 1
    kind = str(dtype).removeprefix("torch.")
    got = f"{tensor.dtype} {shape_text(tensor)}"
    _refuse(op, wrong, f"{name} must be {kind} {layout}, got {got}")


def _check_devices(op, tensor, *others):
    for other in others:
        if other is not None and other.device != tensor.device:
            devices = f"{tensor.device} and {other.device}"
            raise ValueError(f"{op}: all tensors must be on one device, got {devices}")


@_fake(interval_block_lists)
def _lists(op, lo, hi, kv_len, q_block, kv_block, transposes):
    _check_kind(op, "lo", lo, torch.int32, "[B, R, Sq]")
    batch, intervals, rows = lo.shape
    text = f"lo must have at most {MAX_INTERVALS} intervals per row, got {shape_text(lo)}"
    _refuse(op, intervals > MAX_INTERVALS, text)
    _check_range(op, "the number of rows", rows)
    _check_kind(op, "hi", hi, torch.int32, "[B, R, Sq]")
    text = f"hi must have the shape of lo {shape_text(lo)}, got {shape_text(hi)}"
    for a, b in zip(lo.shape, hi.shape, strict=True):
        _refuse(op, a != b, text)
    _check_devices(op, lo, hi)
    _check_range(op, "kv_len", kv_len)
    return _empty_lists(op, lo, batch, rows, kv_len, q_block, kv_block, transposes)


def _empty_lists(op, like, batch, rows, kv_len, q_block, kv_block, transposes=True):
    _check_range(op, "q_block", q_block, 1)
    _check_range(op, "kv_block", kv_block, 1)
    nq, nk = (rows + q_block - 1) // q_block, (kv_len + kv_block - 1) // kv_block
    many = all(isinstance(n, int) for n in (batch, nq, nk)) and batch * nq * nk > LARGEST_LENGTH
    most = f"at most {LARGEST_LENGTH} pairs of blocks"
    _refuse(op, many, f"q_block and kv_block must leave {most}, got {batch} x {nq} x {nk}")
    shapes = [(batch, 1, nq), (batch, 1, nq, nk)] * 2
    shapes += [(batch, 1, nk), (batch, 1, nk, nq)] * 2 if transposes else [(0,)] * 4
    return tuple(like.new_empty(shape, dtype=torch.int32) for shape in shapes)


@_fake(packed_rows)
@_fake(nested_dropout_plan)
def _plan(
    op,
    segment_offsets,
    kept,
    rows,
    mode,
    window_left,
    window_right,
    prefix,
    sinks,
    dropped,
    **block,
):
    _check_kind(op, "segment_offsets", segment_offsets, torch.int64, "[N * G + 1]")
    _check_kind(op, "kept", kept, torch.int64, "[N, G]")
    (samples, segments), shape = kept.shape, shape_text(kept)
    _refuse(op, segments < 1, f"kept must have a segment per sample, got {shape}")
    entries, got = segment_offsets.shape[0], shape_text(segment_offsets)
    text = f"segment_offsets must have one entry more than kept {shape}, got {got}"
    _refuse(op, entries != samples * segments + 1, text)
    _check_devices(op, kept, segment_offsets, prefix)
    _check_range(op, "rows", rows)
    text = f"mode must be full, causal, causal_last or prefix, got {mode}"
    _refuse(op, mode not in MODES, text)
    _check_range(op, "window_left", window_left, most=LARGEST_LENGTH)
    _check_range(op, "window_right", window_right, most=LARGEST_LENGTH)
    wrong, got = (prefix is None) == (mode == "prefix"), "None" if prefix is None else "one"
    rule = "prefix must be given for mode prefix and for no other"
    _refuse(op, wrong, f"{rule}, got {got} for mode {mode}")
    if prefix is not None:
        _check_kind(op, "prefix", prefix, torch.int64, "[N]")
        text = f"prefix must have an entry per sample of kept {shape}, got {shape_text(prefix)}"
        _refuse(op, prefix.shape[0] != samples, text)
    _check_range(op, "sinks", sinks, most=LARGEST_LENGTH)
    _refuse(op, dropped not in DROPPED, f"dropped must be none, self or attend, got {dropped}")
    window = window_left is not None or window_right is not None
    pieces = 2 if window and (sinks > 0 or mode in ("causal_last", "prefix")) else 1
    most = f"{MAX_INTERVALS // pieces} segments per sample"
    most += " where a window stands beside a prefix or sinks" if pieces == 2 else ""
    many = segments > MAX_INTERVALS // pieces
    _refuse(op, many, f"kept must have at most {most}, got {shape}")
    intervals = [kept.new_empty((segments * pieces, rows), dtype=torch.int32) for _ in range(2)]
    return (*intervals, *(_empty_lists(op, kept, 1, rows, rows, **block) if block else ()))
