# SPDX-License-Identifier: BSD-3-Clause
"""Public functions and modules read nothing of a row that the mask excludes, backward neither: its
pages are closed. A name is in CALLS or, with the reason, in REASONS."""

import pytest
import torch
from accuracy import assert_same_bits
from bit_calls import tensors_in
from closed_pages import PAGE, all_closed
from public_calls import CALLS as PUBLIC

import masked_loss_ext as mle
from masked_loss_ext import unified

V = PAGE // 4  # a row of float32 is a page
B, S = 2, 6
OFF = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 1, 1]]).bool()
# with a shift of 1 row t is scored against the label of t + 1
SHIFTED = torch.cat([OFF[:, 1:], torch.ones(B, 1, dtype=torch.bool)], 1)
BORDERS = torch.tensor([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()  # of the documents
SELECTS = "selects: README says that what the mask excludes is read there"
NO_ROWS = "has numbers of tokens, labels, masks or layouts alone"
MOVES = "moves what it is given"


def inputs():
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(B, S, V, generator=g),
        "other": torch.randn(B, S, V, generator=g),
        "head": torch.randn(7, V, generator=g) / V**0.5,
        "labels": torch.randint(5, (B, S), generator=g),
        "documents": torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]),
        "grey": torch.rand(B, S, generator=g),
        "number": torch.tensor(1.5),
    }


def rows(cls, *args, **keywords):
    """A call of a module on logits, labels and mask."""
    return lambda e, m: cls(*args, **keywords)(e["x"], e["labels"], m)


def cross_entropy(**keywords):
    return lambda e, m: mle.masked_cross_entropy(e["x"], e["labels"], m, **keywords)


def linear(**keywords):
    return lambda e, m: mle.masked_linear_cross_entropy(
        e["x"], e["head"], e["labels"], m, **keywords
    )


def documents(function):
    def run(e, m):
        return function(e["x"], e["labels"], m, shift=1, segment_ids=e["documents"],
                        reduction="sequence_mean")  # fmt: skip

    return run


IDS = {"eos_token_id": 3, "pad_token_id": 4}
# public name -> [(call of the entries and the mask, the rows that it excludes), ...]
CALLS = {
    "masked_mse": [(lambda e, m: mle.masked_mse(e["x"], e["other"], m), OFF)],
    "masked_sse": [(lambda e, m: mle.masked_sse(e["x"], e["other"], m), OFF)],
    "masked_edit_token_mean_loss": [
        (lambda e, m, loss=loss: mle.masked_edit_token_mean_loss(
            e["x"], e["other"], m, e["grey"], e["other"].exp().detach(), loss=loss), OFF)
        for loss in ("mse", "l1", "smooth_l1", "huber", "pseudo_huber")
    ],
    "AttentionMaskMseLoss": [
        (lambda e, m: mle.AttentionMaskMseLoss()(e["x"], e["other"], m, e["grey"]), OFF)
    ],
    "compute_loss_multi_resolution": [
        (lambda e, m: mle.compute_loss_multi_resolution(e["x"], e["other"], m, e["grey"]), OFF)
    ],
    "masked_cross_entropy": [
        *((cross_entropy(reduction=reduction), OFF)
          for reduction in ("mean", "sum", "none", "sequence_mean", "sequence_sum")),
        (cross_entropy(gradient_in_forward=True), OFF),
        (cross_entropy(return_stats=True, label_smoothing=0.1, softcap=9.0, z_loss=1e-3,
                       focal_gamma=1.5, temperature=1.5), OFF),
        (documents(mle.masked_cross_entropy), SHIFTED | BORDERS),
    ],
    "MaskedCrossEntropyLoss": [
        (rows(mle.MaskedCrossEntropyLoss, label_smoothing=0.1), OFF),
        (rows(mle.MaskedCrossEntropyLoss, shift=1), SHIFTED),
    ],
    "row_statistics": [
        (lambda e, m: tuple(mle.row_statistics(e["x"], e["labels"], m)), OFF),
        (lambda e, m: tuple(mle.row_statistics(e["x"], mask=m))[:2], OFF),
    ],
    "masked_linear_cross_entropy": [
        (linear(), OFF), (linear(reduction="none", chunk_rows=2), OFF), (linear(shift=1), SHIFTED),
        (linear(return_stats=True, chunk_rows=1), OFF),
    ],
    "linear_row_statistics": [
        (lambda e, m: tuple(mle.linear_row_statistics(e["x"], e["head"], e["labels"], m)), OFF)
    ],
    "MaskedLinearCrossEntropyLoss": [
        (lambda e, m: mle.MaskedLinearCrossEntropyLoss()(e["x"], e["head"], e["labels"], m), OFF)
    ],
    "MultiTokenPredictionLoss": [
        (lambda e, m: mle.MultiTokenPredictionLoss(1, (1.0,))([e["x"]], e["labels"], m), SHIFTED),
        (lambda e, m: mle.MultiTokenPredictionLoss(1, (1.0,))(
            e["x"], e["labels"], m, heads=[e["head"]]), SHIFTED),
    ],
    "distributed": [
        (lambda e, m: mle.distributed.vocab_parallel_cross_entropy(e["x"], e["labels"], m), OFF),
        (lambda e, m: mle.distributed.vocab_parallel_linear_cross_entropy(
            e["x"], e["head"], e["labels"], m), OFF),
    ],
    "UnifiedLoss": [
        (rows(mle.UnifiedLoss, V, V), OFF),
        (rows(mle.UnifiedLoss, V, V, shift_labels=True, use_focal_loss=True, ngram_size=2,
              penalty_on="model", **IDS), SHIFTED),
    ],
    "create_unified_loss": [(rows(mle.create_unified_loss, {"vocab_size": V}), OFF)],
    "unified.FocalLoss": [(rows(unified.FocalLoss, 0.5), OFF)],
    "unified.LabelSmoothingLoss": [(rows(unified.LabelSmoothingLoss, V), OFF)],
    "unified.PerplexityLoss": [(rows(unified.PerplexityLoss), OFF)],
    "unified.TemperatureScaledCrossEntropy": [
        (rows(unified.TemperatureScaledCrossEntropy, 0.8, vocab_size=V, eos_token_id=3,
              penalty_on="model"), OFF)
    ],
    "unified.NGramRepetitionPenalty": [
        (rows(unified.NGramRepetitionPenalty, 2, 0.1, V, penalty_on="model"), OFF)
    ],
    "unified.AdaptiveMTPLoss": [
        (lambda e, m: unified.AdaptiveMTPLoss(V)(e["x"], e["labels"], attention_mask=m), OFF)
    ],
    "unified.AntiRepetitionLoss": [(rows(unified.AntiRepetitionLoss, V, 3, 4, ngram_size=2), OFF)],
    "unified.AdaptiveAntiRepetitionLoss": [
        (rows(unified.AdaptiveAntiRepetitionLoss, V, 3, 4, ngram_size=2), OFF)
    ],
    "unified.SequenceRepetitionDetector": [
        (lambda e, m: unified.SequenceRepetitionDetector(penalty_on="model")(
            e["labels"], m, logits=e["x"]), OFF)
    ],
    "unified.DeepSeekLoss": [
        (lambda e, m: unified.DeepSeekLoss(V, V, 4, eos_token_id=3)(
            e["x"], e["labels"], attention_mask=m, gate_logits=e["other"][..., :4],
            expert_indices=torch.zeros(B, S, 2, dtype=torch.int64)), OFF)
    ],
    "unified.CompositeLoss": [
        (lambda e, m: unified.CompositeLoss(
            {"tokens": {"type": "label_smoothing", "num_classes": V}}
        )(inputs=e["x"], targets=e["labels"], attention_mask=m), OFF)
    ],
}  # fmt: skip
REASONS = {
    "MaskEditLoss": "has no mask", "MseLoss": "has no mask",
    "HiddenStateMTPLoss": SELECTS, "unified.MultiTokenPredictionLoss": SELECTS,
    "unified.ConsistencyLoss": SELECTS, "unified.DiversityLoss": SELECTS,
    "unified.ContrastiveLoss": SELECTS, "unified.AuxiliaryFreeMoEBalancer": SELECTS,
    "unified.AuxiliaryLoss": SELECTS, "unified.AdaptiveLossScaling": "has no mask",
    "unified.UnifiedLoss": "UnifiedLoss", "unified.create_unified_loss": "create_unified_loss",
    "aggregate_tokens": NO_ROWS, "lengths_to_mask": NO_ROWS, "shift_labels": NO_ROWS,
    "mask_labels": NO_ROWS, "sample_keep_k": NO_ROWS, "nested_dropout_block_mask": NO_ROWS,
    "PackedLayout": MOVES, "RowIntervals": NO_ROWS, "map_mask_to_latent": NO_ROWS,
    "generate_nested_dropout_mask_ids": NO_ROWS, "generate_nested_dropout_attention_mask": NO_ROWS,
    "pad_latents_for_multi_res": MOVES, "AttentionMaskedNestedDropout": MOVES,
    "NestedDropoutSequencePacker": MOVES, "SequenceUnpacker": MOVES, "MaskedNestedDropout": MOVES,
    "packed_attention": "attention: PyTorch's products of zeros in the place of what is hidden",
}  # fmt: skip
ALL = [(f"{name} {i}", *call) for name, calls in CALLS.items() for i, call in enumerate(calls)]


def results(call, given):
    torch.manual_seed(0)
    leaves = {n: given[n].detach().requires_grad_() for n in ("x", "other", "head")}
    found = [x for x in tensors_in(call({**given, **leaves}, ~OFF)) if x is not None]
    total = sum(x.sum() for x in found if x.requires_grad)
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [x.detach() for x in (*found, *grads) if x is not None]


@pytest.mark.parametrize(("call", "off"), [one[1:] for one in ALL], ids=[one[0] for one in ALL])
def test_closed_rows_are_not_read(call, off):
    given = inputs()
    wide = off[..., None].expand(B, S, V)
    with all_closed(given, {"x": wide}) as (closed, size):
        assert size == int(off.sum()) * PAGE
        found = results(call, closed)
    for one, expected in zip(found, results(call, given), strict=True):
        assert_same_bits(one, expected)


def test_every_public_name_is_here():
    names = {f"unified.{name}" for name in unified.__all__} | set(PUBLIC)
    assert not set(CALLS) & set(REASONS)
    assert set(CALLS) | set(REASONS) == names
