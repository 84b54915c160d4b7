# SPDX-License-Identifier: BSD-3-Clause
"""ContrastiveLoss: three kinds by hand, against loops over pairs, empty sets, errors."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from masked_loss_ext.unified import ContrastiveLoss

KINDS = ("infonce", "standard", "triplet")
# On a line, so that distances are differences: 0 and 1 of one label, 3 of another.
LINE, LABELS = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([7, 7, 2])


def raw(kind, **keywords):
    return ContrastiveLoss(loss_type=kind, normalize_embeddings=False, **keywords)


def close(ours, expected):
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=ours.dtype))


def random(n=8, dim=4):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, dim, generator=g, dtype=torch.float64, requires_grad=True)
    return x, torch.randint(3, (n,), generator=g)


# --- infonce -------------------------------------------------------------------------------------


def test_infonce_pairs_by_hand():
    """Similarities 0 -> (., 0, 0), 1 -> (0, ., 3): the anchor is not among its own rivals."""
    loss = raw("infonce", temperature=1.0)(LINE, positive_pairs=torch.tensor([[0, 1], [1, 2]]))
    close(loss, (math.log(2) + math.log1p(math.exp(-3))) / 2)
    loss = raw("infonce", temperature=3.0)(LINE, positive_pairs=torch.tensor([[1, 2]]))
    close(loss, math.log1p(math.exp(-1)))


def test_perfect_pairs_are_near_0():
    """With itself in the softmax no anchor could come below ln 2 = 0.693."""
    x = torch.eye(4).repeat(2, 1)
    pairs = torch.stack([torch.arange(4), torch.arange(4) + 4], 1)
    expected = math.log1p(6 * math.exp(-1 / 0.07))
    close(ContrastiveLoss()(x, positive_pairs=pairs), expected)
    close(ContrastiveLoss()(x, torch.arange(4).repeat(2)), expected)
    assert expected < 1e-5


def test_infonce_labels_equals_a_loop():
    x, labels = random()
    labels[0] = 9  # of its own: no anchor, but a rival
    unit = x / x.norm(dim=1, keepdim=True)
    terms = []
    for i in range(len(x)):
        rivals = [a for a in range(len(x)) if a != i]
        lse = torch.logsumexp(torch.stack([unit[i] @ unit[a] for a in rivals]) / 0.07, 0)
        positives = [unit[i] @ unit[a] / 0.07 - lse for a in rivals if labels[a] == labels[i]]
        if positives:
            terms.append(-sum(positives) / len(positives))
    loss = ContrastiveLoss()(x, labels)
    torch.testing.assert_close(loss, sum(terms) / len(terms))
    assert gradcheck(lambda x: ContrastiveLoss(0.5)(x, labels), [x])


# --- standard ------------------------------------------------------------------------------------


def test_standard_by_hand():
    """Positive distance 1; negatives 3 and 2, of which the margin of 2.5 reaches one."""
    expected = 0.5 * (1 + (0 + 0.5**2) / 2)
    close(raw("standard", margin=2.5)(LINE, LABELS), expected)
    pairs = {
        "positive_pairs": torch.tensor([[0, 1]]),
        "negative_pairs": torch.tensor([[0, 2], [1, 2]]),
    }
    close(raw("standard", margin=2.5)(LINE, **pairs), expected)
    close(raw("standard")(LINE, positive_pairs=pairs["positive_pairs"]), 0.5)
    close(raw("standard", margin=2.5)(LINE, negative_pairs=pairs["negative_pairs"]), 0.0625)


@pytest.mark.parametrize("pairs", [False, True])
def test_standard_gradient_even_where_embeddings_are_equal(pairs):
    x, labels = random()
    index = torch.tensor([[0, 1], [2, 3]])
    given = {"positive_pairs": index, "negative_pairs": index + 4} if pairs else {"labels": labels}
    loss_fn = ContrastiveLoss(loss_type="standard", margin=1.0)
    assert gradcheck(lambda x: loss_fn(x, **given), [x])
    equal = torch.ones(8, 4, requires_grad=True)
    loss_fn(equal, **given).backward()
    assert equal.grad.isfinite().all()


# --- triplet -------------------------------------------------------------------------------------


def test_triplet_by_hand():
    """0: 1 - 3 + m, 1: 1 - 2 + m; 2 has no positive."""
    close(raw("triplet", margin=1.5)(LINE, LABELS), (0.0 + 0.5) / 2)
    close(raw("triplet", margin=2.5)(LINE, LABELS), (0.5 + 1.5) / 2)


def test_triplet_takes_the_hardest():
    x, labels = random(10)
    distance = (x[:, None] - x).norm(dim=-1)
    terms = []
    for i in range(10):
        same = [distance[i, j] for j in range(10) if labels[j] == labels[i] and j != i]
        other = [distance[i, j] for j in range(10) if labels[j] != labels[i]]
        if same and other:
            terms.append((max(same) - min(other) + 0.5).relu())
    torch.testing.assert_close(raw("triplet")(x, labels), sum(terms) / len(terms))
    assert gradcheck(lambda x: raw("triplet")(x, labels), [x])


# --- what does not count -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_and_masked_embeddings_are_as_if_absent(kind):
    x, labels = random()
    keep = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1])
    expected = ContrastiveLoss(loss_type=kind)(x[keep != 0], labels[keep != 0])
    poisoned = x.detach().masked_fill(keep[:, None] == 0, math.nan)
    masked = ContrastiveLoss(loss_type=kind)(poisoned, labels, embedding_mask=keep)
    torch.testing.assert_close(masked, expected)
    ignored = ContrastiveLoss(loss_type=kind)(poisoned, labels.masked_fill(keep == 0, -100))
    torch.testing.assert_close(ignored, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [[], [1], [1, 2, 3]], ids=str)
def test_nothing_to_compare_is_0(kind, labels):
    x = torch.randn(len(labels), 4, requires_grad=True)
    loss_fn = ContrastiveLoss(loss_type=kind, margin=0.0)  # no positive, no close negative
    loss = loss_fn(x, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("kind", ["infonce", "standard"])
def test_no_pairs_are_0(kind):
    x = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(0, 2, dtype=torch.int64)
    loss = ContrastiveLoss(loss_type=kind)(x, positive_pairs=none, negative_pairs=none)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("kind", ["infonce", "standard"])
def test_a_pair_with_a_masked_end_does_not_count(kind):
    x, _ = random(4)
    pairs, mask = torch.tensor([[0, 1], [2, 3]]), torch.tensor([1, 1, 1, 0])
    loss_fn = ContrastiveLoss(loss_type=kind)
    expected = loss_fn(x[:3], positive_pairs=pairs[:1])
    torch.testing.assert_close(loss_fn(x, positive_pairs=pairs, embedding_mask=mask), expected)


def test_autocast_does_not_round_similarities():
    x, labels = random()
    x = x.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = ContrastiveLoss()(x, labels)
    assert torch.equal(loss, ContrastiveLoss()(x, labels))


# --- errors --------------------------------------------------------------------------------------

PAIRS = torch.tensor([[0, 1]])
BAD = [
    (lambda: ContrastiveLoss(loss_type="nce"), "Unknown loss type"),
    (lambda: ContrastiveLoss(temperature=0), "temperature must be a finite number above 0, got 0"),
    (lambda: raw("infonce")(LINE), "Labels required"),
    (lambda: raw("infonce")(LINE), "Either pairs or labels"),
    (lambda: raw("infonce")(LINE, negative_pairs=PAIRS), "Labels required"),
    (lambda: raw("standard")(LINE), "Either pairs or labels"),
    (lambda: raw("triplet")(LINE, positive_pairs=PAIRS), "Labels required"),
    (lambda: raw("triplet")(LINE, LABELS[:2]), "labels must have one entry per embedding"),
    (lambda: raw("infonce")(LINE, positive_pairs=PAIRS[0]), "positive_pairs must be [P, 2]"),
    (lambda: raw("standard")(LINE, LABELS.float()), "labels must be integers"),
    (lambda: raw("standard")(LINE[None], LABELS), "embeddings must have 2 dimensions [N, D]"),
    (
        lambda: raw("standard")(LINE, LABELS, embedding_mask=torch.ones(2)),
        "embedding_mask must have one entry per row of embeddings [3, 1], got [2]",
    ),
]


@pytest.mark.parametrize("call,text", BAD)
def test_errors(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith("ContrastiveLoss: ") and text in str(caught.value)
