# SPDX-License-Identifier: BSD-3-Clause
"""UnifiedLoss: value and gradient against plain_unified in float64."""

import copy
import math

import pytest
import torch
from plain_unified import Plain, balancing_term, load_balance, similarity

from masked_loss_ext import UnifiedLoss
from masked_loss_ext.reference import cross_entropy_terms as terms_of_reference
from masked_loss_ext.unified import _rows

BARE = {"use_ngram_penalty": False, "use_immediate_repetition_penalty": False}


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


MOVED = [
    ("label_smoothing", "main_loss.label_smoothing"),
    ("ngram_penalty_weight", "ngram_penalty.penalty_weight"),
    ("focal_gamma", "focal_loss.gamma"),
    ("eos_penalty_weight", "main_loss.eos_penalty_weight"),
]


@pytest.mark.parametrize("option,at", MOVED)
def test_an_option_that_a_schedule_moves_reaches_its_component(option, at):
    part, name = at.split(".")
    loss_fn = UnifiedLoss(V, H, use_focal_loss=True, focal_mode="add", eos_token_id=EOS)
    before = loss_fn(**inputs(), update_state=False)
    setattr(loss_fn, option, 0.75)
    assert getattr(getattr(loss_fn, part), name) == 0.75
    assert loss_fn(**inputs(), update_state=False) != before


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

    monkeypatch.setattr(_rows, "cross_entropy_terms", counted)
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
