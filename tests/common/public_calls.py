# SPDX-License-Identifier: BSD-3-Clause
"""One small call, or a few, of every public name, as functions of a dict of tensors alone.

To have another public function tested, add it to CALLS, or to READS with the reason why it cannot
do without the data of its tensors. The unified family has a table of its own, unified_cases.py.
"""

import torch
from unified_cases import HIDDEN

import masked_loss_ext as mle

B, S, C, V = 2, 6, 4, 11


def entries():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (B, S), generator=g)
    labels[0, 4:] = -100
    return {
        "pred": torch.randn(B, S, C, generator=g),
        "target": torch.randn(B, S, C, generator=g),
        "mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]),
        "grey": torch.rand(B, S, generator=g),
        "weighting": torch.rand(B, S, 1, generator=g),
        "logits": torch.randn(B, S, V, generator=g),
        "labels": labels,
        "documents": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 2]]),
        "positions": torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]),
        "class_weight": torch.rand(V, generator=g),
        "number": torch.tensor(1.5),
        "count": torch.tensor(7),
        "image": torch.rand(B, 32, 48, generator=g),
        "keep_k": torch.tensor([2, 3]),
        "lengths": torch.tensor([4, 2]),
        "cu_seqlens": torch.tensor([0, 2, 6]),
        "hidden": torch.randn(B, S, HIDDEN, generator=g),
        "head": torch.randn(V, HIDDEN, generator=g),
        "q": torch.randn(1, 2, 16, 8, generator=g),
        "registers": [torch.randn(1, n, C, generator=g) for n in (5, 3)],
        "patches": [torch.randn(1, n, C, generator=g) for n in (4, 4)],
    }


PACKED = [[4, 5], [4, 3]]  # of patches and registers: 16 tokens


def made(make, e):
    """A module with its state where the inputs are."""
    with e["logits"].device:
        return make()


def vocab_parallel(e):
    loss, statistics = mle.distributed.vocab_parallel_cross_entropy(
        e["logits"], e["labels"], e["mask"], token_weight=e["grey"], label_smoothing=0.1,
        return_stats=True,
    )  # fmt: skip
    return loss, *statistics, *mle.distributed.vocab_parallel_row_statistics(e["logits"])[:2]


def vocab_parallel_linear(e):
    layer = e["hidden"], e["head"]
    loss = mle.distributed.vocab_parallel_linear_cross_entropy(*layer, e["labels"], e["mask"])
    statistics = mle.distributed.vocab_parallel_linear_row_statistics(*layer, e["labels"])
    return loss, *statistics


def global_token_count(e):
    return mle.distributed.global_token_count(e["mask"], labels=e["labels"])


def everything(e):
    loss, statistics = mle.masked_cross_entropy(
        e["logits"], e["labels"], e["mask"],
        weight=e["class_weight"].detach(), token_weight=e["grey"],
        label_smoothing=0.1, temperature=e["number"], softcap=9.0, z_loss=1e-3, focal_gamma=1.5,
        shift=1, segment_ids=e["documents"], normalizer=e["count"], return_stats=True,
    )  # fmt: skip
    return loss, *statistics


def intervals_of(e):
    """Each source of intervals, alone and in pairs, and what is made of them."""
    device, make = e["documents"].device, mle.RowIntervals
    causal = make.causal(S, device=device)
    found = [
        causal,
        make.full(S, device=device),
        make.causal(S, offset=e["keep_k"] - 2),
        make.sliding_window(S, (2, 0), device=device) | make.sinks(S, 1, device=device),
        make.prefix_lm(S, e["keep_k"]),
        make.cross([2, 4], [3, 3], e["keep_k"]),
        make.shared_prefix(2, [2, 2], device=device),
        make.block_diffusion(3, 1, device=device),
        make.from_document_ids(e["documents"]) & causal,
        make.from_position_ids(e["positions"]),
        make.from_cu_seqlens(e["cu_seqlens"], S) & causal,
        make.from_padding(e["mask"]),
    ]
    masks = [x.block_mask() for x in found]
    return [
        x
        for mask, blocks in zip(found, masks, strict=True)
        for x in (mask.lo, mask.hi, mask.dense(), blocks.kv_indices, blocks.full_kv_num_blocks)
    ]


def packed(e, backend):
    layout = mle.PackedLayout(PACKED, e["keep_k"], pad_to_multiple=16)
    q = e["q"].detach() if backend == "flex" else e["q"]  # no gradient on the CPU
    return mle.packed_attention(q, q, q, layout, "causal", backend)


def layout_of(e):
    layout = mle.PackedLayout(PACKED, e["keep_k"], pad_to_multiple=16)
    samples = [list(pair) for pair in zip(e["patches"], e["registers"], strict=True)]
    rows = layout.pack(samples)
    return rows, layout.unpack(rows), layout.visible, layout.kept, layout.cu_seqlens


def pipeline(e):
    modules = torch.nn.Sequential(
        mle.AttentionMaskedNestedDropout("r").eval(),
        mle.NestedDropoutSequencePacker(
            ["p", "r"], "packed", "mask", "inner", "outer", pad_to_multiple=128
        ),
        mle.SequenceUnpacker("packed", ["p2", "r2"], "inner", "outer"),
    )
    out = modules({"p": e["patches"], "r": e["registers"], "eval_keep_k": e["keep_k"]})
    return out["packed"], out["p2"], out["r2"], out["mask"].kv_indices


def rule_of(e):
    rule, ids = mle.generate_nested_dropout_attention_mask([4, 5, 4, 3], e["keep_k"])
    q = torch.arange(16, device=ids.device)
    return rule(None, None, q[:, None], q), ids


MASKED_DROPOUT = mle.MaskedNestedDropout("r", C).eval()  # PyTorch's trunc_normal_ reads, too


def masked_dropout(e):
    """Of numbers: it cuts by Python's slices, so a tensor would be read."""
    state = {"dropout_mask_token": e["pred"][0, 0]}
    data_dict = {"r": [x * 1 for x in e["registers"]], "eval_keep_k": [2, 3]}
    return torch.func.functional_call(MASKED_DROPOUT, state, (data_dict,))["r"]


# public name -> calls of it
CALLS = {
    "AttentionMaskMseLoss": [
        lambda e: mle.AttentionMaskMseLoss()(
            e["pred"], e["target"], e["mask"], e["grey"].detach(), e["weighting"]
        )
    ],
    "MaskEditLoss": [lambda e: mle.MaskEditLoss()(e["pred"], e["target"], e["weighting"])],
    "MseLoss": [lambda e: mle.MseLoss()(e["pred"], e["target"], e["weighting"])],
    "masked_edit_token_mean_loss": [
        lambda e: mle.masked_edit_token_mean_loss(
            e["pred"], e["target"], e["mask"], e["grey"].detach(), e["weighting"]
        ),
        lambda e: mle.masked_edit_token_mean_loss(e["pred"], e["target"], e["grey"]),
    ],
    "compute_loss_multi_resolution": [
        lambda e: mle.compute_loss_multi_resolution(
            e["pred"], e["target"], e["mask"], e["grey"].detach(), e["weighting"]
        )
    ],
    "masked_mse": [lambda e: mle.masked_mse(e["pred"], e["target"], e["mask"])],
    "masked_sse": [lambda e: mle.masked_sse(e["pred"], e["target"], e["grey"])],
    "masked_cross_entropy": [
        lambda e: mle.masked_cross_entropy(e["logits"], e["labels"]),
        lambda e: mle.masked_cross_entropy(e["logits"], e["labels"], e["grey"], reduction="none"),
        lambda e: mle.masked_cross_entropy(e["logits"], e["labels"], gradient_in_forward=True),
        lambda e: mle.masked_cross_entropy(
            e["logits"].movedim(-1, 1), e["labels"], e["mask"][:1], class_dim=1,
            reduction="sequence_mean", shift=1, segment_ids=e["documents"][:1],
        ),
        lambda e: mle.masked_cross_entropy(e["logits"] * 1, e["labels"], inplace_backward=True),
        everything,
    ],
    "aggregate_tokens": [
        lambda e: mle.aggregate_tokens(e["grey"], None, "weighted_mean", token_weight=e["grey"]),
        lambda e: mle.aggregate_tokens(
            e["grey"], e["mask"], "sequence_mean", segment_ids=e["documents"]
        ),
        lambda e: mle.aggregate_tokens(e["grey"], None, "sequence_sum", normalizer=e["count"]),
    ],
    "row_statistics": [
        lambda e: tuple(mle.row_statistics(e["logits"], e["labels"], e["mask"])),
        lambda e: tuple(mle.row_statistics(e["logits"], temperature=e["number"]))[:2],
        lambda e: tuple(
            mle.row_statistics(e["logits"], e["labels"], temperature=e["grey"].detach() + 0.5)
        ),
    ],
    "MaskedCrossEntropyLoss": [
        lambda e: mle.MaskedCrossEntropyLoss(label_smoothing=0.1, shift=1)(
            e["logits"], e["labels"], e["mask"], normalizer=e["count"]
        )
    ],
    "masked_linear_cross_entropy": [
        lambda e: mle.masked_linear_cross_entropy(e["hidden"], e["head"], e["labels"], e["mask"]),
        lambda e: mle.masked_linear_cross_entropy(
            e["hidden"], e["head"], e["labels"], e["grey"], shift=1, reduction="sequence_mean",
            bias=e["head"][:, 0], segment_ids=e["documents"],
        ),
    ],
    "linear_row_statistics": [
        lambda e: tuple(
            mle.linear_row_statistics(e["hidden"], e["head"], e["labels"], temperature=e["number"])
        ),
        lambda e: tuple(mle.linear_row_statistics(e["hidden"], e["head"]))[:2],
    ],
    "MaskedLinearCrossEntropyLoss": [
        lambda e: mle.MaskedLinearCrossEntropyLoss(label_smoothing=0.1, shift=1)(
            e["hidden"], e["head"], e["labels"], e["mask"], normalizer=e["count"]
        )
    ],
    "MultiTokenPredictionLoss": [
        lambda e: mle.MultiTokenPredictionLoss(2, (1.0, 0.5))(
            [e["logits"], e["logits"]], e["labels"], e["mask"], segment_ids=e["documents"]
        ),
        lambda e: mle.MultiTokenPredictionLoss(2, (1.0, 0.5))(
            e["hidden"], e["labels"], e["mask"], heads=[e["head"], (e["head"], e["head"][:, 0])]
        ),
    ],
    "HiddenStateMTPLoss": [
        lambda e: made(lambda: mle.HiddenStateMTPLoss(V, HIDDEN), e)(
            e["hidden"], e["labels"], e["mask"]
        )
    ],
    "distributed": [vocab_parallel, vocab_parallel_linear, global_token_count],
    "UnifiedLoss": [
        lambda e: made(lambda: mle.UnifiedLoss(V, HIDDEN), e)(e["logits"], e["labels"], e["mask"])
    ],
    "create_unified_loss": [
        lambda e: made(lambda: mle.create_unified_loss({"vocab_size": V}), e)(
            e["logits"], e["labels"], e["mask"]
        )
    ],
    "lengths_to_mask": [lambda e: mle.lengths_to_mask(e["lengths"], S)],
    "map_mask_to_latent": [lambda e: mle.map_mask_to_latent(e["image"])],
    "shift_labels": [
        lambda e: mle.shift_labels(e["labels"]),
        lambda e: mle.shift_labels(e["labels"], e["mask"], e["documents"], shift=2),
    ],
    "mask_labels": [
        lambda e: mle.mask_labels(e["labels"], e["mask"]),
        lambda e: mle.mask_labels(e["labels"], e["grey"]),
    ],
    "pad_latents_for_multi_res": [
        lambda e: mle.pad_latents_for_multi_res([x[0] for x in e["registers"]])
    ],
    "sample_keep_k": [
        lambda e: mle.sample_keep_k(e["lengths"], B, device=e["lengths"].device),
        lambda e: mle.sample_keep_k(8, B, "pow2", device=e["lengths"].device),
    ],
    "nested_dropout_block_mask": [
        lambda e: mle.nested_dropout_block_mask(PACKED, e["keep_k"]).kv_indices
    ],
    "packed_attention": [
        lambda e: packed(e, "auto"), lambda e: packed(e, "sdpa"), lambda e: packed(e, "flex"),
    ],
    "PackedLayout": [layout_of],
    "RowIntervals": [intervals_of],
    "AttentionMaskedNestedDropout": [pipeline],
    "NestedDropoutSequencePacker": [pipeline],
    "SequenceUnpacker": [pipeline],
    "MaskedNestedDropout": [masked_dropout],
    "generate_nested_dropout_mask_ids": [
        lambda e: mle.generate_nested_dropout_mask_ids([4, 5, 4, 3], e["keep_k"], 20)
    ],
    "generate_nested_dropout_attention_mask": [rule_of],
}  # fmt: skip

READS = {
    "check_padding": "compares numbers: it reads what a step returns",
    "unpad": "its sizes follow from the mask",
    "reference": "a module: plain PyTorch, one function for each of these",
    "RowStatistics": "a tuple that others return",
    "ChannelInvariantTokenLoss": "another name of AttentionMaskMseLoss",
    "__version__": "a string",
}
