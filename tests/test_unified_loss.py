# SPDX-License-Identifier: BSD-3-Clause
"""UnifiedLoss: numbers on paper, then value and gradient against plain_unified in float64."""

import copy
import math

import pytest
import torch
from plain_unified import Plain, balancing_term, load_balance, similarity

from masked_loss_ext import UnifiedLoss
from masked_loss_ext.reference import cross_entropy_terms as terms_of_reference
from masked_loss_ext.unified import _read
from masked_loss_ext.unified._penalties import unlikelihood

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


# --- against the same, loop by loop, in float64 --------------------------------------------------

B, S, V, H, E = 3, 10, 5, 4, 3
EOS, PAD = 3, 4
FULL = dict(
    initial_temperature=1.3,
    use_mtp=True,
    num_future_tokens=2,
    ngram_size=2,
    eos_token_id=EOS,
    pad_token_id=PAD,
    min_sequence_length=4,
    num_experts=E,
    use_moe_balancing=True,
    use_diversity_loss=True,
    use_auxiliary_loss=True,
)


def inputs():
    """Few classes, so that much repeats; NaN wherever the mask or the target says no."""
    g = torch.Generator().manual_seed(3)
    targets = torch.randint(V, (B, S), generator=g)
    targets[0, 3:6] = targets[1, 4] = -100
    targets[1, 0] = targets[0, 1] = EOS
    mask = torch.arange(S) < torch.tensor([[S], [7], [4]])
    off = ~mask | (targets == -100)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    logits = randn(B, S, V).masked_fill(off[..., None], math.nan)
    return {
        "logits": logits,
        "targets": targets,
        "attention_mask": mask.long(),
        "hidden_states": randn(B, S, H),
        "additional_logits": [randn(B, S, V) for _ in range(2)],
        "confidence_scores": torch.rand(B, S, 1, generator=g, dtype=torch.float64),
        "gate_logits": randn(B * S, E).masked_fill(off.reshape(-1, 1), math.nan),
        "expert_indices": torch.randint(E, (B * S, 2), generator=g),
        "expert_outputs": [randn(B * S, H) for _ in range(E)],
    }


def leaves(given):
    found = [given[k] for k in ("logits", "hidden_states", "confidence_scores", "gate_logits")]
    return [x.requires_grad_() for x in (*found, *given["additional_logits"])]


def composed(loss_fn, given, mtp_active):
    """The total, from Plain."""
    o, valid = loss_fn, (given["attention_mask"] != 0) & (given["targets"] != -100)
    logits = torch.where(valid[..., None], given["logits"], 0)
    plain = Plain(
        logits, given["targets"], valid, None if PAD == o.eos_token_id else o.pad_token_id
    )
    on_model = o.penalty_on == "model"
    temperature = o.initial_temperature if o.primary_loss_type == "deepseek" else 1.0
    total = plain.cross_entropy(o.label_smoothing, temperature)
    if o.use_focal_loss:
        focal = plain.focal(o.focal_alpha, o.focal_gamma)
        total = {"replace": focal, "add": total + focal, "report": total}[o.focal_mode]
    if o.eos_token_id is not None:
        early = plain.early_unlikelihood if on_model else plain.early_ends
        total = total + o.eos_penalty_weight * early(o.eos_token_id, o.min_sequence_length)
    if o.primary_loss_type == "adaptive_mtp":
        total = total + heads_of(plain, given, valid, o, mtp_active)
    elif o.use_mtp and o.mtp_type == "adaptive":
        total = total + heads_of(plain, given, valid, o, mtp_active)
    elif o.use_mtp:
        h = o.mtp_loss.layer_norm(given["hidden_states"])
        found = [plain.head(w(h), k) for k, w in enumerate(o.mtp_loss.projections, 1)]
        total = total + o.mtp_weight * sum(found) / len(found)
    if o.use_ngram_penalty:
        ngram = plain.ngram_unlikelihood if on_model else plain.ngram_pairs
        total = total + o.ngram_penalty_weight * (ngram(o.ngram_size) + plain.diversity())
    if o.use_immediate_repetition_penalty:
        runs = plain.run_unlikelihood() if on_model else plain.runs()
        total = total + o.immediate_repetition_weight * runs
    rows = valid.flatten().nonzero()[:, 0]
    gate, indices, outputs = (
        given[f"{k}s"] for k in ("gate_logit", "expert_indice", "expert_output")
    )
    if o.use_moe_balancing:
        total = total + balancing_term(gate, indices, rows)
    if o.use_diversity_loss:
        total = total + o.diversity_weight * similarity(outputs, rows)
    if o.use_auxiliary_loss:
        total = total + o.load_balancing_weight * load_balance(gate, indices, rows)
        total = total + o.router_z_weight * (gate[rows].logsumexp(-1) ** 2).mean()
        total = total + 1e-4 * similarity(outputs, rows)
    return total


def heads_of(plain, given, valid, o, mtp_active):
    c = given["confidence_scores"][valid]
    regularizer = o.confidence_reg_strength * -(2 * c - 1).abs().log().mean()
    if not mtp_active:
        return regularizer
    found = [
        plain.head(x, i, o.label_smoothing) for i, x in enumerate(given["additional_logits"], 1)
    ]
    weight = c.mean() if o.use_confidence_weighting else 1.0
    return o.mtp_weight * weight * sum(found) / len(found) + regularizer


CONFIGURATIONS = {
    "deepseek_targets": FULL,
    "deepseek_model": FULL | {"penalty_on": "model"},
    "focal_added": FULL | {"use_focal_loss": True, "focal_mode": "add", "penalty_on": "model"},
    "focal_instead": FULL | {"use_focal_loss": True, "focal_alpha": 0.5, "focal_gamma": 1.5},
    "standard": {"primary_loss_type": "standard"},
    "standard_model": {
        "primary_loss_type": "standard", "penalty_on": "model", "ngram_size": 3,
        "eos_token_id": EOS,
    },
    "one_ngram": {"ngram_size": 1, "penalty_on": "model", "pad_token_id": PAD},
    "adaptive_mtp": {"primary_loss_type": "adaptive_mtp", "eos_token_id": EOS},
    "adaptive_mtp_focal": {
        "primary_loss_type": "adaptive_mtp", "use_confidence_weighting": False,
        "use_focal_loss": True, "penalty_on": "model", "eos_token_id": EOS,
    },
    "second_heads": {"use_mtp": True, "mtp_type": "adaptive", "mtp_weight": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("mtp_active", [True, False])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_value_and_gradient_in_float64(name, mtp_active):
    loss_fn = UnifiedLoss(V, H, **CONFIGURATIONS[name]).double()
    given = inputs()
    if loss_fn.diversity_loss is None:
        given.pop("expert_outputs")
    ours, theirs = leaves(given), []
    total = loss_fn(**given, mtp_active=mtp_active)
    grads = torch.autograd.grad(total, ours, allow_unused=True)
    given = inputs()
    theirs = leaves(given)
    expected = composed(loss_fn, given, mtp_active)
    # T is rounded to float32 before .double()
    torch.testing.assert_close(total, expected, rtol=1e-7, atol=1e-9)
    wanted = torch.autograd.grad(expected, theirs, allow_unused=True)
    for x, y in zip(grads, wanted, strict=True):
        x, y = (torch.zeros(()) if g is None or not g.any() else g for g in (x, y))
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-9, check_dtype=False)
    assert (grads[0] != 0).any() and grads[0].isfinite().all()


@pytest.mark.parametrize("penalty_on", ["targets", "model"])
def test_a_masked_row_is_as_if_it_were_not_there(penalty_on):
    loss_fn = UnifiedLoss(V, H, **FULL, penalty_on=penalty_on, use_focal_loss=True).double()
    given = inputs()
    given["targets"][2] = given["targets"][2, 0]  # a run, but in a row that does not count
    given["attention_mask"][2] = 0
    given["gate_logits"].requires_grad_()
    shorter = {
        k: [x[: 2 * x.shape[0] // 3] for x in v] if isinstance(v, list) else v[: 2 * len(v) // 3]
        for k, v in given.items()
    }
    with_row = copy.deepcopy(loss_fn)(**given, return_detailed=True)
    without = loss_fn(**shorter, return_detailed=True)
    torch.testing.assert_close(with_row, without)


# --- one read, and what is asked of it -----------------------------------------------------------


@pytest.mark.parametrize(
    "options,reads,unscaled",
    [
        (FULL | {"use_focal_loss": True, "penalty_on": "model"}, 1, True),
        (BARE, 1, False),
        (BARE | {"eos_token_id": EOS}, 1, False),
        (BARE | {"use_focal_loss": True}, 1, True),
        (BARE | {"primary_loss_type": "adaptive_mtp"}, 1, False),
        ({"primary_loss_type": "adaptive_mtp"}, 1, True),
    ],
    ids=str,
)
def test_the_logits_are_read_once(options, reads, unscaled, monkeypatch):
    calls = []

    def counted(*args, **keywords):
        calls.append(keywords["unscaled"])
        return terms_of_reference(*args, **keywords)

    monkeypatch.setattr(_read, "cross_entropy_terms", counted)
    given = inputs()
    loss_fn = UnifiedLoss(V, H, **options)
    loss_fn(**given, primary_logits=given["logits"])
    assert calls == [unscaled] * reads


def test_primary_logits_of_their_own():
    """Two reads: the primary loss of one tensor, the penalties of the other."""
    given = inputs()
    other = torch.randn(B, S, V, dtype=torch.float64)
    loss_fn = UnifiedLoss(V, H, primary_loss_type="adaptive_mtp", penalty_on="model").double()
    out = loss_fn(**given, primary_logits=other, return_detailed=True)
    alone = UnifiedLoss(V, H, primary_loss_type="adaptive_mtp", **BARE).double()
    same = alone(**given | {"logits": other}, return_detailed=True)
    torch.testing.assert_close(out["main_loss"], same["main_loss"])
    both = loss_fn(**given, primary_logits=given["logits"], return_detailed=True)
    torch.testing.assert_close(out["ngram_penalty"], both["ngram_penalty"])


def test_penalties_of_the_data_have_no_gradient_and_join_the_total():
    given = inputs()
    out = UnifiedLoss(V, eos_token_id=EOS)(**given, return_detailed=True)
    assert not out["immediate_repetition_penalty"].requires_grad
    assert not out["ngram_penalty_breakdown"]["ngram"].requires_grad
    model = UnifiedLoss(V, eos_token_id=EOS, penalty_on="model")
    given["logits"].requires_grad_()
    out = model(**given, return_detailed=True)
    for penalty in (out["immediate_repetition_penalty"], out["ngram_penalty_breakdown"]["ngram"]):
        assert penalty.requires_grad
