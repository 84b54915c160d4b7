# SPDX-License-Identifier: BSD-3-Clause
"""UnifiedLoss: numbers worked out by hand."""

import math

import pytest
import torch

from masked_loss_ext import UnifiedLoss
from masked_loss_ext.unified.penalties import unlikelihood

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)
CE = math.log(4 / 3)  # of logits [ln 3, 0] and target 0: p = 3/4 and 1/4
BARE = {"use_ngram_penalty": False, "use_immediate_repetition_penalty": False}


def rows_of(targets, classes=2):
    """Logits [ln 3, 0, ...] at every position."""
    logits = torch.full((1, len(targets), classes), -math.inf)
    logits[..., 0], logits[..., 1] = LN3, 0.0
    return logits, torch.tensor([targets])


def close(value, expected):
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-6, atol=1e-7)


# --- on paper ------------------------------------------------------------------------------------

PAPER = [
    ({"primary_loss_type": "standard", "label_smoothing": 0.0}, CE),
    ({"primary_loss_type": "standard", "label_smoothing": 0.2}, 0.8 * CE + 0.2 * LN4),
    ({"label_smoothing": 0.2}, 0.8 * CE + 0.2 * LN4),
    ({"label_smoothing": 0.0, "initial_temperature": 0.5}, math.log(10 / 9)),
    ({"label_smoothing": 0.0, "use_focal_loss": True}, CE / 16),
    ({"label_smoothing": 0.0, "use_focal_loss": True, "focal_mode": "add"}, CE * 17 / 16),
    ({"label_smoothing": 0.0, "use_focal_loss": True, "focal_mode": "report"}, CE),
    ({"label_smoothing": 0.0, "eos_token_id": 0}, CE + 0.05),
    ({"label_smoothing": 0.0, "eos_token_id": 0, "min_sequence_length": 0}, CE),
    ({"label_smoothing": 0.0, "eos_token_id": 1}, CE),
    ({"label_smoothing": 0.0, "eos_token_id": 1, "penalty_on": "model"}, CE + 0.05 * CE),
    ({"label_smoothing": 0.0, "eos_token_id": 0, "penalty_on": "model"}, CE),
]


@pytest.mark.parametrize("options,expected", PAPER, ids=str)
def test_main_loss_on_paper(options, expected):
    """One row that counts, one masked that holds NaN, one whose target is ignored."""
    logits = torch.tensor([[[LN3, 0.0], [math.nan, 7.0], [math.inf, 0.0]]])
    loss_fn = UnifiedLoss(2, hidden_size=1, **BARE, **options)
    mask = torch.tensor([[1, 0, 1]])
    close(loss_fn(logits, torch.tensor([[0, 1, -100]]), mask), expected)
    detailed = loss_fn(logits, torch.tensor([[0, 1, -100]]), mask, return_detailed=True)
    close(detailed["total_loss"], expected)
    if "use_focal_loss" in options:
        close(detailed["main_loss"], CE)
        close(detailed["focal_loss"], CE / 16)


def repetition(targets, classes=2, **options):
    loss_fn = UnifiedLoss(classes, label_smoothing=0.0, ngram_size=2, **options)
    out = loss_fn(*rows_of(targets, classes), return_detailed=True)
    parts = out["ngram_penalty_breakdown"]
    torch.testing.assert_close(out["ngram_penalty"], parts["ngram"] + parts["diversity"])
    expected = out["main_loss"] + out["ngram_penalty"] + out["immediate_repetition_penalty"]
    torch.testing.assert_close(out["total_loss"], expected)
    return parts["ngram"], parts["diversity"], out["immediate_repetition_penalty"]


def test_repetition_of_the_data_on_paper():
    ngram, diversity, immediate = repetition([1, 1, 1, 1, 0])
    close(ngram, 0.1 * 3 / 4)
    close(immediate, 0.5 * 9.0)
    entropy = 0.75 * CE + 0.25 * LN4
    close(diversity, 0.1 * (1 - entropy / LN2))


def test_repetition_of_the_model_on_paper():
    """0 1 0 0: at the end 1 would repeat "0 1"; each 0 after 1 or 1 after 0 repeats nothing."""
    ngram, _, immediate = repetition([0, 1, 0, 0], penalty_on="model")
    close(ngram, 0.1 * -math.log(1 - 1 / 4))
    # at 1 the model should not say 0 (3/4), at 2 not 1 (1/4); at 3 the data itself repeats
    close(immediate, 0.5 * (LN4 + CE) / 2)
    ngram, _, immediate = repetition([0, 0, 0], penalty_on="model")
    close(ngram, 0.0)
    close(immediate, 0.0)


def test_padding_tokens_take_no_part_in_repetition():
    pads = [0, 1, 1, 1]
    assert repetition(pads)[2] == 0.5 * 4 and repetition(pads, pad_token_id=1)[2] == 0
    assert repetition(pads, pad_token_id=1, eos_token_id=1)[2] == 0.5 * 4  # then it is the end
    close(repetition(pads)[0], 0.1 / 3)
    close(repetition(pads, pad_token_id=1)[0], 0.0)


def test_shifted_labels_on_paper():
    """Position 0 is scored against label 1, whose mask decides; the last one against nothing."""
    logits = torch.tensor([[[LN3, 0.0], [0.0, 0.0], [math.nan, math.nan]]])
    labels = torch.tensor([[1, 0, 1]])
    loss_fn = UnifiedLoss(2, label_smoothing=0.0, shift_labels=True, **BARE)
    close(loss_fn(logits, labels), (CE + LN2) / 2)
    close(loss_fn(logits, labels, torch.tensor([[0, 1, 0]])), CE)
    assert loss_fn(logits[:, :1], labels[:, :1]) == 0


def test_heads_on_paper():
    """0.1 * 0.6 * (head of the next target) + 0.01 * -ln |2 c - 1|."""
    logits, targets = rows_of([0, 1, 0])
    head = torch.tensor([[[0.0, LN3], [LN3, 0.0], [math.nan, 0.0]]])
    far = torch.full((1, 3, 2), math.nan)
    far[0, 0] = 0.0
    options = dict(primary_loss_type="adaptive_mtp", label_smoothing=0.0, **BARE)
    out = UnifiedLoss(2, 1, **options)(
        logits,
        targets,
        additional_logits=[head, far, far],
        confidence_scores=torch.tensor([[0.6]]),
        mtp_active=True,
        return_detailed=True,
    )
    close(out["main_primary_loss"], (2 * CE + LN4) / 3)
    close(out["main_effective_mtp_weight"], 0.06)
    close(out["main_additional_loss"], 0.06 * (CE + LN2) / 2)  # the third head reaches past the end
    close(out["main_confidence_reg"], 0.01 * -math.log(0.2))
    close(out["main_avg_confidence"], 0.6)
    names = ("main_primary_loss", "main_additional_loss", "main_confidence_reg")
    torch.testing.assert_close(out["total_loss"], sum(out[name] for name in names))


@pytest.mark.parametrize("log_p", [-1e-7, -1e-6, -1e-3, -0.5, -0.8, -3.0, -11.0, -60.0, -math.inf])
def test_unlikelihood_in_float32(log_p):
    """Value and derivative p / (1 - p), near p = 1 and for small p."""
    x = torch.tensor([log_p, 0.3], requires_grad=True)
    rows = unlikelihood(x, torch.tensor([True, False]))
    rows.sum().backward()
    q = -math.expm1(x[0].item())
    expected = torch.tensor([-math.log(q), 0.0]), torch.tensor([(1 - q) / q, 0.0])
    if log_p < -1:
        p = math.exp(log_p)
        expected = torch.tensor([-math.log1p(-p), 0.0]), torch.tensor([p / (1 - p), 0.0])
    torch.testing.assert_close((rows.detach(), x.grad), expected, rtol=1e-6, atol=0)
