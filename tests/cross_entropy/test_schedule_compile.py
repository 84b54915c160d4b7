# SPDX-License-Identifier: BSD-3-Clause
"""Numbers that change from step to step under torch.compile: one graph, or two, for all of them."""

import pytest
import torch
from cases_cross_entropy import BY_NAME, EVERYTHING, make
from torch._dynamo.utils import counters

import masked_loss_ext as mle
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

op = torch.ops.masked_loss_ext.masked_cross_entropy.default
backward_op = torch.ops.masked_loss_ext._masked_cross_entropy_backward.default
sweep_op = torch.ops.masked_loss_ext._masked_cross_entropy_sweep.default
generator = torch.Generator().manual_seed(4)
X = torch.randn(3, 5, 7, generator=generator)
TARGET = torch.randint(0, 7, (3, 5), generator=generator)
MASK = torch.rand(3, 5, generator=generator) < 0.7
EDIT = torch.rand(3, 5, generator=generator)
WEIGHT = torch.rand(7, generator=generator)
VALUES = (0.5, 0.6, 0.75, 0.9, 1.25, 2.0, 3.0, 0.1, 0.2, 0.3)  # one graph each would be above 8
f = mle.masked_cross_entropy


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def everything(x, t):
    options = {"z_loss": t, "focal_gamma": t, "softcap": 3 * t, "label_smoothing": t / 10}
    loss, stats = f(
        x,
        TARGET,
        MASK,
        weight=WEIGHT,
        token_weight=x[..., 0],
        temperature=t,
        shift=1,
        **options,
        return_stats=True,
    )
    return loss + (stats.entropy * stats.lse).sum() + stats.log_prob.mean()


def set_on_a_module(x, t):
    edit_loss.foreground_weight = t
    return edit_loss(x, X.flip(0), None, EDIT)


edit_loss = mle.MaskEditLoss()
token_loss = mle.masked_edit_token_mean_loss
NUMBERS = {
    "temperature": lambda x, t: f(x, TARGET, MASK, temperature=t),
    "normalizer": lambda x, t: f(x, TARGET, MASK, normalizer=t),
    "label_smoothing": lambda x, t: f(x, TARGET, MASK, label_smoothing=t / 4),
    "softcap": lambda x, t: f(x, TARGET, MASK, softcap=t),
    "z_loss": lambda x, t: f(x, TARGET, MASK, z_loss=t, reduction="none").sum(),
    "focal_gamma": lambda x, t: f(x, TARGET, MASK, focal_gamma=t),
    "everything": everything,
    "temperature of statistics": lambda x, t: mle.row_statistics(x, None, temperature=t).lse.sum(),
    "softcap of statistics": lambda x, t: mle.row_statistics(x, TARGET, softcap=t).entropy.sum(),
    "temperature of terms": lambda x, t: cross_entropy_terms(
        x, TARGET, MASK, temperature=t
    ).scaled_log_prob.sum(),
    "weighting": lambda x, t: mle.MseLoss()(x, X.flip(0), t),
    "weighting of tokens": lambda x, t: token_loss(x, X.flip(0), MASK, EDIT, t),
    "foreground_weight": lambda x, t: token_loss(x, X.flip(0), MASK, EDIT, None, t),
    "background_weight": lambda x, t: token_loss(x, X.flip(0), MASK, EDIT > 0.5, None, 2.0, t),
    "weight without edit mask": lambda x, t: token_loss(
        x, X.flip(0), MASK, None, None, t, edit_mask_default="foreground"
    ),
    "weights of a module": set_on_a_module,
}


def assert_same_step(compiled, function, t):
    x = X.clone().requires_grad_()
    results = [(loss, *torch.autograd.grad(loss, x)) for loss in (compiled(x, t), function(x, t))]
    torch.testing.assert_close(*results)
    assert (results[0][1] != 0).any()


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_float_that_changes(name, dynamic):
    function = NUMBERS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for t in VALUES:
        assert_same_step(compiled, function, t)
    assert counters["stats"]["unique_graphs"] <= (1 if dynamic else 2)


@pytest.mark.parametrize("name", ["temperature", "normalizer", "weighting", "z_loss"])
def test_an_int_that_changes(name):
    function = NUMBERS[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for t in range(2, 13):
        assert_same_step(compiled, function, t)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("name", ["temperature", "label_smoothing", "z_loss", "focal_gamma"])
def test_a_schedule_that_begins_where_nothing_is_done(name):
    """At temperature 1, or 0 of the others, the first graph does without."""
    start = 1.0 if name == "temperature" else 0.0
    compiled = torch.compile(NUMBERS[name], fullgraph=True, backend="aot_eager")
    for step in range(10):
        assert_same_step(compiled, NUMBERS[name], start + step / 16)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("name", ["temperature", "temperature of statistics"])
def test_a_temperature_that_passes_through_one(name):
    compiled = torch.compile(NUMBERS[name], fullgraph=True, backend="aot_eager")
    for step in range(9):
        assert_same_step(compiled, NUMBERS[name], 1.5 - step / 8)
    assert counters["stats"]["unique_graphs"] <= 2


def test_a_constant_number_stays_in_the_graph():
    """Nothing is made for numbers that do not change."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x: f(x, TARGET, **{**EVERYTHING, "temperature": 1.0}), backend=keep, fullgraph=True
    )
    compiled(X)
    nodes = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    called = [node.target for node in nodes]
    assert [node.args[16:] for node in nodes if node.target is op] == [(None,)]  # no schedule
    assert not any("ones" in str(target) or "mul" in str(target) for target in called)


@pytest.mark.parametrize("name", ["everything", "weights of a module", "weighting of tokens"])
def test_through_inductor(name):
    compiled = torch.compile(NUMBERS[name], fullgraph=True)
    for t in VALUES:
        assert_same_step(compiled, NUMBERS[name], t)
    assert counters["stats"]["unique_graphs"] <= 2


def test_a_number_out_of_range_is_refused_there_too():
    compiled = torch.compile(NUMBERS["label_smoothing"], fullgraph=True, backend="aot_eager")
    for t in (0.5, 0.75, 1.0):
        compiled(X, t)
    with pytest.raises(Exception, match=r"label_smoothing must be"):
        compiled(X, 8.0)


# --- the operators themselves ------------------------------------------------------------------


def arguments_of(name, schedule):
    """Of the operator, with a schedule, and the same as numbers."""
    inputs = make(BY_NAME[name], torch.float32)
    tensors = [inputs["logits"], inputs["target"], inputs.get("mask"), inputs.get("weight")]
    tensors += [inputs.get("token_weight"), inputs.get("segment_ids"), None, None]
    end = (0, "mean", True)
    tensor = torch.tensor(schedule, dtype=torch.float64)
    return (*tensors, -100, 0.0, 0.0, 0.0, 0.0, *end, tensor), (*tensors, -100, *schedule, *end)


@pytest.mark.parametrize("schedule", [(0.1, 3.0, 0.2, 2.0), (0.0, 0.0, 0.0, 0.0)], ids=str)
@pytest.mark.parametrize("name", ["both_weights_none", "segments_mean", "v17"])
def test_opcheck(name, schedule):
    arguments, plain = arguments_of(name, schedule)
    for tensor in (arguments[0], arguments[4]):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(op, arguments)
    detach, plain = (
        [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        for args in (arguments, plain)
    )
    results, expected = op(*detach), op(*plain)
    for place in (0, 1, 2, 3, 4, 5, 7, 8):
        assert torch.equal(results[place], expected[place])
    assert results[6].shape == results[1].shape and results[6].any() == (schedule[0] > 0)
    grads = (torch.ones(()), *(torch.ones_like(results[1]),) * 3)
    saved = (results[8], *results[2:4], *results[6:8])
    torch.library.opcheck(backward_op, (*grads, *saved, *detach, True, detach[4] is not None))
    swept, wanted = sweep_op(*detach), sweep_op(*plain)
    assert all(map(torch.equal, swept, wanted))


def test_both_derivatives():
    arguments, plain = arguments_of("v17", (0.1, 3.0, 0.2, 2.0))
    found = []
    for args in (arguments, plain):
        x = args[0].detach().requires_grad_()
        loss = op(x, *args[1:])[0]
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        found.append((grad, *torch.autograd.grad(grad.square().sum(), x)))
    torch.testing.assert_close(*found)


def test_a_schedule_is_checked_as_the_numbers_are():
    arguments, _ = arguments_of("v17", (2.0, 0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\]"):
        op(*arguments)
