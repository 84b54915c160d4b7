# SPDX-License-Identifier: BSD-3-Clause
"""check_padding with all kinds of batches, masks, dtypes, parameters and steps."""

from collections import UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from padding_steps import (
    RIGHT,
    B,
    D,
    T,
    V,
    change,
    leaking,
    pair_batch,
)
from torch import nn

import masked_loss_ext as mle
from masked_loss_ext.diagnostics import check_padding


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


def recorded(batch, name, **options):
    """What each run of check_padding puts into an entry, without repetitions."""
    got = []

    def step(batch):
        got.append(batch[name].detach().clone())
        return batch["one"].sum()

    check_padding(step, batch | {"one": torch.ones(1, requires_grad=True)}, RIGHT, **options)
    return [x for i, x in enumerate(got) if not any(torch.equal(x, y) for y in got[:i])]


def test_ignored_labels_and_real_ones_are_changed_apart():
    labels = torch.arange(B * T).reshape(B, T) % 5
    ignored = torch.zeros(B, T, dtype=torch.bool)
    ignored[2] = RIGHT[2] == 0
    drop, labels = RIGHT == 0, labels.masked_fill(ignored, -100)
    _, other, replaced = recorded({"labels": labels}, "labels", trim=False)
    assert torch.equal(other != labels, drop & ~ignored) and (other[~ignored] >= 0).all()
    assert torch.equal(replaced != labels, ignored) and replaced.min() >= 0
    assert other.max() <= 4 and replaced.max() <= 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 200.0])
def test_random_values_are_large_beside_those_of_the_entry(dtype, size):
    x = (torch.rand(B, T, D) * size).to(dtype)
    _, random, nan, inf = recorded({"x": x}, "x", trim=False)
    drop = RIGHT == 0
    for changed in (random, nan, inf):
        assert torch.equal(changed[~drop], x[~drop]) and changed.dtype == dtype
    largest = random[drop].abs().max()
    assert largest > 10 * (size or 1.0) or dtype == torch.float16 and largest > 256
    assert random.isfinite().all() and (random.float() ** 2).max() < 1e9
    assert nan[drop].isnan().all() and inf[drop].isinf().all() and (inf[drop] < 0).any()


def test_nan_that_was_there_before_is_no_leak():
    """The gradient of a norm at 0 is NaN in each run."""
    batch = {"x": torch.zeros(B, T, 1), "mask": RIGHT}
    report = check_padding(lambda b: b["x"][b["mask"] != 0].square().sqrt().sum(), batch, RIGHT)
    assert report and all(not change.gradients for change in report.changes)


def test_tensors_that_cannot_be_filled():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    sparse = torch.eye(T)[:B].to_sparse()
    batch = pair_batch() | {"nested": nested, "sparse": sparse}
    report = check_padding(lambda b: mle.masked_mse(b["pred"], b["target"], RIGHT), batch, RIGHT)
    assert report and "nested nested, sparse [3, 6]" in str(report)


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
    assert all(c.gradients is None and c.cells()[3:5] == ["-", "-"] for c in report.changes)


def test_a_step_that_cannot_be_differentiated_by_everything():
    def step(batch):
        batch["target"].mul_(2)  # in place: no leaf that requires grad allows this
        return mle.masked_mse(batch["pred"], batch["target"], batch["mask"])

    batch = pair_batch()
    batch["pred"].requires_grad_()
    report = check_padding(step, batch, RIGHT)
    assert report and "no gradient of target" in str(report)


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
