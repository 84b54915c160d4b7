# SPDX-License-Identifier: BSD-3-Clause
"""check_padding finds steps that read their padding, and passes those that do not."""

import itertools
from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import masked_loss_ext as mle
from masked_loss_ext.diagnostics import PaddingLeak, check_padding
from masked_loss_ext.diagnostics._report import Tolerance, distance

B, T, V, D = 3, 6, 11, 8
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
LEFT = RIGHT.flip(1)
RANDOM = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 1]])
MASKS = {"right": RIGHT, "left": LEFT, "random": RANDOM}


def language_batch(mask=RIGHT, **extra):
    return {
        "logits": torch.randn(B, T, V),
        "labels": torch.randint(V, (B, T)),
        "attention_mask": mask,
    } | extra


def pair_batch(mask=RIGHT):
    return {"pred": torch.randn(B, T, D), "target": torch.randn(B, T, D), "mask": mask}


def leaking(report):
    """(entry, kind) of each run that leaks."""
    return {(change.entry, change.kind) for change in report.leaks}


def change(report, entry, kind):
    return next(c for c in report.changes if (c.entry, c.kind) == (entry, kind))


class TinyEncoder(nn.Module):
    """Token ids or vectors -> logits; ``how`` the attention gets its mask."""

    def __init__(self, how="bool", dropout=0.0):
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(V, D)
        layer = nn.TransformerEncoderLayer(D, 2, 16, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, V)

    def forward(self, batch):
        x = self.embed(batch["ids"]) if "ids" in batch else batch["x"]
        padding = batch["attention_mask"] == 0
        if self.how == "float":
            padding = torch.zeros(padding.shape).masked_fill(padding, -float("inf"))
        x = self.encoder(x, src_key_padding_mask=None if self.how == "none" else padding)
        return self.head(x)


def ignored_cross_entropy(logits, batch):
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return F.cross_entropy(logits.mT, labels)


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
    assert "labels holds 0 in the padding and nowhere else" in str(report)


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
        lambda b: mle.reference.masked_cross_entropy(b["logits"], b["labels"], b["attention_mask"]),
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
    if label > V:  # not every class occurs: another value in the padding may be out of range
        assert change(check_padding(step, batch, RIGHT), "labels", "other values").verdict == "LEAK"
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


# --- batches, masks, parameters ------------------------------------------------------------------


class Pair(NamedTuple):
    pred: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class Extra:
    flags: torch.Tensor
    scale: float


def test_nested_batches_of_all_kinds():
    pair = pair_batch()
    batch = UserDict(
        pair=Pair(pair["pred"], pair["target"]),
        views=[torch.randn(B, T), (torch.randn(B, T), "text", None)],
        extra=Extra(torch.rand(B, T) > 0.5, 2.0),
        mask=RIGHT,
    )

    def step(batch):
        assert isinstance(batch, UserDict) and batch["views"][1][1:] == ("text", None)
        on = batch["mask"] != 0
        views = torch.where(on, batch["views"][0], 0) + torch.where(on, batch["views"][1][0], 0)
        flags = batch["extra"].flags & on
        loss = mle.masked_mse(batch["pair"].pred, batch["pair"].target, batch["mask"])
        return batch["extra"].scale * loss + (views.sum() + flags.sum()) / on.sum()

    report = check_padding(step, batch, RIGHT)
    names = {c.entry for c in report.changes}
    assert {"pair.pred", "pair.target", "views[0]", "views[1][0]", "extra.flags"} <= names
    report.raise_if_leaking()
    leak = check_padding(lambda b: step(b) + b["extra"].flags.sum(), batch, RIGHT)
    assert ("extra.flags", "flipped") in leaking(leak)
    assert {entry for entry, _ in leaking(leak)} == {"extra.flags", "all at once", "row 2"}


def test_a_tensor_alone_and_a_mask_from_outside():
    x = torch.randn(B, T, D)
    report = check_padding(lambda x: torch.where(RIGHT[..., None] != 0, x, 0).sum(), x, RIGHT)
    assert report and {c.entry for c in report.changes} == {"batch"}
    assert "the mask is not an entry of the batch" in str(report)
    assert not check_padding(torch.sum, x, RIGHT)


@pytest.mark.parametrize(
    "form",
    [
        lambda m: m,
        lambda m: m.bool(),
        lambda m: m.float(),
        lambda m: m == 0,
        lambda m: torch.zeros(m.shape).masked_fill(m == 0, -float("inf")),
        lambda m: torch.zeros(m.shape).masked_fill(m == 0, torch.finfo(torch.float32).min),
    ],
)
def test_masks_in_the_batch_stay(form):
    batch = pair_batch(form(RIGHT).clone())
    report = check_padding(lambda b: mle.masked_mse(b["pred"], b["target"], RIGHT), batch, RIGHT)
    assert "taken for the mask and left alone: mask." in str(report)
    assert "mask" not in {c.entry for c in report.changes}


def test_ids_that_are_zero_in_the_padding_are_no_mask():
    batch = {"ids": torch.randint(1, V, (B, T)) * RIGHT, "soft": torch.rand(B, T) * RIGHT}
    report = check_padding(lambda b: b["ids"].sum() + b["soft"].sum(), batch, RIGHT)
    assert {("ids", "other values"), ("soft", "random values")} <= leaking(report)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_stay_among_the_values_seen(dtype):
    seen = torch.tensor([3, 5, 9, 10])
    ids = seen[torch.randint(4, (B, T))].to(dtype)
    ids[0, :4] = seen
    got = []

    def step(batch):
        got.append(batch["ids"].clone())
        return torch.where(RIGHT != 0, batch["ids"], 0).sum().float()

    report = check_padding(step, {"ids": ids}, RIGHT)
    assert report and "no gradient was compared" in str(report)
    other = next(g for g in got if not torch.equal(g, ids))
    assert other.dtype == dtype and torch.equal(other[RIGHT != 0], ids[RIGHT != 0])
    assert (other != ids)[RIGHT == 0].all() and torch.isin(other.long(), seen).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes(dtype):
    batch = {"x": torch.randn(B, T, D).to(dtype), "mask": RIGHT}

    def step(batch):
        kept = torch.where(batch["mask"][..., None] != 0, batch["x"], 0)
        return kept.abs().double().sum() / batch["mask"].sum()

    assert check_padding(step, batch, RIGHT, rtol=0)
    assert ("x", "random values") in leaking(
        check_padding(lambda b: b["x"].abs().sum(), batch, RIGHT)
    )


def test_a_mask_with_a_last_dimension_of_one_and_a_flat_one():
    batch = pair_batch(RIGHT[..., None])
    step = lambda b: mle.masked_mse(b["pred"], b["target"], b["mask"].expand(B, T, D))  # noqa: E731
    assert check_padding(step, batch, batch["mask"])
    mask = torch.tensor([1, 1, 1, 0, 0])
    rows = {"x": torch.randn(5, D), "mask": mask}
    assert check_padding(lambda b: b["x"][b["mask"] != 0].square().mean(), rows, mask)
    report = check_padding(lambda b: b["x"][b["mask"] != 0].sum() / len(b["x"]), rows, mask)
    assert leaking(report) == {("the row", "none: cut to 3 of 5")}


def test_lengths_beside_the_mask():
    """One number per row goes with its row when padding is cut off."""
    batch = pair_batch() | {"lengths": RIGHT.sum(1)}

    def step(batch):
        error = (batch["pred"] - batch["target"]).square().mean(-1)
        last = error.gather(1, batch["lengths"][:, None] - 1)
        return last.mean()

    report = check_padding(step, batch, RIGHT, nonfinite=False)
    assert report.raise_if_leaking() and change(report, "row 2", "none: cut to 3 of 6")


@pytest.mark.parametrize("give", ["module", "tensors", "pairs", "dict"])
def test_gradients_of_parameters(give):
    """A step whose loss is right but whose backward is not."""
    model = nn.Linear(D, 1)

    def step(batch):
        out = model(batch["x"]).squeeze(-1)
        kept = out[batch["mask"] != 0].square().mean()
        return kept + 0 * out.detach().sum() + (out.sum() - out.sum().detach())

    parameters = {
        "module": model,
        "tensors": model.parameters(),
        "pairs": model.named_parameters(),
        "dict": dict(model.named_parameters()),
    }[give]
    batch = {"x": torch.randn(B, T, D), "mask": RIGHT}
    report = check_padding(step, batch, RIGHT, parameters=parameters, nonfinite=False)
    moved = change(report, "x", "random values")
    assert moved.loss.verdict == "same"
    assert [s.name for s in moved.gradients] == ["parameter weight"]  # the bias's is a count
    assert moved.padding[0].name == "x"


def test_a_step_that_calls_backward_and_returns_a_number():
    model = nn.Linear(D, V)

    def step(batch, leak):
        loss = F.cross_entropy(model(batch["x"]).mT, batch["labels"], reduction="none")
        loss = loss.mean() if leak else loss[batch["mask"] != 0].mean()
        loss.backward()
        return loss.item()

    batch = {"x": torch.randn(B, T, D), "labels": torch.randint(V, (B, T)), "mask": RIGHT}
    options = dict(parameters=model, nonfinite=False)
    report = check_padding(lambda b: step(b, leak=False), batch, RIGHT, **options)
    assert report and "no gradient" not in str(report)
    report = check_padding(lambda b: step(b, leak=True), batch, RIGHT, **options)
    names = {s.name for s in change(report, "labels", "other values").gradients}
    assert {"parameter weight", "parameter bias"} <= names
    assert all(p.grad is None for p in model.parameters())


def test_a_detached_loss_is_compared_alone():
    step = lambda b: mle.masked_mse(b["pred"], b["target"], b["mask"]).detach()  # noqa: E731
    report = check_padding(step, pair_batch(), RIGHT)
    assert report and "no gradient was compared: the step returned a loss" in str(report)


def test_a_step_that_cannot_be_differentiated_by_everything():
    def step(batch):
        batch["target"].mul_(2)  # in place: no leaf that requires grad allows this
        return mle.masked_mse(batch["pred"], batch["target"], batch["mask"])

    batch = pair_batch()
    batch["pred"].requires_grad_()
    report = check_padding(step, batch, RIGHT)
    assert report and "no gradient of target" in str(report)


# --- what it leaves behind -----------------------------------------------------------------------


def test_everything_is_put_back():
    model = TinyEncoder(dropout=0.3).train()
    model.norm = nn.BatchNorm1d(V)
    batch = {"x": torch.randn(B, T, D), "labels": torch.randint(V, (B, T)), "attention_mask": RIGHT}
    batch["x"].requires_grad_()
    model(batch).sum().backward()

    def step(batch):
        loss = ignored_cross_entropy(model.norm(model(batch).mT).mT, batch)
        loss.backward()
        with torch.no_grad():  # what optimisers do
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
            batch["x"].zero_()
        batch["labels"].zero_()
        return loss

    tensors = {**model.state_dict(keep_vars=True), **batch}
    before = {n: (t.detach().clone(), t.grad, t._version) for n, t in tensors.items()}
    gradients = {n: t.grad.clone() for n, t in tensors.items() if t.grad is not None}
    state = torch.get_rng_state()
    report = check_padding(step, batch, RIGHT, parameters=model.parameters())
    assert report.reproducible and "the step updates its parameters" in str(report)
    assert torch.equal(torch.get_rng_state(), state)
    for name, (value, gradient, version) in before.items():
        assert torch.equal(tensors[name], value), name
        assert tensors[name].grad is gradient, name
        if gradient is not None:
            assert torch.equal(gradient, gradients[name]), name
        if name in batch:
            assert tensors[name]._version == version, name


def test_numpy_and_python_random_states_too():
    import random

    numpy = pytest.importorskip("numpy")

    def step(batch):
        scale = random.random() + numpy.random.rand()
        return mle.masked_mse(batch["pred"], batch["target"], batch["mask"]) * scale

    states = random.getstate(), numpy.random.get_state()[1].tolist()
    report = check_padding(step, pair_batch(), RIGHT)
    assert report and report.reproducible
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist())


def test_everything_is_put_back_after_an_error():
    model = nn.Linear(D, 1)

    def step(batch):
        model(batch["x"]).sum().backward()
        torch.rand(3)
        raise RuntimeError("the user's own")

    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="the user's own"):
        check_padding(step, {"x": torch.randn(B, T, D)}, RIGHT, parameters=model)
    assert model.weight.grad is None
    torch.randn(B, T, D)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_step_that_is_not_reproducible():
    noise = itertools.cycle([0.0, 1e-3, -1e-3])

    def step(batch):
        loss = mle.masked_mse(batch["pred"], batch["target"], batch["mask"])
        return loss * (1 + next(noise))

    report = check_padding(step, pair_batch(), RIGHT, rtol=0)
    assert not report.reproducible and "runs of the unchanged batch differ" in str(report)
    assert report.raise_if_leaking() and "noise" in {c.verdict for c in report.changes}
    report = check_padding(lambda b: step(b) + b["pred"].sum(), pair_batch(), RIGHT)
    assert ("pred", "random values") in leaking(report)


# --- tolerance, report, misuse -------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, rtol, atol, noise, verdict",
    [
        (0.0, None, 0.0, 0.0, "same"),
        (1e-7, None, 0.0, 0.0, "rounding"),
        (1e-7, 0.0, 0.0, 0.0, "LEAK"),
        (1e-7, 0.0, 1e-3, 0.0, "rounding"),
        (1e-3, None, 0.0, 0.0, "LEAK"),
        (1e-3, 1e-2, 0.0, 0.0, "rounding"),
        (2e-3, None, 0.0, 1e-3, "noise"),
        (4e-3, None, 0.0, 1e-3, "LEAK"),
        (float("nan"), 1.0, 1.0, 1.0, "LEAK"),
    ],
)
def test_verdicts(size, rtol, atol, noise, verdict):
    before = torch.tensor([1.0, -4.0], dtype=torch.float64)
    after = before + torch.tensor([0.0, 4 * size], dtype=torch.float64)
    judge = Tolerance(rtol, atol)
    judge.noise["w"] = 4 * noise
    shift = distance("w", before, after, judge)
    assert shift.verdict == verdict
    if size == size:
        assert shift.relative == pytest.approx(size, rel=1e-6)


def test_half_precision_is_judged_by_its_own_rounding():
    one = torch.ones(1, dtype=torch.bfloat16)
    judge = Tolerance(None, 0.0)
    assert distance("w", one, one + 2**-7, judge).verdict == "rounding"
    assert distance("w", one, one + 2**-6, judge).verdict == "LEAK"
    assert distance("w", one.float(), one.float() + 2**-7, judge).verdict == "LEAK"


def test_report_is_a_table():
    report = check_padding(lambda b: b["x"].square().mean(), {"x": torch.ones(B, T)}, RIGHT)
    lines = str(report).splitlines()
    assert lines[0].startswith("check_padding: the step reads its padding. 4 of 4 runs leak; the")
    head = lines[2]
    assert head.split("  ")[0] == "entry" and head.endswith("verdict")
    for line in lines[4:8]:
        assert line[head.index("verdict") :] == "LEAK", line
    assert repr(report).startswith("<PaddingReport: LEAK through batch, x;")
    with pytest.raises(PaddingLeak, match="padding holds") as caught:
        report.raise_if_leaking()
    assert isinstance(caught.value, AssertionError)


@pytest.mark.parametrize(
    "batch, mask, error, text",
    [
        ({"x": torch.ones(2, 3)}, torch.ones(2, 3), ValueError, "there is nothing to check"),
        ({"x": torch.ones(2, 3)}, torch.zeros(3, 2), ValueError, r"first dimensions of an entry.*"),
        ({"m": RIGHT}, RIGHT, ValueError, r"taken for the mask: \['m'\]"),
        ({"x": torch.ones(2, 3)}, [[1, 0]], TypeError, "mask must be a torch.Tensor, got list"),
        ({"x": torch.ones(3)}, torch.tensor(0), ValueError, "mask must have the first"),
        ({"x": torch.ones(2)}, torch.tensor([0.0, -1e9]), ValueError, "additive mask"),
        ({"x": torch.full((B, T), 4)}, RIGHT, ValueError, "padding can be changed"),
    ],
)
def test_misuse(batch, mask, error, text):
    with pytest.raises(error, match="check_padding: .*" + text):
        check_padding(lambda b: torch.zeros(()), batch, mask)


@pytest.mark.parametrize(
    "result, error, text",
    [
        (lambda b: b["pred"], ValueError, r"scalar loss, got \[3, 6, 8\]"),
        (lambda b: (b["pred"].sum(), {}), TypeError, "scalar loss, got tuple; lambda batch"),
        (lambda b: None, TypeError, "scalar loss, got NoneType"),
        (lambda b: b["mask"].sum() / 0, ValueError, "finite loss, got inf whatever stands"),
    ],
)
def test_results_that_are_no_loss(result, error, text):
    with pytest.raises(error, match=text):
        check_padding(result, pair_batch(), RIGHT)


@pytest.mark.parametrize("parameters", [torch.ones(2), "weight", 3, ["weight"]])
def test_parameters_of_the_wrong_kind(parameters):
    with pytest.raises(TypeError, match="check_padding: parameters"):
        check_padding(lambda b: b["pred"].sum(), pair_batch(), RIGHT, parameters=parameters)


def test_compiled_steps():
    weight = torch.randn(D, V, requires_grad=True)

    @torch.compile(backend="aot_eager")  # the default would spend its time on a C++ compiler
    def step(batch, leak):
        loss = F.cross_entropy((batch["x"] @ weight).mT, batch["labels"], reduction="none")
        return loss.mean() if leak else (loss * batch["mask"]).sum() / batch["mask"].sum()

    batch = {"x": torch.randn(B, T, D), "labels": torch.randint(V, (B, T)), "mask": RIGHT}
    options = dict(parameters=[("weight", weight)], nonfinite=False, trim=False)
    report = check_padding(lambda b: step(b, False), batch, RIGHT, **options)
    assert report.raise_if_leaking().reproducible and "no gradient" not in str(report)
    report = check_padding(lambda b: step(b, True), batch, RIGHT, **options)
    assert ("labels", "other values") in leaking(report)
    assert change(report, "labels", "other values").gradients[0].name == "parameter weight"
