# SPDX-License-Identifier: BSD-3-Clause
"""MaskedLinearCrossEntropyLoss: by hand, all is passed on, what is frozen takes no product."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.autograd import gradcheck

import masked_loss_ext as mle

Loss = mle.MaskedLinearCrossEntropyLoss
LN3 = math.log(3)
B, S, D, V = 3, 5, 4, 7


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, S, D, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(V, (B, S), generator=g)
    labels[0, 1] = 3
    return hidden, weight, labels, mle.lengths_to_mask([5, 3, 0], S)


# --- numbers worked out by hand ------------------------------------------------------------------


def test_by_hand():
    """Hidden states of one feature: logits (h ln 3, 0), so that p of class 0 is 3/4 for h = 1."""
    weight, target = torch.tensor([[LN3], [0.0]]), torch.tensor([0, 1, 1])
    hidden = torch.tensor([[1.0], [1.0], [math.nan]], requires_grad=True)
    loss = Loss()(hidden, weight, target, torch.tensor([1, 1, 0]))
    torch.testing.assert_close(loss, torch.tensor((math.log(4 / 3) + math.log(4)) / 2))
    loss.backward()  # (p - one-hot) (ln 3, 0) / 2
    expected = torch.tensor([[-0.25 * LN3 / 2], [0.75 * LN3 / 2], [0.0]])
    torch.testing.assert_close(hidden.grad, expected)


def test_bias_and_class_weight_by_hand():
    """The bias makes both logits ln 3, so p = 1/2; the row of class 1 counts four times."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[LN3], [0.0]])
    bias, target = torch.tensor([0.0, LN3]), torch.tensor([0, 1])
    loss_fn = Loss(class_weight=torch.tensor([1.0, 4.0]), reduction="none")
    expected = torch.tensor([1.0, 4.0]) * math.log(2)
    torch.testing.assert_close(loss_fn(hidden, weight, target, bias=bias), expected)


# --- everything is passed on ---------------------------------------------------------------------

CONSTRUCTOR = {
    "ignore_index": 3,
    "class_weight": torch.linspace(0.5, 2, V),
    "label_smoothing": 0.1,
    "temperature": 1.7,
    "softcap": 2.5,
    "z_loss": 1e-2,
    "focal_gamma": 1.5,
    "shift": 2,
    "reduction": "sum",
    "return_stats": True,
    "chunk_rows": 2,
    "logits_dtype": torch.float32,
}
FORWARD = {
    "bias": torch.linspace(-1, 1, V),
    "token_weight": torch.linspace(0, 1, B * S).reshape(B, S),
    "segment_ids": torch.tensor([[0, 0, 1, 1, 1]] * B),
    "normalizer": 13,
    "temperature": 0.6,
    "num_valid": 15,
}
SAME_VALUE = ("return_stats", "chunk_rows", "logits_dtype", "num_valid")


def test_every_keyword_is_accounted_for():
    function = inspect.signature(mle.masked_linear_cross_entropy).parameters
    constructor = inspect.signature(Loss).parameters
    assert set(constructor) == set(CONSTRUCTOR)
    given = {"hidden", "weight", "target", "mask"}
    assert set(constructor) | set(FORWARD) | given == set(function)
    assert set(inspect.signature(Loss.forward).parameters) == {"self"} | given | set(FORWARD)
    for name, parameter in constructor.items():
        assert parameter.default == function[name].default
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


def flat(result):
    """The tensors of a loss with or without statistics."""
    return [result] if isinstance(result, torch.Tensor) else [result[0], *result[1]]


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_constructor_keyword(name):
    arguments, keyword = batch(), {name: CONSTRUCTOR[name]}
    ours = flat(Loss(**keyword)(*arguments))
    theirs = flat(mle.masked_linear_cross_entropy(*arguments, **keyword))
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    if name not in SAME_VALUE:
        assert not torch.equal(ours[0], mle.masked_linear_cross_entropy(*arguments))


@pytest.mark.parametrize("name", FORWARD)
def test_forward_keyword(name):
    arguments, keyword = batch(), {name: FORWARD[name]}
    ours = Loss(shift=1)(*arguments, **keyword)
    assert torch.equal(ours, mle.masked_linear_cross_entropy(*arguments, shift=1, **keyword))
    if name not in SAME_VALUE:
        assert not torch.equal(ours, mle.masked_linear_cross_entropy(*arguments, shift=1))


def test_the_temperature_of_a_call_goes_first():
    loss_fn, arguments = Loss(temperature=3.0), batch()
    rows = torch.linspace(0.5, 2, B * S).reshape(B, S)
    for given in (0.5, torch.tensor(0.5), rows, rows[:, :1]):
        expected = mle.masked_linear_cross_entropy(*arguments, temperature=given)
        assert torch.equal(loss_fn(*arguments, temperature=given), expected)
        assert not torch.equal(loss_fn(*arguments), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "sequence_mean"])
def test_equals_the_module_of_logits_and_its_gradient(reduction):
    hidden, weight, labels, mask = batch(torch.float64)
    bias = FORWARD["bias"].double().requires_grad_()
    keywords = {"label_smoothing": 0.1, "z_loss": 1e-2, "shift": 1, "reduction": reduction}
    leaves = [hidden, weight, bias]
    ours = Loss(**keywords)(hidden, weight, labels, mask, bias=bias)
    logits = F.linear(hidden, weight, bias)
    theirs = mle.MaskedCrossEntropyLoss(**keywords)(logits, labels, mask)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.linspace(1, 2, ours.numel(), dtype=ours.dtype).reshape(ours.shape)
    found = torch.autograd.grad(ours, leaves, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(theirs, leaves, upstream))


def test_gradient_of_the_whole_formula():
    hidden, weight, labels, mask = batch(torch.float64)
    apart = ("logits_dtype", "reduction")
    loss_fn = Loss(**{k: v for k, v in CONSTRUCTOR.items() if k not in apart}).double()

    def call(h, w, b):
        loss, stats = loss_fn(h, w, labels, mask, bias=b)
        return loss, stats.lse, stats.entropy, stats.log_prob

    bias = FORWARD["bias"].double().requires_grad_()
    assert gradcheck(call, [hidden, weight, bias])


# --- frozen heads and trunks ---------------------------------------------------------------------


def products(call):
    """The sizes of both factors of every product that a call makes, in its C++ as well."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        call()
    return [event.input_shapes[:2] for event in profile.function_events if event.name == "aten::mm"]


LOGITS, HIDDEN, WEIGHT = [[8, D], [D, V]], [[8, V], [V, D]], [[V, 8], [8, D]]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "trains,expected",
    [
        ((True, True), [LOGITS, HIDDEN, WEIGHT]),
        ((True, False), [LOGITS, HIDDEN]),
        ((False, True), [LOGITS, WEIGHT]),
        ((False, False), [LOGITS]),
    ],
    ids=["both", "frozen head", "frozen trunk", "frozen"],
)
def test_what_is_frozen_takes_no_product(trains, expected, reduction):
    """Of 15 rows 8 count; "none" makes their logits once more in the backward."""
    hidden, weight, labels, mask = batch()
    hidden.requires_grad_(trains[0]), weight.requires_grad_(trains[1])

    def step():
        loss = Loss(reduction=reduction)(hidden, weight, labels, mask).sum()
        if any(trains):
            loss.backward()

    found = products(step)
    assert (hidden.grad is not None, weight.grad is not None) == trains
    again = [LOGITS] if reduction == "none" and any(trains) else []
    assert sorted(found) == sorted(expected + again)


# --- as a module ---------------------------------------------------------------------------------


def test_class_weight_is_a_buffer():
    loss_fn = Loss(class_weight=torch.rand(V))
    assert list(loss_fn.state_dict()) == ["class_weight"] and not list(loss_fn.parameters())
    assert not Loss().state_dict()
    loss_fn.load_state_dict({"class_weight": torch.ones(V)})
    assert torch.equal(loss_fn(*batch()), Loss(class_weight=torch.ones(V))(*batch()))
    assert loss_fn.to("meta").class_weight.device.type == "meta"


def test_temperature_may_be_a_tensor_that_changes():
    loss_fn = Loss(temperature=torch.tensor(2.0))
    assert not loss_fn.state_dict() and len(list(loss_fn.buffers())) == 1
    for value in (2.0, 0.5):
        loss_fn.temperature.fill_(value)
        torch.testing.assert_close(loss_fn(*batch()), Loss(temperature=value)(*batch()))


def test_repr_shows_what_was_changed():
    assert repr(Loss()) == "MaskedLinearCrossEntropyLoss()"
    text = repr(Loss(class_weight=torch.ones(7), shift=1, softcap=30.0, chunk_rows=64))
    inside = "class_weight=[7], softcap=30.0, shift=1, chunk_rows=64"
    assert text == f"MaskedLinearCrossEntropyLoss({inside})"


def test_copies_compute_the_same(tmp_path):
    loss_fn = Loss(**{k: v for k, v in CONSTRUCTOR.items() if k != "return_stats"})
    torch.save(loss_fn, tmp_path / "loss.pt")
    for other in (copy.deepcopy(loss_fn), torch.load(tmp_path / "loss.pt", weights_only=False)):
        assert repr(other) == repr(loss_fn)
        assert torch.equal(other(*batch()), loss_fn(*batch()))


def test_a_subclass_has_a_constructor_of_its_own():
    class Mine(Loss):
        def __init__(self, gamma: float) -> None:
            super().__init__(focal_gamma=gamma)

    assert list(inspect.signature(Mine).parameters) == ["gamma"]
    assert torch.equal(Mine(1.5)(*batch()), Loss(focal_gamma=1.5)(*batch()))
    with pytest.raises(ValueError, match="^Mine: focal_gamma must be"):
        Mine(-1.0)


def test_compiled_with_one_graph():
    torch._dynamo.reset()
    counters.clear()
    loss_fn = Loss(shift=1, label_smoothing=0.1, z_loss=1e-3)
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    _, weight, _, _ = batch()
    for rows, length in ((3, 5), (4, 9)):
        hidden = torch.randn(rows, length, D, requires_grad=True)
        labels, mask = torch.randint(V, (rows, length)), torch.rand(rows, length) < 0.8
        ours, expected = (f(hidden, weight, labels, mask) for f in (compiled, loss_fn))
        torch.testing.assert_close(ours, expected)
        found, theirs = (torch.autograd.grad(x, [hidden, weight]) for x in (ours, expected))
        torch.testing.assert_close(found, theirs)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


BAD = [
    ({"reduction": "max"}, ValueError, "reduction must be mean, sum, none, sequence_mean, "),
    ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be a finite number at least 0"),
    ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0.0"),
    ({"softcap": 0.0}, ValueError, "softcap must be a finite number above 0, got 0.0"),
    ({"shift": -1}, ValueError, "shift must not be negative, got -1"),
    ({"return_stats": "no"}, TypeError, "return_stats must be a bool, got"),
    ({"class_weight": [1.0]}, TypeError, "class_weight must be a torch.Tensor, got list"),
    ({"class_weight": torch.ones(2, 2)}, ValueError, "class_weight must have one entry per class"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
    ({"chunk_rows": 64.0}, TypeError, "chunk_rows must be an int, got float"),
    ({"logits_dtype": torch.int64}, ValueError, "logits_dtype must be None, torch.float32 or the"),
    ({"logits_dtype": "float32"}, ValueError, "dtype of the logits, got float32"),
]


@pytest.mark.parametrize("keywords,kind,text", BAD)
def test_bad_construction(keywords, kind, text):
    with pytest.raises(kind) as caught:
        Loss(**keywords)
    message = str(caught.value)
    assert message.startswith("MaskedLinearCrossEntropyLoss: ") and text in message


@pytest.mark.parametrize("name", ["weight", "bias", "num_valid", "gamma"])
def test_what_comes_with_a_call_is_none_of_the_module(name):
    with pytest.raises(TypeError, match=name):
        Loss(**{name: None})
