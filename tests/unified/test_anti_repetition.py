# SPDX-License-Identifier: BSD-3-Clause
"""AntiRepetitionLoss and its adaptive form: statistics by hand, masks, weights that change."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from masked_loss_ext.unified import AdaptiveAntiRepetitionLoss, AntiRepetitionLoss

V, EOS, PAD = 12, 10, 11
PARTS = ["base_loss", "repetition_penalty", "eos_penalty", "diversity_bonus", "total_loss"]


def loss_of(labels, mask=None, n=2, pad=PAD, **keywords):
    labels = torch.tensor(labels)
    loss_fn = AntiRepetitionLoss(V, EOS, pad, ngram_size=n, **keywords)
    mask = None if mask is None else torch.tensor(mask)
    return loss_fn(torch.zeros(*labels.shape, V), labels, mask, return_components=True)


ROWS = [  # label, row, n, (repetition, early end, diversity)
    ("no_repetition", [1, 2, 3, 4], 2, (0, 0, 1)),
    ("one_token", [7, 7, 7, 7], 2, (2 / 3, 0, 1 / 4)),
    ("twice", [1, 2, 1, 2, 10], 2, (1 / 4, 0, 2 / 4)),
    ("end_before_the_last", [1, 10, 2, 3], 2, (0, 0.5 / 4, 1)),
    ("two_ends", [1, 10, 2, 10], 2, (0, 2 / 4, 1)),
    ("end_before_padding", [1, 2, 10, 11, 11], 2, (0, 0, 1)),
    ("padding_breaks", [1, 2, 11, 1, 2], 3, (0, 0, 2 / 4)),
    ("padding_alone", [11, 11, 11], 2, (0, 0, 0)),
    ("end_alone", [10], 1, (0, 0, 0)),
    ("shorter_than_n", [1, 1, 1], 4, (0, 0, 1 / 3)),
    ("four_grams", [1, 2, 3, 1, 2, 3, 1, 2, 3], 4, (1 - 3 / 6, 0, 3 / 9)),
]


@pytest.mark.parametrize("row,n,expected", [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_by_hand(row, n, expected):
    loss, parts = loss_of([row], n=n)
    assert list(parts) == PARTS
    found = [parts[name].item() for name in PARTS[1:4]]
    assert found == pytest.approx(expected)
    base = math.log(V)  # of logits that are 0; the padding token is a label like any other
    torch.testing.assert_close(parts["base_loss"], torch.tensor(base))
    total = base + 0.1 * expected[0] + 0.05 * expected[1] - 0.05 * expected[2]
    torch.testing.assert_close(loss, torch.tensor(total))
    assert parts["total_loss"] == loss


def test_means_over_rows():
    """Two rows of the table together: the mean of what they have alone."""
    _, parts = loss_of([[7, 7, 7, 7], [1, 10, 2, 3]])
    assert [parts[name].item() for name in PARTS[1:4]] == pytest.approx(
        [1 / 3, 0.0625, (0.25 + 1) / 2]
    )


def test_masked_labels_break_ngrams_wherever_they_stand():
    """Left padding and a hole: a valid length that only counts would take the wrong tokens."""
    _, parts = loss_of([[5, 5, 1, 2, 3], [1, 2, 9, 1, 2]], [[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]])
    assert parts["repetition_penalty"].item() == pytest.approx((0 + 0.5) / 2)
    assert parts["diversity_bonus"].item() == pytest.approx((1 + 2 / 4) / 2)
    _, other = loss_of([[-100, -100, 1, 2, 3], [1, 2, -100, 1, 2]])
    for name in PARTS[1:4]:
        assert torch.equal(parts[name], other[name])
    for dtype in (torch.bool, torch.float32):
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 1]]).to(dtype)
        _, again = loss_of([[5, 5, 1, 2, 3], [1, 2, 9, 1, 2]], mask.tolist())
        assert torch.equal(again["repetition_penalty"], parts["repetition_penalty"])


def test_end_token_as_padding():
    """One id for both: with a mask the real end counts; without it every one of them does."""
    row = [1, 2, 10, 10, 10]
    _, parts = loss_of([row], [[1, 1, 1, 0, 0]], pad=EOS)
    assert parts["eos_penalty"] == 0 and parts["repetition_penalty"] == 0
    _, parts = loss_of([row], pad=EOS)
    assert parts["eos_penalty"].item() == pytest.approx(3 / 5)
    assert parts["repetition_penalty"] == 0 and parts["diversity_bonus"] == 1


def test_the_base_is_cross_entropy_of_the_labels_that_count():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, V, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(10, (3, 6), generator=g)
    labels[1, 3] = -100
    mask = torch.tensor([[1] * 6, [1] * 5 + [0], [0] * 6])
    kept = (mask != 0) & (labels != -100)
    loss, none = AntiRepetitionLoss(V, EOS, PAD)(logits, labels, mask)
    assert none is None
    expected = F.cross_entropy(logits[kept], labels[kept])
    # the statistics are constants: the gradient is that of cross entropy
    ours, theirs = (torch.autograd.grad(x, logits)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    zero = dict.fromkeys(
        ("repetition_penalty_weight", "eos_penalty_weight", "diversity_bonus_weight"), 0.0
    )
    plain, _ = AntiRepetitionLoss(V, EOS, PAD, **zero)(logits, labels, mask)
    torch.testing.assert_close(plain, expected)


# --- weights that change -------------------------------------------------------------------------


def test_weights_fall_in_a_line():
    loss_fn = AdaptiveAntiRepetitionLoss(V, EOS, PAD, warmup_steps=100)
    table = [(0, 0.2, 0.1), (25, 0.1625, 0.08), (100, 0.05, 0.02), (101, 0.05, 0.02)]
    torch.testing.assert_close(loss_fn.repetition_penalty_weight, torch.tensor(0.2))
    for step, repetition, eos in table:
        loss_fn.update_weights(step)
        torch.testing.assert_close(loss_fn.repetition_penalty_weight, torch.tensor(repetition))
        torch.testing.assert_close(loss_fn.eos_penalty_weight, torch.tensor(eos))
    at_once = AdaptiveAntiRepetitionLoss(V, EOS, PAD, warmup_steps=0)
    at_once.update_weights(0)
    torch.testing.assert_close(at_once.eos_penalty_weight, torch.tensor(0.02))


def test_the_weights_are_what_the_loss_uses_and_what_a_checkpoint_keeps():
    loss_fn = AdaptiveAntiRepetitionLoss(V, EOS, PAD, warmup_steps=10, ngram_size=2)
    labels = torch.tensor([[7, 7, 7, 7, 10, 1]])
    arguments = torch.zeros(1, 6, V), labels
    loss_fn.update_weights(5)
    loss, parts = loss_fn(*arguments, return_components=True)
    expected = parts["base_loss"] + 0.125 * parts["repetition_penalty"]
    expected = expected + 0.06 * parts["eos_penalty"] - 0.05 * parts["diversity_bonus"]
    torch.testing.assert_close(loss, expected)
    state = loss_fn.state_dict()
    assert set(state) == {"repetition_penalty_weight", "eos_penalty_weight"}
    resumed = AdaptiveAntiRepetitionLoss(V, EOS, PAD, warmup_steps=10, ngram_size=2)
    resumed.load_state_dict(state)
    for other in (resumed, copy.deepcopy(loss_fn)):
        assert torch.equal(other(*arguments)[0], loss)
    assert not AntiRepetitionLoss(V, EOS, PAD).state_dict()


LOGITS, LABELS = torch.zeros(2, 3, V), torch.zeros(2, 3, dtype=torch.int64)
BAD = [
    (lambda f: f(ngram_size=0), ValueError, "ngram_size must be at least 1, got 0"),
    (lambda f: f(eos="</s>"), TypeError, "eos_token_id must be an int, got str"),
    (lambda f: f(pad=None), TypeError, "pad_token_id must be an int, got NoneType"),
    (lambda f: f()(LOGITS[..., :5], LABELS), ValueError, "must have vocab_size = 12 classes"),
    (lambda f: f()(LOGITS, LABELS[0]), ValueError, "labels must have 2 dimensions [B, S]"),
    (
        lambda f: f()(LOGITS, LABELS, LABELS[:, :2]),
        ValueError,
        "attention_mask shape must be [2, 3]",
    ),
]


@pytest.mark.parametrize("cls", [AntiRepetitionLoss, AdaptiveAntiRepetitionLoss])
@pytest.mark.parametrize("call,kind,text", BAD)
def test_errors(call, kind, text, cls):
    with pytest.raises(kind) as caught:
        call(lambda eos=EOS, pad=PAD, **keywords: cls(V, eos, pad, **keywords))
    assert str(caught.value).startswith(f"{cls.__name__}: ") and text in str(caught.value)


def test_a_fixed_weight_contradicts_a_schedule():
    with pytest.raises(ValueError, match="eos_penalty_weight must be given as its initial"):
        AdaptiveAntiRepetitionLoss(V, EOS, PAD, eos_penalty_weight=0.1)
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -1"):
        AdaptiveAntiRepetitionLoss(V, EOS, PAD, warmup_steps=-1)
