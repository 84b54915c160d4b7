# SPDX-License-Identifier: BSD-3-Clause
"""Masks, labels and lengths: what makes them, and the attention that reads them."""

import torch

import masked_loss_ext as mle
from tests.invalid.calling import Entry
from tests.invalid.entries import (
    CONSTRUCTOR,
    DOCUMENTS,
    IDS,
    LABELS,
    MASK,
    ON,
    B,
    S,
    drawn,
    function,
)
from tests.invalid.kinds import (
    FINE,
    changed,
    choice,
    device,
    first,
    flag,
    floats,
    generator,
    integers,
    ints,
    mapping,
    number,
    one_is_any,
    unnamed,
    whole,
)

MOST = 2**31 - 1


def all_or(ways):
    """Where None is all."""
    return changed(ways, **{"None": FINE})


many = changed(whole(least=0), of_70_bits=FINE)  # more than there is means all
window = changed(many, a_list=ValueError, **{"None": FINE, "a_tensor_[2]": FINE})
kept_tokens = changed(ints, of_70_bits=FINE)
# None: all tokens are
READS = "its sizes follow from the mask"


def anything(good):
    """Tokens of any dtype that PyTorch indexes."""
    for way in changed(first, longer_at_the_end=FINE)(good):
        if not way.name.startswith("of ") or "rank" in way.name:
            yield way


LENGTHS = {
    "segment_lengths": ([4, 3], ints),
    "ps": ([4, 3, 2, 3], ints),
    "keep_k": ([2, 3], kept_tokens),
    "keep_k_list": ([1, 1], changed(kept_tokens, a_float=None)),
    "q_lengths": ([2, 2], ints),
    "kv_lengths": ([3, 2], ints),
    "branch_lengths": ([2, 1], ints),
    "cu_seqlens": ([0, 2, 4], ints),
    "lengths": ([4, 2], ints),
    "n": (8, changed(whole(least=1, most=MOST), **{"a_tensor_[2]": FINE})),
    "batch": (2, whole(least=0, most=MOST)),
    "mode": ("full", choice),
    "mask_mode": ("full", choice),
    "dropped": ("none", choice),
    "backend": ("auto", choice),
    "side": ("right", choice),
    "sinks": (1, many),
    "count": (1, many),
    "window": (2, window),
    "pad_to_multiple": (4, whole(least=1, most=MOST)),
    "align_samples": (2, whole(least=1, most=MOST)),
    "align": (2, whole(least=1, most=MOST)),
    "bucket": (4, whole(least=1, most=MOST)),
    "max_seq_len": (64, whole(least=0, most=MOST)),
    "max_len": (6, whole(least=0)),
    "clip": (False, flag),
    "droppable": (-1, whole(least=-1, most=0)),
    "num_sequences_per_sample": (2, whole(least=1)),
    "masked_id": (-2, whole()),
    "isolate_subsequences": (False, flag),
    "block_size": (
        16,
        changed(whole(least=1, most=MOST), a_list=ValueError, **{"a_tensor_[2]": FINE}),
    ),
    "q_len": (4, whole(least=0, most=MOST)),
    "kv_len": (6, whole(least=0, most=MOST)),
    "total_len": (6, whole(least=0, most=MOST)),
    "seq_len": (6, whole(least=0, most=MOST)),
    "prefix_len": (2, whole(least=0, most=MOST)),
    "block": (2, changed(whole(least=1), of_70_bits=FINE)),
    "pad_id": (0, whole()),
    "check": (False, flag),
    "scale": (0.5, number()),
    "device": ("cpu", device),
    "generator": (torch.Generator(), generator),
}
OFFSETS = {
    "offset": ([1, 2], lambda good: ints(good, None)),
    "prefix": ([1, 2], changed(ints, of_70_bits=None)),
}
TENSORS = {
    "labels": (LABELS, unnamed(integers)),
    "mask": (ON, MASK),
    "segment_ids": (DOCUMENTS, integers),
    "shift": (1, whole(least=0)),
    "ignore_index": (-100, whole(least=-(2**63), most=2**63 - 1)),
    "loss": (drawn(B, S), first),
    "reduction": ("mean", choice),
    "token_weight": (drawn(B, S).abs(), floats),
    "normalizer": (3.0, number(least=0, tensor=True)),
    "padded": (drawn(B, S, 3), anything),
    "config": ({"vocab_size": 5}, mapping),
}
# The result is of their dtype, which has to hold ignore_index.
of_their_dtype = changed(
    unnamed(integers),
    of_int8=FINE,
    of_int16=FINE,
    of_int32=FINE,
    of_uint16=None,
    of_uint32=None,
    of_one=None,
)
TENSORS["labels"] = (LABELS, of_their_dtype)
TENSORS["token_weight"] = (drawn(B, S).abs(), one_is_any(floats))
TENSORS["segment_ids"] = (DOCUMENTS, IDS)
MAKES = "of lengths in lists, outside of what is compiled"


def made(name, cls, arguments, needs=None):
    return Entry(name, cls, LENGTHS | OFFSETS | arguments, needs or {}, MAKES)


def intervals(name, needs=None):
    return made(f"RowIntervals.{name}", lambda: getattr(mle.RowIntervals, name), {}, needs)


ENTRIES = [
    function("aggregate_tokens", TENSORS, {"loss": ("mask",)}),
    function("shift_labels", TENSORS, {"labels": ("mask",)}),
    function("mask_labels", TENSORS),
    Entry("unpad", lambda: mle.unpad, TENSORS, {}, READS),
    Entry("create_unified_loss", lambda: mle.create_unified_loss, TENSORS, {}, CONSTRUCTOR),
    made("lengths_to_mask", lambda: mle.lengths_to_mask, {}),
    made("sample_keep_k", lambda: mle.sample_keep_k, {"mode": ("uniform", choice)}),
    made("PackedLayout", lambda: mle.PackedLayout, {}),
    made(
        "nested_dropout_block_mask",
        lambda: mle.nested_dropout_block_mask,
        {
            "mask_mode": ("prefix", choice),
            "keep_k": ([2, 3], all_or(kept_tokens)),
        },
        {"mask_mode": ("prefix",), "prefix": ("mask_mode",)},
    ),
    made("generate_nested_dropout_mask_ids", lambda: mle.generate_nested_dropout_mask_ids, {}),
    made(
        "generate_nested_dropout_attention_mask",
        lambda: mle.generate_nested_dropout_attention_mask,
        {},
    ),
    intervals("full"),
    intervals("causal"),
    intervals("sliding_window"),
    intervals("sinks"),
    intervals("prefix_lm"),
    intervals("cross"),
    intervals("shared_prefix"),
    intervals("block_diffusion"),
    intervals("from_cu_seqlens", {"cu_seqlens": ("total_len",)}),
]
