# SPDX-License-Identifier: BSD-3-Clause
"""MaskedCrossEntropyLoss: the formula of its docstring by hand; everything is passed on."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import masked_loss_ext as mle

Loss = mle.MaskedCrossEntropyLoss
LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(7, (3, 5), generator=g)
    labels[0, 1] = 3
    return logits, labels, mle.lengths_to_mask([5, 3, 0], 5)


# --- numbers worked out by hand ------------------------------------------------------------------

CE, OTHER = math.log(4 / 3), LN4  # of logits [ln 3, 0]: p = 3/4 and 1/4, lse = ln 4
FORMULA = [
    ({}, CE),
    ({"label_smoothing": 0.2}, 0.8 * CE + 0.1 * (CE + OTHER)),
    ({"weight": torch.tensor([2.0, 4.0])}, CE),  # the denominator is 2, too
    ({"weight": torch.tensor([2.0, 4.0]), "reduction": "sum"}, 2 * CE),
    ({"focal_gamma": 2.0}, CE / 16),
    ({"z_loss": 0.5}, CE + 0.5 * LN4**2),
    ({"focal_gamma": 2.0, "z_loss": 0.5}, CE / 16 + 0.5 * LN4**2),
    ({"temperature": 0.5}, math.log(10 / 9)),  # logits [2 ln 3, 0]
    ({"softcap": LN3}, math.log1p(math.exp(-LN3 * math.tanh(1)))),
    (
        {
            "label_smoothing": 0.2,
            "weight": torch.tensor([2.0, 4.0]),
            "focal_gamma": 2.0,
            "z_loss": 0.5,
            "reduction": "sum",
        },
        (0.8 * 2 * CE + 0.1 * (2 * CE + 4 * OTHER)) / 16 + 0.5 * LN4**2,
    ),
]


NAMES = ["-".join(keywords) or "plain" for keywords, _ in FORMULA]


@pytest.mark.parametrize("keywords,expected", FORMULA, ids=NAMES)
def test_formula_by_hand(keywords, expected):
    """One row that counts, one that the mask drops, one whose label is ignored."""
    logits = torch.tensor([[LN3, 0.0], [math.nan, 9.0], [math.inf, 0.0]])
    target, mask = torch.tensor([0, 1, -100]), torch.tensor([1, 0, 1])
    loss_fn = Loss(**keywords)
    torch.testing.assert_close(loss_fn(logits, target, mask), torch.tensor(expected))
    # token_weight multiplies the row and leaves the denominator alone
    tripled = loss_fn(logits, target, mask, token_weight=torch.tensor([3.0, 1.0, 1.0]))
    torch.testing.assert_close(tripled, torch.tensor(3 * expected))


def test_shift_and_segments_by_hand():
    """Position 0 predicts label 1 with p = 1/2; position 1 predicts label 2 with p = 3/4."""
    logits = torch.tensor([[[0.0, 0.0], [LN3, 0.0], [7.0, -7.0]]])
    labels, loss_fn = torch.tensor([[1, 1, 0]]), Loss(shift=1, reduction="none")
    torch.testing.assert_close(loss_fn(logits, labels), torch.tensor([[LN2, CE, 0.0]]))
    segments = torch.tensor([[3, 3, 8]])
    expected = torch.tensor([[LN2, 0.0, 0.0]])
    torch.testing.assert_close(loss_fn(logits, labels, segment_ids=segments), expected)
    mask = torch.tensor([[1, 0, 1]])  # the target's
    expected = torch.tensor([[0.0, CE, 0.0]])
    torch.testing.assert_close(loss_fn(logits, labels, mask), expected)


# --- everything is passed on ---------------------------------------------------------------------

CONSTRUCTOR = {
    "ignore_index": 3,
    "weight": torch.linspace(0.5, 2, 7),
    "label_smoothing": 0.1,
    "temperature": 1.7,
    "softcap": 2.5,
    "z_loss": 1e-2,
    "focal_gamma": 1.5,
    "shift": 2,
    "reduction": "sum",
    "class_dim": 1,
    "inplace_backward": True,
    "gradient_in_forward": True,
    "return_stats": True,
}
FORWARD = {
    "token_weight": torch.linspace(0, 1, 15).reshape(3, 5),
    "segment_ids": torch.tensor([[0, 0, 1, 1, 1]] * 3),
    "normalizer": 13,
    "temperature": torch.linspace(0.5, 2, 15).reshape(3, 5),
}


def test_every_keyword_is_accounted_for():
    function = inspect.signature(mle.masked_cross_entropy).parameters
    constructor = inspect.signature(Loss).parameters
    assert set(constructor) == set(CONSTRUCTOR)
    assert set(constructor) | set(FORWARD) | {"logits", "target", "mask"} == set(function)
    for name, parameter in constructor.items():
        assert parameter.default == function[name].default
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


def flat(result):
    """The tensors of a loss with or without statistics."""
    return [result] if isinstance(result, torch.Tensor) else [result[0], *result[1]]


@pytest.mark.parametrize("name", CONSTRUCTOR)
def test_constructor_keyword(name):
    logits, labels, mask = batch()
    value = CONSTRUCTOR[name]
    if name == "class_dim":  # seven labels of five classes
        labels, mask = labels[:, :1].expand(3, 7) % 5, mask[:, :1].expand(3, 7)
    module = flat(Loss(**{name: value})(logits, labels, mask))
    function = flat(mle.masked_cross_entropy(logits, labels, mask, **{name: value}))
    for ours, theirs in zip(module, function, strict=True):
        assert torch.equal(ours, theirs)
    if name not in ("class_dim", "inplace_backward", "gradient_in_forward", "return_stats"):
        assert not torch.equal(module[0], mle.masked_cross_entropy(logits, labels, mask))


@pytest.mark.parametrize("name", FORWARD)
def test_forward_keyword(name):
    logits, labels, mask = batch()
    keywords = {name: FORWARD[name]}
    ours = Loss(shift=1)(logits, labels, mask, **keywords)
    assert torch.equal(ours, mle.masked_cross_entropy(logits, labels, mask, shift=1, **keywords))
    assert not torch.equal(ours, mle.masked_cross_entropy(logits, labels, mask, shift=1))


def test_equals_torch_and_its_gradient():
    logits, labels, mask = batch()
    weight = torch.rand(7)
    Loss(weight=weight, label_smoothing=0.1)(logits, labels, mask).backward()
    theirs = logits.detach().clone().requires_grad_()
    masked = mle.mask_labels(labels, mask).flatten()
    F.cross_entropy(theirs.flatten(0, 1), masked, weight, label_smoothing=0.1).backward()
    torch.testing.assert_close(logits.grad, theirs.grad)


def test_gradient_of_the_whole_formula():
    logits, labels, mask = batch(torch.float64)
    # The second allows no statistics.
    apart = ("inplace_backward", "gradient_in_forward", "class_dim")
    keywords = {k: v for k, v in CONSTRUCTOR.items() if k not in apart}
    loss_fn = Loss(**keywords).double()
    token_weight = FORWARD["token_weight"].double().requires_grad_()

    def call(x, u):
        loss, stats = loss_fn(x, labels, mask, token_weight=u)
        return loss, stats.lse, stats.entropy, stats.log_prob

    assert gradcheck(call, [logits, token_weight])


def test_the_loss_of_bfloat16_is_float32():
    logits, labels, mask = batch(torch.bfloat16)
    loss = Loss()(logits, labels, mask)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, Loss()(logits.detach().float(), labels, mask))


# --- as a module ---------------------------------------------------------------------------------


def test_weight_is_a_buffer_as_in_torch():
    weight = torch.rand(7)
    loss_fn, theirs = Loss(weight=weight), torch.nn.CrossEntropyLoss(weight=weight)
    assert list(loss_fn.state_dict()) == list(theirs.state_dict()) == ["weight"]
    assert not list(loss_fn.parameters()) and not Loss().state_dict()
    loss_fn.load_state_dict({"weight": torch.ones(7)})
    assert torch.equal(loss_fn(*batch()), Loss(weight=torch.ones(7))(*batch()))
    assert loss_fn.to("meta").weight.device.type == "meta"


def test_temperature_may_be_a_tensor_that_changes():
    loss_fn = Loss(temperature=torch.tensor(2.0))
    assert not loss_fn.state_dict() and len(list(loss_fn.buffers())) == 1
    for value in (2.0, 0.5):
        loss_fn.temperature.fill_(value)
        torch.testing.assert_close(loss_fn(*batch()), Loss(temperature=value)(*batch()))


def test_temperatures_of_a_batch_go_before_that_of_the_module():
    rows = torch.linspace(0.5, 2, 15).reshape(3, 5)
    for given in (0.5, torch.tensor(0.5), rows, rows[:, :1]):
        ours = Loss(temperature=3.0)(*batch(), temperature=given)
        assert torch.equal(ours, Loss()(*batch(), temperature=given))
        assert torch.equal(ours, mle.masked_cross_entropy(*batch(), temperature=given))
    # one for each position, for batches of any number of samples
    loss_fn = Loss(temperature=rows[:1])
    expected = mle.masked_cross_entropy(*batch(), temperature=rows[:1].expand(3, 5))
    assert torch.equal(loss_fn(*batch()), expected)


def test_repr_shows_what_was_changed():
    assert repr(Loss()) == "MaskedCrossEntropyLoss()"
    text = repr(Loss(weight=torch.ones(7), shift=1, softcap=30.0, reduction="sum"))
    assert text == "MaskedCrossEntropyLoss(weight=[7], softcap=30.0, shift=1, reduction='sum')"
    assert repr(Loss(temperature=torch.tensor(2.0))) == "MaskedCrossEntropyLoss(temperature=[])"


def test_copies_compute_the_same(tmp_path):
    keywords = {k: v for k, v in CONSTRUCTOR.items() if k not in ("return_stats", "class_dim")}
    loss_fn = Loss(**keywords)
    torch.save(loss_fn, tmp_path / "loss.pt")
    for other in (copy.deepcopy(loss_fn), torch.load(tmp_path / "loss.pt", weights_only=False)):
        assert repr(other) == repr(loss_fn)
        assert torch.equal(other(*batch()), loss_fn(*batch()))


def test_compiled():
    torch._dynamo.reset()
    loss_fn = Loss(shift=1, label_smoothing=0.1, z_loss=1e-3, return_stats=True)
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    logits, labels, mask = batch()
    for rows in (3, 2):
        arguments = logits[:rows], labels[:rows], mask[:rows]
        ours, expected = flat(compiled(*arguments)), flat(loss_fn(*arguments))
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x, y)
    torch._dynamo.reset()


SIX = "mean, sum, none, sequence_mean, sequence_sum or weighted_mean"
BAD = [
    ({"reduction": "max"}, ValueError, f"reduction must be {SIX}, got 'max'"),
    ({"reduction": None}, ValueError, f"reduction must be {SIX}, got None"),
    (
        {"label_smoothing": 1.1},
        ValueError,
        "label_smoothing must be a finite number at least 0 and",
    ),
    ({"label_smoothing": 1.1}, ValueError, "at most 1, got 1.1"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be a finite number"),
    ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got NoneType"),
    ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be a finite number above 0, got -1"),
    ({"temperature": math.inf}, ValueError, "temperature must be a finite number above 0, got inf"),
    ({"temperature": 1e-39}, ValueError, "temperature must be at least 1.175e-38, the smallest"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got str"),
    ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    ({"temperature": True}, TypeError, "temperature must be a number, got bool"),
    ({"softcap": 0.0}, ValueError, "softcap must be a finite number above 0, got 0.0"),
    ({"softcap": math.nan}, ValueError, "softcap must be a finite number above 0, got nan"),
    ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
    ({"focal_gamma": -0.5}, ValueError, "focal_gamma must be a finite number at least 0, got -0.5"),
    ({"focal_gamma": math.inf}, ValueError, "focal_gamma must be a finite number at least 0"),
    ({"focal_gamma": None}, TypeError, "focal_gamma must be a number, got NoneType"),
    ({"z_loss": -1e-4}, ValueError, "z_loss must be a finite number at least 0, got -0.0001"),
    ({"z_loss": math.nan}, ValueError, "z_loss must be a finite number at least 0, got nan"),
    ({"z_loss": "1e-4"}, TypeError, "z_loss must be a number, got str"),
    ({"z_loss": None}, TypeError, "z_loss must be a number, got NoneType"),
    ({"shift": -1}, ValueError, "shift must not be negative, got -1"),
    ({"shift": 1.0}, TypeError, "shift must be an int, got float"),
    ({"shift": True}, TypeError, "shift must be an int, got bool"),
    ({"shift": 2**70}, ValueError, f"shift must fit in 64 bits, got {2**70}"),
    ({"ignore_index": -100.0}, TypeError, "ignore_index must be an int, got float"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    ({"ignore_index": -(2**70)}, ValueError, "ignore_index must fit in 64 bits"),
    ({"class_dim": 1.0}, TypeError, "class_dim must be an int, got float"),
    ({"class_dim": None}, TypeError, "class_dim must be an int, got NoneType"),
    ({"inplace_backward": "no"}, TypeError, "inplace_backward must be a bool, got"),
    ({"gradient_in_forward": "no"}, TypeError, "gradient_in_forward must be a bool"),
    ({"return_stats": "no"}, TypeError, "return_stats must be a bool, got"),
    ({"weight": [1.0, 2.0]}, TypeError, "weight must be a torch.Tensor, got list"),
    ({"weight": torch.ones(2, 2)}, ValueError, "weight must have one entry per class [V], got [2"),
]


@pytest.mark.parametrize("keywords,kind,text", BAD)
def test_bad_construction(keywords, kind, text):
    with pytest.raises(kind) as caught:
        Loss(**keywords)
    assert str(caught.value).startswith("MaskedCrossEntropyLoss: ") and text in str(caught.value)
