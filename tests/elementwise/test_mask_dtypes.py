# SPDX-License-Identifier: BSD-3-Clause
"""Masks of dtypes that PyTorch can store and hardly compute with: each function says so itself.

Of float8_e8m0fnu, a scale, no value is 0.
"""

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext import unified
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms
from tests.elementwise.test_errors import check

P, ERROR = torch.zeros(2, 3, 4), torch.zeros(2, 3)
X, Y = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
HIDDEN = torch.zeros(2, 3, 8)

# What takes a mask, the function and the argument that the sentence names.
CALLS = [
    (lambda m: mle.masked_cross_entropy(X, Y, m), "masked_cross_entropy: mask"),
    (lambda m: mle.row_statistics(X, Y, m), "row_statistics: mask"),
    (lambda m: mle.MaskedCrossEntropyLoss()(X, Y, m), "masked_cross_entropy: mask"),
    (lambda m: cross_entropy_terms(X, Y, m), "cross_entropy_terms: mask"),
    (lambda m: mle.aggregate_tokens(ERROR, m), "aggregate_tokens: mask"),
    (
        lambda m: mle.masked_edit_token_mean_loss(P, P, m),
        "masked_edit_token_mean_loss: attention_mask",
    ),
    (
        lambda m: mle.masked_edit_token_mean_loss(P, P, None, m),
        "masked_edit_token_mean_loss: edit_mask",
    ),
    (
        lambda m: mle.compute_loss_multi_resolution(P, P, m),
        "compute_loss_multi_resolution: attention_mask",
    ),
    (
        lambda m: mle.compute_loss_multi_resolution(P, P, None, m),
        "compute_loss_multi_resolution: edit_mask",
    ),
    (lambda m: mle.AttentionMaskMseLoss()(P, P, m), "AttentionMaskMseLoss: attention_mask"),
    (lambda m: mle.AttentionMaskMseLoss()(P, P, None, m), "AttentionMaskMseLoss: edit_mask"),
    (lambda m: mle.MaskEditLoss()(P, P, attention_mask=m), "MaskEditLoss: attention_mask"),
    (lambda m: mle.MaskEditLoss()(P, P, edit_mask=m), "MaskEditLoss: edit_mask"),
    (lambda m: mle.masked_sse(ERROR, ERROR, m), "masked_sse: mask"),
    (lambda m: mle.masked_mse(ERROR, ERROR, m), "masked_mse: mask"),
    (lambda m: mle.mask_labels(Y, m), "mask_labels: mask"),
    (lambda m: mle.unpad(P, m), "unpad: mask"),
    (
        lambda m: mle.map_mask_to_latent(m[None, :1, :1].expand(1, 16, 16)),
        "map_mask_to_latent: image_mask",
    ),
    (lambda m: mle.MultiTokenPredictionLoss(1, (1.0,))([X], Y, m), "attention_mask"),
    (lambda m: mle.HiddenStateMTPLoss(5, 8, 1)(HIDDEN, Y, m), "attention_mask"),
    (lambda m: mle.UnifiedLoss(5)(X, Y, m), "attention_mask"),
    (lambda m: unified.AntiRepetitionLoss(5, 1, 2)(X, Y, m), "mask"),
    (lambda m: unified.FocalLoss()(X, Y, attention_mask=m), "mask"),
    (lambda m: unified.PerplexityLoss()(X, Y, m), "mask"),
    (lambda m: unified.NGramRepetitionPenalty(vocab_size=5)(X, Y, m), "attention_mask"),
    (lambda m: unified.SequenceRepetitionDetector()(Y, m), "attention_mask"),
    (lambda m: unified.ConsistencyLoss()(X, X, m), "ConsistencyLoss: confidence_mask"),
    (lambda m: unified.DiversityLoss()([HIDDEN, HIDDEN], attention_mask=m), "attention_mask"),
]
IDS = [f"{i}-{name}" for i, (_, name) in enumerate(CALLS)]
DTYPES = ["int1", "uint4", "float8_e8m0fnu", "float4_e2m1fn_x2"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call,name", CALLS, ids=IDS)
def test_is_refused_by_name(call, name, dtype):
    dtype = getattr(torch, dtype)
    mask = torch.ones(2, 3, dtype=torch.uint8).view(dtype)
    check(lambda: call(mask), ValueError, name, "of a dtype that PyTorch computes with", str(dtype))


@pytest.mark.parametrize("call,name", CALLS, ids=IDS)
def test_the_call_is_good_otherwise(call, name):
    call(torch.ones(2, 3, dtype=torch.uint8))
