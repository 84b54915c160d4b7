# SPDX-License-Identifier: BSD-3-Clause
"""Losses and what belongs to them: a good value and the kind of each argument."""

import torch

import masked_loss_ext as mle
from tests.invalid.calling import Entry
from tests.invalid.kinds import (
    FINE,
    changed,
    choice,
    class_weights,
    dtype,
    first,
    flag,
    floats,
    group,
    integers,
    kept,
    labels,
    mask,
    number,
    numbers_too,
    one_is_any,
    whole,
)

B, S, C, V, D = 2, 4, 3, 5, 6


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


ON = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]])
LABELS = torch.tensor([[1, 2, -100, 4], [0, -100, 3, 3]])
DOCUMENTS = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]])
MASK, IDS = one_is_any(mask), one_is_any(integers)

# argument -> a good value, its kind; where one name is two things, the entry says which
TOKENS = {
    "model_pred": (drawn(B, S, C), first),
    "target": (drawn(B, S, C) + 1, floats),
    "attention_mask": (ON, MASK),
    "edit_mask": (ON.flip(0), changed(MASK, additive=FINE, with_NaN=FINE)),
    "weighting": (torch.tensor([[[0.5]], [[2.0]]]), numbers_too),
    "foreground_weight": (2.0, number()),
    "forground_weight": (2.0, number()),
    "background_weight": (1.0, number()),
    "eps": (0.5, number(least=0)),
    "edit_mask_default": ("unit", choice),
    "reduction": ("mean", choice),
    "normalizer": (3.0, number(least=0, tensor=True)),
    "loss": ("huber", choice),
    "delta": (0.5, changed(number(above=0, tensor=True), **{"None": None})),
    "x_recon": (drawn(B, S, C), first),
    "x": (drawn(B, S, C) + 1, floats),
    "mask": (ON, MASK),
}
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
ROWS = {
    "logits": (drawn(B, S, V), changed(first, longer_at_the_end=FINE)),
    "target": (LABELS, one_is_any(labels)),
    "mask": (ON, MASK),
    "ignore_index": (-100, whole(least=-(2**63), most=2**63 - 1)),
    "weight": (WEIGHT, class_weights),
    "token_weight": (drawn(B, S).abs(), one_is_any(floats)),
    "label_smoothing": (0.125, number(least=0, most=1)),
    "temperature": (1.5, number(above=0, tensor=True)),
    "softcap": (8.0, changed(number(above=0), inf=FINE)),
    "z_loss": (0.25, number(least=0)),
    "focal_gamma": (1.5, number(least=0)),
    "shift": (1, whole(least=0)),
    "segment_ids": (DOCUMENTS, IDS),
    "reduction": ("mean", choice),
    "normalizer": (3.0, number(least=0, tensor=True)),
    "class_dim": (-1, whole(least=-(2**63), most=2**63 - 1)),
    "inplace_backward": (False, flag),
    "gradient_in_forward": (False, flag),
    "return_stats": (False, flag),
}
LAYER = ROWS | {
    "hidden": (drawn(B, S, D), first),
    "weight": (drawn(V, D), changed(floats, longer=FINE, of_one=None)),
    "bias": (drawn(V), floats),
    "class_weight": (WEIGHT, class_weights),
    "num_valid": (B * S, whole(least=0)),
    "chunk_rows": (2, whole(least=1)),
    "logits_dtype": (torch.float32, dtype),
}
SHARD = LAYER | {
    "local_logits": (drawn(B, S, V), changed(first, longer_at_the_end=FINE)),
    # A shard may have no class.
    "local_weight": (drawn(V, D), changed(floats, longer=FINE, of_one=None, empty=None)),
    "weight": ROWS["weight"],
    "vocab_start": (0, whole(least=0)),
    "vocab_size": (V, whole(least=V)),
    "group": (None, group),
}
# A constructor leaves the rest to the call.
KEPT = {"temperature": kept(ROWS["temperature"][1])}
KEPT["class_weight"] = changed(
    kept(class_weights), quantized=ValueError, of_a_rank_more=ValueError, a_number=ValueError
)
KEPT = {name: (LAYER[name][0], kind) for name, kind in KEPT.items()}
KEPT_ROWS = KEPT | {"weight": KEPT["class_weight"]}
KEPT_DELTA = {"delta": (0.5, changed(TOKENS["delta"][1], a_NaN_in_a_tensor=FINE))}
MULTI_RESOLUTION = TOKENS | {"attention_mask": (ON, changed(MASK, **{"None": FINE}))}
CONSTRUCTOR = "a module is made outside of what is compiled"
BENDS = {"delta": ("loss",), "background_weight": ("edit_mask",)}
ROWS_OF = {"logits": ("target",), "hidden": ("target",), "local_logits": ("target",)}
SHARED = ("vocab_start", "vocab_size")
TOGETHER = ROWS_OF | dict.fromkeys((*SHARED, "weight", "class_weight"), SHARED)


def function(name, arguments, needs=None):
    owner = mle if hasattr(mle, name) else mle.distributed
    return Entry(name, lambda: getattr(owner, name), arguments, needs or {})


def module(cls, arguments, speaks=None, made=None, needs=None, options=None):
    """Its constructor and its call. speaks: whose name the errors of a call have; made: what the
    constructor takes otherwise; options: of the one that is called."""
    name, options = cls.__name__, options or {}
    return [
        Entry(name, lambda: cls, arguments | (made or {}), needs or {}, CONSTRUCTOR, f"{name}()"),
        Entry(speaks or name, lambda: cls(**options).forward, arguments, {}, key=name),
    ]


ENTRIES = [
    function("masked_mse", TOKENS, BENDS),
    function("masked_sse", TOKENS, BENDS),
    function("compute_loss_multi_resolution", MULTI_RESOLUTION, BENDS),
    function("masked_edit_token_mean_loss", TOKENS, BENDS),
    *module(mle.AttentionMaskMseLoss, TOKENS, made=KEPT_DELTA, needs=BENDS),
    *module(mle.MaskEditLoss, TOKENS, made=KEPT_DELTA, needs=BENDS),
    *module(mle.MseLoss, TOKENS, made=KEPT_DELTA, needs=BENDS),
    function("masked_cross_entropy", ROWS),
    function("row_statistics", ROWS, ROWS_OF),
    *module(mle.MaskedCrossEntropyLoss, ROWS, "masked_cross_entropy", KEPT_ROWS),
    function("masked_linear_cross_entropy", LAYER),
    function("linear_row_statistics", LAYER, ROWS_OF),
    *module(mle.MaskedLinearCrossEntropyLoss, LAYER, "masked_linear_cross_entropy", KEPT),
    function("vocab_parallel_cross_entropy", SHARD, TOGETHER),
    function("vocab_parallel_row_statistics", SHARD, TOGETHER),
    function("vocab_parallel_linear_cross_entropy", SHARD, TOGETHER),
    function("vocab_parallel_linear_row_statistics", SHARD, TOGETHER),
]
