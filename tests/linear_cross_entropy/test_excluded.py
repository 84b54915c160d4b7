# SPDX-License-Identifier: BSD-3-Clause
"""Rows that do not count: whatever is in them changes no bit, and they are not read."""

import pytest
import torch
from accuracy import assert_same_bits
from accuracy_cross_entropy import evaluate, upstream_for
from cases_cross_entropy import EVERYTHING, REDUCTIONS, Case
from cases_linear import DIFFERENTIABLE, linear, make_linear
from closed_pages import PAGE, closed_rows

import masked_loss_ext as mle
from masked_loss_ext.reference.cross_entropy import counted_rows

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OPTIONS = {
    "plain": {},
    "everything": EVERYTHING,
    "shift": {"shift": 1},
    "segments": {"shift": 2, **EVERYTHING},
}
GARBAGE = (float("nan"), float("inf"), -float("inf"), 3e4)


def inputs_of(name, dtype, reduction="mean"):
    case = Case(name, "", (3, 9, 37), {**OPTIONS[name], "reduction": reduction}, weight=True,
                token_weight=True, segments=name == "segments")  # fmt: skip
    return make_linear(case, dtype, width=13, bias=True), case.options


def counting(inputs, options):
    logits = inputs["hidden"][..., :1]
    args = (options.get("shift", 0), inputs.get("segment_ids"))
    return counted_rows(logits, inputs["target"], inputs["mask"], -100, *args)[1]


def assert_nothing_changes(inputs, changed, options, **how):
    for statistics in (False, True):
        upstream = upstream_for(inputs, options, statistics=statistics)
        given = {"stats": statistics, "differentiable": DIFFERENTIABLE, **options, **how}
        expected = evaluate(linear(mle), inputs, upstream, **given)
        actual = evaluate(linear(mle), changed, upstream, **given)
        for name, value in expected.items():
            assert_same_bits(actual[name], value, f"{name}, statistics {statistics}")
            assert value.isfinite().all()


@every_dtype
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_garbage_in_hidden_states_changes_no_bit(name, reduction, garbage, dtype):
    inputs, options = inputs_of(name, dtype, reduction)
    on = counting(inputs, options)
    assert on.any() and not on.all()
    hidden = inputs["hidden"].masked_fill(~on.unsqueeze(-1), garbage)
    assert_nothing_changes(inputs, {**inputs, "hidden": hidden}, options, chunk_rows=4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_garbage_in_labels_and_weights_changes_no_bit(name, reduction):
    inputs, options = inputs_of(name, torch.float32, reduction)
    on = counting(inputs, options)
    garbage = torch.tensor([77, -3, 2**40]).repeat(3)
    changed = {
        **inputs,
        "target": torch.where(on, inputs["target"], garbage),
        "mask": inputs["mask"] & on,
        "token_weight": inputs["token_weight"].masked_fill(~on, float("nan")),
    }  # fmt: skip
    assert_nothing_changes({**inputs, "mask": changed["mask"]}, changed, options)


def test_garbage_changes_no_statistic():
    inputs, _ = inputs_of("plain", torch.float32)
    on, found = inputs["mask"], []
    for fill in (0.0, float("nan")):
        h = inputs["hidden"].masked_fill(~on.unsqueeze(-1), fill).requires_grad_()
        w = inputs["head"].clone().requires_grad_()
        s = mle.linear_row_statistics(h, w, None, on)
        found.append((s.lse, s.entropy, *torch.autograd.grad((s.lse * s.entropy).sum(), (h, w))))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a.detach(), b.detach())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_that_do_not_count_are_not_read(dtype, reduction):
    """Their pages are closed."""
    rows, width = 11, PAGE // dtype.itemsize
    on = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0]).bool()
    values, head = torch.randn(rows, width).to(dtype), torch.randn(7, width).to(dtype) / 64
    target = torch.randint(0, 7, (rows,))
    for statistics in (False, True):
        found = []
        with closed_rows(values, ~on) as closed:
            for hidden in (values, closed):
                h, w = hidden.detach().requires_grad_(), head.clone().requires_grad_()
                loss = mle.masked_linear_cross_entropy(
                    h, w, target, on, reduction=reduction, chunk_rows=2, return_stats=statistics
                )
                loss = loss[0].sum() + loss[1].lse.sum() if statistics else loss.sum()
                found.append((loss.detach(), *torch.autograd.grad(2 * loss, (h, w))))
        for a, b in zip(*found, strict=True):
            assert_same_bits(a, b)


def test_rows_into_which_nothing_flows_are_not_read_again():
    """Clipped tokens, say: the backward is handed hidden states with their pages closed."""
    rows, width = 6, PAGE // 4
    values, head = torch.randn(rows, width), torch.randn(7, width) / 64
    target, clipped = torch.randint(0, 7, (rows,)), torch.tensor([0, 1, 1, 0, 0, 1]).bool()
    found = []
    with closed_rows(values, clipped) as closed:
        for handed in (values, closed):
            h, w = values.clone().requires_grad_(), head.clone().requires_grad_()

            def unpack(t, handed=handed):
                return handed if t.shape == values.shape else t

            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
                log_prob = mle.linear_row_statistics(h, w, target).log_prob
            found.append(torch.autograd.grad(log_prob.masked_fill(clipped, 0).sum(), (h, w)))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)
    assert (found[0][0][clipped] == 0).all() and found[0][0][~clipped].any()
