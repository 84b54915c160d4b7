# SPDX-License-Identifier: BSD-3-Clause
"""Squared errors divided by a number of the caller's: of all micro-batches and ranks."""

import math

import pytest
import torch

import masked_loss_ext as mle

# Squares 1, 4 | 9, 16 | 25, 36 of three tokens, of which the mask keeps the first and the last.
PREDICTION = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
ZERO, MASK = torch.zeros_like(PREDICTION), torch.tensor([[1, 0, 1]])
SUM = 1 + 4 + 25 + 36

# Each divides the sum by the normalizer; token losses are means over C = 2 first.
LOSSES = {
    "masked_mse": (lambda p, n: mle.masked_mse(p, ZERO, MASK, normalizer=n), SUM),
    "masked_sse": (lambda p, n: mle.masked_sse(p, ZERO, MASK, normalizer=n), SUM),
    "MseLoss": (lambda p, n: mle.MseLoss()(p, ZERO, attention_mask=MASK, normalizer=n), SUM),
    "MaskEditLoss": (
        lambda p, n: mle.MaskEditLoss()(p, ZERO, attention_mask=MASK, normalizer=n),
        2 * SUM,
    ),
    "MaskEditLoss, sequences": (
        lambda p, n: mle.MaskEditLoss()(
            p, ZERO, reduction="sequence_sum", attention_mask=MASK, normalizer=n
        ),
        2 * SUM / 2,
    ),
    "AttentionMaskMseLoss": (
        lambda p, n: mle.AttentionMaskMseLoss()(p, ZERO, MASK, normalizer=n),
        SUM / 2,
    ),
    "compute_loss_multi_resolution": (
        lambda p, n: mle.compute_loss_multi_resolution(p, ZERO, MASK, normalizer=n),
        SUM / 2,
    ),
}
NORMALIZERS = {"int": 8, "float": 8.0, "tensor": torch.tensor(8), "float32": torch.tensor(8.0)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", NORMALIZERS)
def test_by_hand(name, kind):
    loss_fn, total = LOSSES[name]
    leaf = PREDICTION.clone().requires_grad_()
    loss = loss_fn(leaf, NORMALIZERS[kind])
    assert loss.dtype == torch.float32 and loss.item() == total / 8
    loss.backward()
    factor = total / SUM / 8
    assert leaf.grad.tolist() == [[[2 * factor, 4 * factor], [0, 0], [10 * factor, 12 * factor]]]


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_anywhere_is_zero(name):
    """A count of 0 over all ranks: no division by it, and a gradient of 0."""
    leaf = PREDICTION.clone().requires_grad_()
    loss = LOSSES[name][0](leaf, torch.tensor(0)) * 1
    loss.backward()
    assert loss.item() == 0 and not leaf.grad.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(name, dtype):
    loss_fn, total = LOSSES[name]
    loss = loss_fn(PREDICTION.to(dtype), 8)
    assert loss.item() == total / 8
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_for_counts_that_change(name):
    torch.compiler.reset()
    compiled = torch.compile(LOSSES[name][0], fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (8, 16):
            assert compiled(PREDICTION, torch.tensor(count)).item() == LOSSES[name][1] / count


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: mle.masked_mse(PREDICTION, ZERO, MASK, reduction="sum", normalizer=3),
            ValueError,
            "masked_mse: normalizer must be None for reduction 'sum'",
        ),
        (
            lambda: mle.MseLoss("none")(PREDICTION, ZERO, normalizer=torch.tensor(3)),
            ValueError,
            "MseLoss: normalizer must be None for reduction 'none'",
        ),
        (
            lambda: mle.masked_sse(PREDICTION, ZERO, MASK, normalizer=-1),
            ValueError,
            "masked_sse: normalizer must be a finite number at least 0, got -1",
        ),
        (
            lambda: mle.masked_sse(PREDICTION, ZERO, MASK, normalizer=torch.tensor(math.nan)),
            ValueError,
            "masked_sse: normalizer must be finite and not negative, got nan",
        ),
        (
            lambda: mle.MaskEditLoss()(PREDICTION, ZERO, normalizer=torch.ones(2)),
            ValueError,
            r"MaskEditLoss: normalizer must be a number \[\], got \[2\]",
        ),
        (
            lambda: mle.MseLoss()(PREDICTION, ZERO, normalizer="3"),
            TypeError,
            "MseLoss: normalizer must be",
        ),
        (
            lambda: mle.MaskEditLoss()(
                PREDICTION, ZERO, normalizer=torch.tensor(2.0, requires_grad=True)
            ),
            ValueError,
            "MaskEditLoss: normalizer must",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=f"^{text}"):
        call()
