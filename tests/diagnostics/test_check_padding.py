# SPDX-License-Identifier: BSD-3-Clause
"""check_padding finds steps that read their padding, and passes those that do not."""

import pytest
import torch
import torch.nn.functional as F
from padding_steps import (
    MASKS,
    RIGHT,
    B,
    D,
    T,
    TinyEncoder,
    V,
    change,
    ignored_cross_entropy,
    language_batch,
    leaking,
    pair_batch,
)
from torch import nn

import masked_loss_ext as mle
from masked_loss_ext.diagnostics import check_padding

# --- what it has to find -------------------------------------------------------------------------


def test_padded_labels_that_count():
    """The labels of the padding are the padding id, and nothing tells the loss."""
    batch = language_batch()
    batch["labels"] = batch["labels"].clamp(min=1).masked_fill(RIGHT == 0, 0)

    def step(batch):
        return F.cross_entropy(batch["logits"].mT, batch["labels"])

    report = check_padding(step, batch, RIGHT)
    assert not report
    found = {("batch", "as given"), ("logits", "random values"), ("logits", "NaN")}
    assert found | {("labels", "other values")} <= leaking(report)
    moved = change(report, "labels", "other values")
    assert moved.loss.absolute > 0 and moved.loss.verdict == "LEAK"
    logits = batch["logits"].clone().requires_grad_()
    step(batch | {"logits": logits}).backward()
    inside = change(report, "batch", "as given").padding[0]
    assert inside.absolute == pytest.approx(logits.grad[RIGHT == 0].abs().max().item())
    assert "ignore_index" not in str(report)  # how to silence it is not what to say here


@pytest.mark.parametrize("where_first", [False, True], ids=["multiplied", "selected"])
def test_mean_over_padding_too(where_first):
    """Nothing that stands in the padding matters, but its amount does."""

    def step(batch):
        on = batch["mask"][..., None] != 0
        square = (batch["pred"] - batch["target"]).square()
        if where_first:
            zero = torch.zeros(())
            square = torch.where(on, batch["pred"], zero) - torch.where(on, batch["target"], zero)
            square = square.square()
        return (square * on).mean()

    report = check_padding(step, pair_batch(), RIGHT, nonfinite=where_first)
    assert leaking(report) == {("row 2", "none: cut to 3 of 6")}
    assert report.leaks[0].loss.relative == pytest.approx(1.0, rel=1e-5)  # twice the loss
    assert "how much padding there is" in str(report)
    assert check_padding(step, pair_batch(), RIGHT, nonfinite=where_first, trim=False)


def test_multiplication_by_zero():
    def step(batch):
        square = (batch["pred"] - batch["target"]).square().mean(-1)
        return (square * batch["mask"]).sum() / batch["mask"].sum()

    report = check_padding(step, pair_batch(), RIGHT)
    everywhere = ("pred", "target", "all at once")
    assert leaking(report) == {(e, k) for e in everywhere for k in ("NaN", "inf")}
    assert change(report, "pred", "NaN").loss.nonfinite == 1
    assert "1 NaN/inf" in str(report)
    assert "nonfinite=False" in str(report)
    assert check_padding(step, pair_batch(), RIGHT, nonfinite=False)


def test_where_on_the_result_leaves_nan_in_the_gradient():
    def step(batch):
        square = (batch["pred"] - batch["target"]).square().mean(-1)
        return torch.where(batch["mask"] != 0, square, 0).sum() / batch["mask"].sum()

    report = check_padding(step, pair_batch(), RIGHT)
    found = change(report, "pred", "NaN")
    assert found.loss.verdict == "same" and not found.gradients
    assert found.padding[0].nonfinite == int((RIGHT == 0).sum()) * D
    assert not report and "nothing kept has moved" in str(report)


def test_batch_norm_over_padding():
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 1))

    def step(batch):
        out = model[2](model[1](model[0](batch["x"]).mT).mT).squeeze(-1)
        return out[batch["mask"] != 0].square().mean()

    batch = {"x": torch.randn(B, T, D), "mask": RIGHT}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = check_padding(step, batch, RIGHT, parameters=model, nonfinite=False)
    assert ("x", "random values") in leaking(report)
    moved = {s.name for s in change(report, "x", "random values").gradients}
    assert {"x", "parameter 0.weight", "parameter 1.weight"} <= moved
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model.eval()  # running statistics know no padding
    assert check_padding(step, batch, RIGHT, parameters=model, nonfinite=False)


def test_mean_pooling_over_padding():
    def step(batch):
        return (batch["x"].mean(1) - batch["label"]).square().mean()

    batch = {"x": torch.randn(B, T, D), "label": torch.randn(B, D), "mask": RIGHT}
    report = check_padding(step, batch, RIGHT)
    assert {("batch", "as given"), ("x", "random values"), ("x", "NaN")} <= leaking(report)
    assert "not checked, shape does not begin with [3, 6]: label [3, 8]." in str(report)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("given", ["ids", "x"])
@pytest.mark.parametrize("how", ["none", "bool", "float"])
def test_transformer(how, given, mask):
    """Attention without a key mask is found; with one, bool or additive, nothing is."""
    model = TinyEncoder(how)
    content = torch.randint(V, (B, T)) if given == "ids" else torch.randn(B, T, D)
    batch = {
        given: content,
        "labels": torch.randint(V, (B, T)),
        "attention_mask": MASKS[mask],
    }

    def step(batch):
        return ignored_cross_entropy(model(batch), batch)

    report = check_padding(step, batch, MASKS[mask], parameters=model, nonfinite=given == "ids")
    if how == "none":
        kind = "other values" if given == "ids" else "random values"
        assert (given, kind) in leaking(report)
        assert change(report, given, kind).loss.relative > 1e-4
        assert len(change(report, given, kind).gradients) > 20
    else:
        report.raise_if_leaking()
        assert all(c.verdict == "same" or c.kind.startswith("none") for c in report.changes)
    assert any(c.kind.startswith("none") for c in report.changes)


def test_an_error_about_the_padding_is_a_leak():
    def step(batch):
        return F.binary_cross_entropy(batch["p"], batch["y"], weight=batch["mask"].float())

    batch = {"p": torch.rand(B, T), "y": torch.rand(B, T), "mask": RIGHT}
    report = check_padding(step, batch, RIGHT)
    assert change(report, "p", "random values").error.startswith("RuntimeError")
    assert ("p", "random values") in leaking(report) and "raised RuntimeError" in str(report)


def test_nan_in_the_padding_of_the_batch_itself():
    batch = pair_batch()
    batch["pred"][RIGHT == 0] = float("nan")

    def step(batch):
        return (batch["pred"] - batch["target"]).square().mean()

    assert ("pred", "random values") in leaking(check_padding(step, batch, RIGHT))
    assert check_padding(lambda b: mle.masked_mse(b["pred"], b["target"], b["mask"]), batch, RIGHT)


# --- what it has to pass -------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_our_losses_pass(mask):
    mask = MASKS[mask]
    loss_fn = mle.AttentionMaskMseLoss()
    steps = [
        lambda b: loss_fn(b["pred"], b["target"], b["mask"]),
        lambda b: mle.masked_mse(b["pred"], b["target"], b["mask"]),
        lambda b: mle.reference.masked_mse(b["pred"], b["target"], b["mask"]),
    ]
    for step in steps:
        report = check_padding(step, pair_batch(mask), mask, rtol=0)
        assert report.raise_if_leaking() is report and len(report.changes) == 11
    report = check_padding(
        lambda b: mle.masked_cross_entropy(b["logits"], b["labels"], b["attention_mask"]),
        language_batch(mask),
        mask,
        rtol=0,
    )
    assert report.raise_if_leaking() and len(report.changes) == 9


def test_cross_entropy_with_labels_ignored_by_the_step():
    def step(batch):
        return ignored_cross_entropy(batch["logits"], batch)

    assert check_padding(step, language_batch(), RIGHT, nonfinite=False, rtol=0)
    # The value is safe from NaN in ignored logits, their gradient is not: PyTorch multiplies by 0.
    report = check_padding(step, language_batch(), RIGHT)
    assert not report and all(c.loss.verdict == "same" for c in report.changes)
    assert {kind for _, kind in leaking(report)} == {"NaN", "inf"}


def test_labels_that_say_themselves_what_counts():
    batch = language_batch()
    batch["labels"] = batch["labels"].masked_fill(RIGHT == 0, -100)

    def step(batch):
        return F.cross_entropy(batch["logits"].mT, batch["labels"])

    del batch["attention_mask"]  # what a collator leaves to a loss
    report = check_padding(step, batch, RIGHT, nonfinite=False)
    assert report
    replaced = change(report, "labels", "labels for ignored")
    assert replaced.verdict == "by label" and replaced.loss.absolute > 0
    assert change(report, "row 2", "none: cut to 3 of 6").verdict == "same"


@pytest.mark.parametrize("padding_id, label", [(0, 0), (7, 255)])
def test_padding_that_the_step_finds_by_value(padding_id, label):
    """Ids and labels of one value in the padding, which the step looks for."""
    ids = torch.randint(1, 7, (B, T)).masked_fill(RIGHT == 0, padding_id)
    labels = torch.randint(1, V, (B, T)).masked_fill(RIGHT == 0, label)
    table = torch.randn(8, V)

    def step(batch):
        return F.cross_entropy(table[batch["ids"]].mT, batch["labels"], ignore_index=label)

    batch = {"ids": ids, "labels": labels, "mask": RIGHT}
    report = check_padding(step, batch, RIGHT)
    assert change(report, "labels", "other values").verdict == "LEAK"
    assert f"if the step itself leaves out what holds {label}" in str(report)
    report = check_padding(step, batch, RIGHT, ignore_index=label)
    assert report and change(report, "labels", "labels for ignored").verdict == "by label"


def test_dropout_draws_the_same_each_time():
    model = TinyEncoder(dropout=0.5).train()
    batch = {"ids": torch.randint(V, (B, T)), "labels": torch.randint(V, (B, T))}
    batch["attention_mask"] = RIGHT

    def step(batch):
        return ignored_cross_entropy(model(batch), batch)

    report = check_padding(step, batch, RIGHT, parameters=model)
    assert report and report.reproducible and "draws random numbers" in str(report)


@pytest.mark.parametrize("mask", ["right", "left"])
def test_shifted_losses_score_from_the_padding_on_the_left(mask):
    """Where padding is on the left, its last position predicts the first token that counts."""
    batch = language_batch(MASKS[mask])

    def step(batch):
        return mle.masked_cross_entropy(
            batch["logits"], batch["labels"], batch["attention_mask"], shift=1
        )

    report = check_padding(step, batch, batch["attention_mask"])
    assert bool(report) == (mask == "right")
    if not report:
        assert ("batch", "as given") in leaking(report)  # gradient of logits in the padding

    def heads(batch):
        loss = mle.reference.multi_token_prediction_loss
        logits = [batch["logits"]] * 4
        return loss(logits, batch["labels"], batch["attention_mask"], mask_sources=True)[0]

    check_padding(heads, batch, batch["attention_mask"]).raise_if_leaking()
