# SPDX-License-Identifier: BSD-3-Clause
"""FocalLoss, LabelSmoothingLoss, PerplexityLoss and ConsistencyLoss: by hand, against PyTorch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from masked_loss_ext.unified import ConsistencyLoss, FocalLoss, LabelSmoothingLoss, PerplexityLoss

LN2, LN3 = math.log(2), math.log(3)
CE, OTHER = math.log(4 / 3), math.log(4)  # of logits [ln 3, 0]: p = 3/4 and 1/4
# Two rows that count (p of the target 3/4 and 1/2), one that the mask drops, one without a label.
LOGITS = torch.tensor([[LN3, 0.0], [0.0, 0.0], [math.nan, 9.0], [math.inf, 0.0]])
TARGETS, MASK = torch.tensor([0, 1, 1, -100]), torch.tensor([1, 1, 0, 1])


def close(ours, expected):
    torch.testing.assert_close(ours, torch.as_tensor(expected, dtype=ours.dtype))


def batch(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(7, (3, 5), generator=g)
    targets[0, 2] = -100
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [0] * 5])
    kept = (mask != 0) & (targets != -100)
    return logits, targets, mask, kept


# --- focal ---------------------------------------------------------------------------------------

ROWS = CE / 16, LN2 / 4  # (1 - p)^2 ce


@pytest.mark.parametrize("alpha,expected", [
    (1.0, sum(ROWS) / 2),
    (0.5, sum(ROWS) / 4),
    (torch.tensor([2.0, 4.0]), (2 * ROWS[0] + 4 * ROWS[1]) / 2),  # by the rows, not their weights
])  # fmt: skip
def test_focal_by_hand(alpha, expected):
    close(FocalLoss(alpha)(LOGITS, TARGETS, MASK), expected)
    close(FocalLoss(alpha, reduction="sum")(LOGITS, TARGETS, MASK), 2 * expected)
    rows = FocalLoss(alpha, reduction="none")(LOGITS, TARGETS, MASK)
    assert rows.shape == (4,) and (rows[2:] == 0).all()
    close(rows.sum(), 2 * expected)


def test_focal_gamma_0_is_cross_entropy():
    logits, targets, mask, kept = batch()
    expected = F.cross_entropy(logits[kept], targets[kept])
    torch.testing.assert_close(FocalLoss(gamma=0.0)(logits, targets, mask), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.5])
def test_focal_equals_the_formula_and_its_gradient(gamma):
    logits, targets, mask, kept = batch()
    alpha = torch.linspace(0.2, 1.5, 7, dtype=torch.float64)
    ce = F.cross_entropy(logits[kept], targets[kept], reduction="none")
    p = torch.exp(-ce)
    expected = (alpha[targets[kept]] * (1 - p) ** gamma * ce).mean()
    loss = FocalLoss(alpha, gamma)(logits, targets, mask)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    # alpha [(1 - p)^gamma + gamma (1 - p)^(gamma - 1) p ce] times the derivative of ce
    slope = alpha[targets[kept]] * ((1 - p) ** gamma + gamma * (1 - p) ** (gamma - 1) * p * ce)
    one_hot = F.one_hot(targets[kept], 7)
    by_hand = slope[:, None] * (logits[kept].softmax(-1) - one_hot) / kept.sum()
    torch.testing.assert_close(ours[kept], by_hand)
    assert (ours[~kept] == 0).all()


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_at_p_1(gamma):
    """Where p rounds to 1, and (1 - p)^(gamma - 1) of PyTorch is infinite."""
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    FocalLoss(gamma=gamma)(logits, torch.tensor([0])).backward()
    assert (logits.grad == 0).all()


def test_focal_alpha_is_a_buffer():
    alpha = torch.tensor([2.0, 4.0])
    loss_fn = FocalLoss(alpha)
    assert list(loss_fn.state_dict()) == ["alpha"] and not FocalLoss(0.5).state_dict()
    copied = copy.deepcopy(loss_fn)
    loss_fn.load_state_dict({"alpha": torch.ones(2)})
    close(loss_fn(LOGITS, TARGETS, MASK), sum(ROWS) / 2)
    assert copied.alpha.tolist() == [2.0, 4.0]
    assert "alpha=[2], gamma=2.0" in repr(loss_fn)


# --- label smoothing -----------------------------------------------------------------------------


def test_smoothing_by_hand():
    """Two classes: (1 - e) on the target, e on the other."""
    e = 0.2
    expected = ((1 - e) * CE + e * OTHER + LN2) / 2
    close(LabelSmoothingLoss(2, e)(LOGITS, TARGETS, MASK), expected)
    close(LabelSmoothingLoss(2, 0.5)(LOGITS, TARGETS, MASK), ((CE + OTHER) / 2 + LN2) / 2)
    close(LabelSmoothingLoss(2, 0.0)(LOGITS, TARGETS, MASK), (CE + LN2) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5, 6 / 7])
def test_smoothing_equals_soft_targets(smoothing):
    logits, targets, mask, kept = batch()
    soft = torch.full((int(kept.sum()), 7), smoothing / 6, dtype=torch.float64)
    soft.scatter_(1, targets[kept][:, None], 1 - smoothing)
    expected = F.cross_entropy(logits[kept], soft)
    loss = LabelSmoothingLoss(7, smoothing)(logits, targets, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    loss.backward()
    by_hand = (logits[kept].softmax(-1) - soft) / kept.sum()  # p - q
    torch.testing.assert_close(logits.grad[kept], by_hand.detach())


def test_one_class_is_not_smoothed():
    logits = torch.randn(3, 1, requires_grad=True)
    loss = LabelSmoothingLoss(1, 0.1)(logits, torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


# --- perplexity ----------------------------------------------------------------------------------


def test_perplexity_by_hand():
    out = PerplexityLoss()(LOGITS, TARGETS, MASK)
    assert list(out) == ["loss", "perplexity"]
    close(out["loss"], (CE + LN2) / 2)
    close(out["perplexity"], math.sqrt(8 / 3))
    uniform = PerplexityLoss()(torch.zeros(4, 50), torch.arange(4))
    close(uniform["perplexity"], 50.0)
    nothing = PerplexityLoss(ignore_index=3)(torch.zeros(2, 5), torch.tensor([3, 3]))
    assert nothing["loss"] == 0 and nothing["perplexity"] == 1


def test_ignored_rows_do_not_shrink_the_mean():
    """Half of the rows ignored: not half of the loss."""
    logits, targets, _, _ = batch()
    targets = torch.where(torch.arange(5) < 2, targets.clamp(min=0), -100)
    expected = F.cross_entropy(logits[:, :2].flatten(0, 1), targets[:, :2].flatten())
    torch.testing.assert_close(PerplexityLoss()(logits, targets)["loss"], expected)
    torch.testing.assert_close(LabelSmoothingLoss(7, 0.0)(logits, targets), expected)
    torch.testing.assert_close(FocalLoss(gamma=0.0)(logits, targets), expected)


# --- consistency ---------------------------------------------------------------------------------


def distributions():
    """p = (3/4, 1/4), q = (1/2, 1/2), and rows of which nothing is read."""
    original = torch.tensor([[LN3, 0.0], [math.nan, 1.0]], requires_grad=True)
    augmented = torch.tensor([[0.0, 0.0], [math.inf, 1.0]], requires_grad=True)
    return original, augmented, torch.tensor([1, 0])


KL = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)


@pytest.mark.parametrize("kind,expected", [("mse", 1 / 16), ("kl", KL), ("ce", LN2)])
def test_consistency_by_hand(kind, expected):
    original, augmented, mask = distributions()
    loss = ConsistencyLoss(kind)(original, augmented, mask)
    close(loss, expected)
    close(ConsistencyLoss(kind, mean_over_all=True)(original, augmented, mask), expected / 2)
    loss.backward()
    assert (augmented.grad[1] == 0).all() and (augmented.grad[0] != 0).any()
    if kind == "ce":  # a label
        assert original.grad is None or (original.grad == 0).all()
    else:
        assert (original.grad[0] != 0).any() and (original.grad[1] == 0).all()


@pytest.mark.parametrize("kind", ["mse", "kl", "ce"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_consistency_equals_torch(kind, temperature):
    x, _, mask, _ = batch()
    y = torch.randn(3, 5, 7, dtype=torch.float64)
    a, b = x[mask != 0], y[mask != 0]
    p, q = (a / temperature).softmax(-1), (b / temperature).softmax(-1)
    expected = {
        "mse": F.mse_loss(p, q),
        "kl": F.kl_div(p.log(), q, reduction="batchmean"),
        "ce": F.cross_entropy(b, a.argmax(-1)),
    }[kind]
    loss_fn = ConsistencyLoss(kind, temperature)
    torch.testing.assert_close(loss_fn(x, y, mask), expected)
    assert gradcheck(lambda x, y: loss_fn(x, y, mask), [x, y.requires_grad_()])


def test_the_threshold_keeps_what_the_original_is_sure_of():
    original = torch.tensor([[LN3, 0.0], [0.0, 5.0]])
    augmented = torch.tensor([[0.0, 0.0], [LN3, 0.0]])
    loss = ConsistencyLoss("ce", threshold=0.9, use_threshold=True)(original, augmented)
    close(loss, OTHER)
    close(ConsistencyLoss("ce", threshold=0.9)(original, augmented), (LN2 + OTHER) / 2)


def test_a_class_banned_in_both_has_no_term():
    x = torch.tensor([[LN3, 0.0, -math.inf]], requires_grad=True)
    y = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    loss = ConsistencyLoss("kl")(x, y)
    close(loss, KL)
    loss.backward()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


# --- errors --------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1])
BAD = [
    (lambda: FocalLoss(gamma=-1.0), "gamma must be a finite number at least 0, got -1.0"),
    (lambda: FocalLoss(gamma=math.nan), "gamma must be a finite number at least 0, got nan"),
    (lambda: FocalLoss(reduction="max"), "reduction must be mean, sum or none, got 'max'"),
    (lambda: FocalLoss(torch.ones(2, 2)), "alpha must be a number or floating, of one"),
    (lambda: FocalLoss(torch.ones(3))(torch.zeros(2, 2), LABELS), "alpha must have one entry per"),
    (
        lambda: FocalLoss(torch.ones(2))(torch.zeros(2, 2), LABELS, torch.ones(3)),
        "attention_mask shape must be [2]",
    ),
    (lambda: LabelSmoothingLoss(2, 0.6), "smoothing must be a finite number at least 0 and"),
    (lambda: LabelSmoothingLoss(2, -0.1), "got -0.1"),
    (
        lambda: LabelSmoothingLoss(3)(torch.zeros(2, 2), LABELS),
        "inputs must have num_classes 3 as its last dimension, got [2, 2]",
    ),
    (lambda: ConsistencyLoss("js"), "Unknown consistency type"),
    (lambda: ConsistencyLoss(temperature=0.0), "temperature must be a finite number above 0"),
    (
        lambda: ConsistencyLoss()(torch.zeros(2, 2), torch.zeros(2, 3)),
        "outputs_augmented must have the shape of outputs_original [2, 2], got [2, 3]",
    ),
    (
        lambda: ConsistencyLoss()(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(3)),
        "confidence_mask must have one entry per row of outputs_original [2, 2], got [3]",
    ),
]


@pytest.mark.parametrize("call,text", BAD)
def test_errors(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert text in str(caught.value)
