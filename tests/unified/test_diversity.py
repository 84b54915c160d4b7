# SPDX-License-Identifier: BSD-3-Clause
"""DiversityLoss: three similarities by hand, against every pair by itself, masks, errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from masked_loss_ext.unified import DiversityLoss

METRICS = ("cosine", "l2", "dot")


def experts(n=4, rows=5, hidden=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(rows, hidden, generator=g, dtype=dtype) for _ in range(n)]


@pytest.mark.parametrize("metric,expected", [
    ("cosine", (0.6 + 0.0 + 0.8) / 3),
    ("l2", (1 / (1 + math.sqrt(20)) + 1 / (1 + math.sqrt(5)) + 1 / (1 + math.sqrt(13))) / 3),
    ("dot", (3 + 0 + 8) / 3),
])  # fmt: skip
def test_by_hand(metric, expected):
    """One row: (1, 0), (3, 4), (0, 2)."""
    outputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])]
    torch.testing.assert_close(DiversityLoss(metric)(outputs), torch.tensor(expected))
    torch.testing.assert_close(DiversityLoss(metric, 0.1)(outputs), torch.tensor(0.1 * expected))
    torch.testing.assert_close(DiversityLoss(metric)(torch.stack(outputs)), torch.tensor(expected))


def test_the_minimum_is_opposite_not_orthogonal():
    x = torch.randn(4, 3)
    torch.testing.assert_close(DiversityLoss()([x, -x]), torch.tensor(-1.0))
    torch.testing.assert_close(DiversityLoss()([x, x]), torch.tensor(1.0))


def by_pairs(metric, outputs):
    similarity = {
        "cosine": lambda x, y: F.cosine_similarity(x, y, dim=-1).mean(),
        "l2": lambda x, y: 1 / (1 + (x - y).norm(dim=-1).mean()),  # of the mean, not per row
        "dot": lambda x, y: (x * y).sum(-1).mean(),
    }[metric]
    pairs = list(itertools.combinations(outputs, 2))
    return sum(similarity(x, y) for x, y in pairs) / len(pairs)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_equals_every_pair_by_itself(metric, n):
    outputs = experts(n)
    torch.testing.assert_close(DiversityLoss(metric)(outputs), by_pairs(metric, outputs))
    keep = torch.tensor([1, 0, 1, 1, 0])
    expected = by_pairs(metric, [x[keep.bool()] for x in outputs])
    masked = [x.masked_fill(keep[:, None] == 0, math.nan) for x in outputs]
    torch.testing.assert_close(DiversityLoss(metric)(masked, attention_mask=keep), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_gradient(metric):
    outputs = [x.requires_grad_() for x in experts(3)]
    assert gradcheck(lambda *x: DiversityLoss(metric)(x), outputs)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_and_zero_outputs_have_a_finite_gradient(metric):
    """The distance is 0, or the length is."""
    for x in (torch.ones(2, 3), torch.zeros(2, 3)):
        outputs = [x.clone().requires_grad_() for _ in range(3)]
        loss = DiversityLoss(metric)(outputs)
        loss.backward()
        assert loss.isfinite() and all(y.grad.isfinite().all() for y in outputs)


def test_fewer_than_two_experts_are_0():
    x = torch.full((2, 3), math.nan, requires_grad=True)
    loss = DiversityLoss()([x])
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


def test_sequences_equal_their_rows():
    outputs = [torch.randn(2, 3, 4) for _ in range(3)]
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    flat = DiversityLoss()([x.flatten(0, 1) for x in outputs], attention_mask=mask.flatten())
    assert torch.equal(DiversityLoss()(outputs, attention_mask=mask), flat)


def test_an_unknown_metric_is_refused():
    text = "similarity_metric must be cosine, l2 or dot, got 'cosin'"
    with pytest.raises(ValueError, match=text):
        DiversityLoss("cosin")


BAD = [
    ([], ValueError, "must have at least one expert, got none"),
    (None, TypeError, "must be a list of tensors, got NoneType"),
    ([torch.ones(2, 3), torch.ones(2, 4)], ValueError, "expert_outputs[1] must be [N, H] like"),
    ([torch.ones(2), torch.ones(2)], ValueError, "expert_outputs[0] must be [N, H]"),
    ([torch.ones(2, 3).long()] * 2, ValueError, "must be a floating tensor, got torch.int64"),
]


@pytest.mark.parametrize("outputs,kind,text", BAD)
def test_errors(outputs, kind, text):
    with pytest.raises(kind) as caught:
        DiversityLoss()(outputs)
    assert str(caught.value).startswith("DiversityLoss: expert_outputs") and text in str(
        caught.value
    )
