# SPDX-License-Identifier: BSD-3-Clause
"""Bad input of the cross entropy: the text names function, argument, rule and what was got."""

import contextlib
import gc
import math
import weakref

import pytest
import torch

import masked_loss_ext as mle
from tests.elementwise.test_errors import check

X = torch.zeros(2, 3, 5)
Y = torch.zeros(2, 3, dtype=torch.long)
M = torch.ones(2, 3)
W, T = torch.ones(5), torch.ones(2, 3)
META = torch.zeros(2, 3, device="meta")
f = mle.masked_cross_entropy
op = torch.ops.masked_loss_ext.masked_cross_entropy
backward = torch.ops.masked_loss_ext._masked_cross_entropy_backward
backward_in_place = torch.ops.masked_loss_ext._masked_cross_entropy_backward_
sweep_op = torch.ops.masked_loss_ext._masked_cross_entropy_sweep
sweep_in_place = torch.ops.masked_loss_ext._masked_cross_entropy_sweep_
scale = torch.ops.masked_loss_ext._masked_cross_entropy_scale_gradient_

# keywords that replace good ones, the error, the argument, what the text must hold besides
TENSORS = [
    ({"logits": [[1.0]]}, TypeError, "logits", "torch.Tensor", "got list"),
    ({"logits": None}, TypeError, "logits", "torch.Tensor", "got NoneType"),
    ({"target": [0]}, TypeError, "target", "torch.Tensor", "got list"),
    ({"target": 3}, TypeError, "target", "torch.Tensor", "got int"),
    ({"mask": [True]}, TypeError, "mask", "torch.Tensor", "got list"),
    ({"mask": M.numpy()}, TypeError, "mask", "torch.Tensor", "got ndarray"),
    ({"logits": X.long()}, ValueError, "logits", "float16, bfloat16, float32 or float64", "Long"),
    ({"logits": X.to(torch.complex64)}, ValueError, "logits", "float16", "ComplexFloat"),
    ({"target": Y.float()}, ValueError, "target", "soft labels are not what", "Float"),
    ({"target": X}, ValueError, "target", "soft labels are not what", "Float"),
    ({"target": Y.bool()}, ValueError, "target", "int64", "Bool"),
    ({"target": Y[:, :2]}, ValueError, "target", "shape of logits [2, 3, 5]", "got [2, 2]"),
    ({"target": Y[:, :1]}, ValueError, "target", "shape of logits", "got [2, 1]"),
    ({"target": Y[:0]}, ValueError, "target", "shape of logits", "got [0, 3]"),
    ({"target": Y[..., None]}, ValueError, "target", "without the last", "got [2, 3, 1]"),
    ({"mask": M[:, :2]}, ValueError, "mask", "shape of logits [2, 3, 5]", "got [2, 2]"),
    ({"mask": M[0]}, ValueError, "mask", "shape of logits [2, 3, 5]", "got [3]"),
    ({"mask": W}, ValueError, "mask", "class weights go by weight=", "got [5]"),
    ({"mask": W.half()}, ValueError, "mask", "class weights go by weight=", "got [5]"),
    ({"mask": X}, ValueError, "mask", "without the last dimension", "got [2, 3, 5]"),
    ({"mask": M[:, None, None]}, ValueError, "mask", "shape of logits", "got [2, 1, 1, 3]"),
    ({"mask": M.to(torch.complex64)}, ValueError, "mask", "bool, integer", "complex64"),
    ({"weight": W[:4]}, ValueError, "weight", "one entry per class [5]", "got [4]"),
    ({"weight": torch.ones(6)}, ValueError, "weight", "one entry per class [5]", "got [6]"),
    ({"weight": W[None]}, ValueError, "weight", "one entry per class [5]", "got [1, 5]"),
    ({"weight": torch.tensor(1.0)}, ValueError, "weight", "one entry per class [5]", "got []"),
    ({"token_weight": T[:, :2]}, ValueError, "token_weight", "shape of logits", "got [2, 2]"),
    ({"weight": W.to(torch.complex64)}, ValueError, "weight", "floating or integer", "complex64"),
    ({"token_weight": Y}, ValueError, "token_weight", "float16", "Long"),
    ({"segment_ids": M}, ValueError, "segment_ids", "int64", "Float"),
    ({"segment_ids": Y[:, :2]}, ValueError, "segment_ids", "shape of logits", "got [2, 2]"),
    ({"segment_ids": Y[:, :1]}, ValueError, "segment_ids", "shape of logits", "got [2, 1]"),
    ({"target": META.long()}, ValueError, "all tensors", "one device", "cpu and meta"),
    ({"mask": META}, ValueError, "all tensors", "one device", "cpu and meta"),
    ({"weight": W.to("meta")}, ValueError, "all tensors", "one device", "cpu and meta"),
    ({"token_weight": META}, ValueError, "all tensors", "one device", "cpu and meta"),
]
ROWS_TOO = "a number, a 0-d tensor or have the shape of logits [2, 3, 5] without the last dimension"
SIX = "mean, sum, none, sequence_mean, sequence_sum or weighted_mean"
NUMBERS = [
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing", "at least 0", "got -0.1"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing", "at most 1", "got 1.5"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing", "finite", "got nan"),
    ({"label_smoothing": "a"}, TypeError, "label_smoothing", "number", "got str"),
    ({"label_smoothing": None}, TypeError, "label_smoothing", "number", "got NoneType"),
    ({"temperature": 0}, ValueError, "temperature", "above 0", "got 0"),
    ({"temperature": -1.0}, ValueError, "temperature", "above 0", "got -1"),
    ({"temperature": math.nan}, ValueError, "temperature", "above 0", "got nan"),
    ({"temperature": math.inf}, ValueError, "temperature", "finite", "got inf"),
    ({"temperature": 1e-39}, ValueError, "temperature", "at least 1.175e-38", "got 1e-39"),
    ({"temperature": 2**2000}, ValueError, "temperature", "finite", "got 1148"),
    ({"temperature": torch.tensor(0.0)}, ValueError, "temperature", "positive", "got 0"),
    ({"temperature": torch.tensor(-2.0)}, ValueError, "temperature", "positive", "got -2"),
    ({"temperature": torch.ones(3)}, ValueError, "temperature", ROWS_TOO, "got [3]"),
    ({"temperature": torch.ones(5)}, ValueError, "temperature", ROWS_TOO, "got [5]"),
    ({"temperature": torch.ones(2, 2)}, ValueError, "temperature", ROWS_TOO, "got [2, 2]"),
    ({"temperature": torch.ones(3, 3)}, ValueError, "temperature", ROWS_TOO, "got [3, 3]"),
    ({"temperature": X}, ValueError, "temperature", ROWS_TOO, "got [2, 3, 5]"),
    ({"temperature": META}, ValueError, "all tensors", "one device", "cpu and meta"),
    ({"temperature": "hot"}, TypeError, "temperature", "number", "got str"),
    ({"temperature": None}, TypeError, "temperature", "number", "got NoneType"),
    ({"temperature": True}, TypeError, "temperature", "number", "got bool"),
    ({"softcap": 0.0}, ValueError, "softcap", "above 0", "got 0"),
    ({"softcap": -3.0}, ValueError, "softcap", "above 0", "got -3"),
    ({"softcap": math.nan}, ValueError, "softcap", "above 0", "got nan"),
    ({"softcap": -math.inf}, ValueError, "softcap", "above 0", "got -inf"),
    ({"softcap": 1e-39}, ValueError, "softcap", "at least 1.175e-38", "got 1e-39"),
    ({"softcap": 2**2000}, ValueError, "softcap", "finite", "got 1148"),
    ({"softcap": "a"}, TypeError, "softcap", "number", "got str"),
    ({"z_loss": math.nan}, ValueError, "z_loss", "at least 0", "got nan"),
    ({"z_loss": math.inf}, ValueError, "z_loss", "finite", "got inf"),
    ({"z_loss": -1e-4}, ValueError, "z_loss", "at least 0", "got -0.0001"),
    ({"z_loss": "a"}, TypeError, "z_loss", "number", "got str"),
    ({"z_loss": None}, TypeError, "z_loss", "number", "got NoneType"),
    ({"focal_gamma": -1.0}, ValueError, "focal_gamma", "at least 0", "got -1"),
    ({"focal_gamma": math.inf}, ValueError, "focal_gamma", "finite", "got inf"),
    ({"focal_gamma": math.nan}, ValueError, "focal_gamma", "finite", "got nan"),
    ({"focal_gamma": "a"}, TypeError, "focal_gamma", "number", "got str"),
    ({"shift": -1}, ValueError, "shift", "not be negative", "got -1"),
    ({"shift": 1.5}, TypeError, "shift", "an int", "got float"),
    ({"shift": True}, TypeError, "shift", "an int", "got bool"),
    ({"shift": "1"}, TypeError, "shift", "an int", "got str"),
    ({"shift": 2**70}, ValueError, "shift", "fit in 64 bits", f"got {2**70}"),
    ({"ignore_index": None}, TypeError, "ignore_index", "an int", "got NoneType"),
    ({"ignore_index": -100.0}, TypeError, "ignore_index", "an int", "got float"),
    ({"ignore_index": False}, TypeError, "ignore_index", "an int", "got bool"),
    ({"ignore_index": 2**70}, ValueError, "ignore_index", "fit in 64 bits", f"got {2**70}"),
    ({"reduction": "avg"}, ValueError, "reduction", SIX, "got 'avg'"),
    ({"reduction": None}, ValueError, "reduction", SIX, "got None"),
    ({"reduction": 1}, ValueError, "reduction", SIX, "got 1"),
    ({"reduction": ["mean"]}, ValueError, "reduction", SIX, "got ['mean']"),
    ({"normalizer": torch.ones(2)}, ValueError, "normalizer", "number", "got [2]"),
    ({"normalizer": "many"}, TypeError, "normalizer", "number", "got str"),
    ({"normalizer": True}, TypeError, "normalizer", "number", "got bool"),
    ({"normalizer": math.nan}, ValueError, "normalizer", "at least 0", "got nan"),
    ({"normalizer": -3}, ValueError, "normalizer", "at least 0", "got -3"),
    ({"normalizer": -math.inf}, ValueError, "normalizer", "at least 0", "got -inf"),
    ({"normalizer": math.inf}, ValueError, "normalizer", "finite", "got inf"),
    ({"normalizer": 2**2000}, ValueError, "normalizer", "finite", "got 1148"),
    ({"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer", "means", "sum"),
    ({"normalizer": 3, "reduction": "none"}, ValueError, "normalizer", "means", "none"),
    ({"class_dim": 3}, ValueError, "class_dim", "in [-3, 2] for logits [2, 3, 5]", "got 3"),
    ({"class_dim": -4}, ValueError, "class_dim", "in [-3, 2]", "got -4"),
    ({"class_dim": None}, TypeError, "class_dim", "an int", "got NoneType"),
    ({"class_dim": 1.0}, TypeError, "class_dim", "an int", "got float"),
    ({"class_dim": True}, TypeError, "class_dim", "an int", "got bool"),
    ({"inplace_backward": "no"}, TypeError, "inplace_backward", "a bool", "got"),
    ({"gradient_in_forward": "no"}, TypeError, "gradient_in_forward", "a bool", "got"),
    ({"return_stats": "no"}, TypeError, "return_stats", "a bool", "got"),
]
CHECKED_BY_THE_OPERATOR = [
    ({"temperature": torch.tensor(math.inf)}, ValueError, "temperature", "finite", "got inf"),
    ({"normalizer": torch.tensor(-1.0)}, ValueError, "normalizer", "not negative", "got -1"),
    ({"normalizer": torch.tensor(math.nan)}, ValueError, "normalizer", "finite", "got nan"),
]
SHARED = [case for case in TENSORS if set(case[0]) <= {"logits", "target", "mask"}]
SHARED += [
    case
    for case in NUMBERS
    if set(case[0]) <= {"temperature", "softcap", "ignore_index", "class_dim"}
]


@pytest.mark.parametrize("bad,kind,name,rule,got", TENSORS + NUMBERS + CHECKED_BY_THE_OPERATOR)
def test_masked_cross_entropy(bad, kind, name, rule, got):
    arguments = {"logits": X, "target": Y, "mask": M, **bad}
    text = f"masked_cross_entropy: {name}"
    check(lambda: f(**arguments), kind, text, " must ", rule, got)
    if bad.get("logits", X) is X:  # the way of training
        arguments["logits"] = X.clone().requires_grad_()
        check(lambda: f(**arguments), kind, text, rule, got)


@pytest.mark.parametrize("bad,kind,name,rule,got", SHARED)
def test_row_statistics(bad, kind, name, rule, got):
    arguments = {"logits": X, "target": Y, "mask": M, **bad}
    check(lambda: mle.row_statistics(**arguments), kind, f"row_statistics: {name}", rule, got)


# What torch.func and torch.compile would hand to plain PyTorch, or to the operator at run time.
OPTIONS_OF_PYTHON = [
    case
    for case in NUMBERS
    if not any(isinstance(value, (torch.Tensor, str)) for value in case[0].values())
]


@pytest.mark.parametrize("bad,kind,name,rule,got", OPTIONS_OF_PYTHON)
def test_under_torch_func(bad, kind, name, rule, got):
    def loss(x):
        return f(x, Y, M, **bad)

    check(lambda: torch.func.grad(loss)(X), kind, f"masked_cross_entropy: {name}", rule, got)


@pytest.mark.parametrize(
    "bad", [{"z_loss": math.nan}, {"normalizer": -1.0}, {"temperature": math.inf}, {"shift": 1.5}]
)
def test_under_torch_compile(bad):
    """PyTorch chooses the kind of error and may add to the text."""
    compiled = torch.compile(lambda x: f(x, Y, M, **bad), fullgraph=True, backend="aot_eager")
    (name,) = bad
    with pytest.raises(Exception, match=f"masked_cross_entropy: {name} must be a"):
        compiled(X)
    torch._dynamo.reset()


def test_what_has_a_meaning_beside_the_usual():
    x = torch.tensor([[0.5, 9.0, -3.0], [4.0, -40.0, 0.0]])
    y = torch.tensor([1, 0])
    plain = f(x, y)
    for softcap in (math.inf, 1e39, 2**200):  # no cap
        assert torch.equal(f(x, y, softcap=softcap), plain)
        assert torch.equal(mle.row_statistics(x, y, softcap=softcap)[0], x.logsumexp(-1))
    assert torch.equal(f(x, y, softcap=mle.MaskedCrossEntropyLoss(softcap=math.inf).softcap), plain)
    torch.testing.assert_close(f(x, y, softcap=1e6), plain)
    torch.testing.assert_close(f(x, y, temperature=1e39), torch.tensor(math.log(3)))
    for one in (1, 1.0):
        assert torch.equal(f(x, y, temperature=one), plain)
    assert torch.equal(f(x, y, normalizer=0), torch.tensor(0.0))
    # At the smallest temperature z is large, and still a float32.
    assert f(x / 100, y, temperature=1.2e-38).isfinite()


UNKNOWN_KINDS = {
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "sparse": lambda t: t.to_sparse(),
}
ROWS = {"logits": X, "target": Y, "mask": M, "weight": W, "token_weight": T, "segment_ids": Y}
ROWS |= {"temperature": torch.ones(2), "normalizer": torch.ones(2)}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", UNKNOWN_KINDS)
def test_nested_and_sparse_tensors(kind, name):
    value = UNKNOWN_KINDS[kind](ROWS[name])
    arguments = {"logits": X, "target": Y, name: value}
    what = "plain tensor, got a nested" if "ed" in kind else "dense tensor, got layout"
    check(lambda: f(**arguments), ValueError, f"masked_cross_entropy: {name} must be a {what}")
    if name in ("logits", "target", "mask", "temperature"):
        text = f"row_statistics: {name} must be a {what}"
        check(lambda: mle.row_statistics(**arguments), ValueError, text)
    if name == "weight":
        check(
            lambda: mle.MaskedCrossEntropyLoss(weight=value), ValueError, "weight must be a", what
        )


STRANGE = ["int1", "uint4", "float8_e8m0fnu", "float4_e2m1fn_x2"]


@pytest.mark.parametrize("dtype", STRANGE)
@pytest.mark.parametrize("name", ["logits", "target", "token_weight", "segment_ids", "temperature"])
def test_dtypes_that_no_kernel_reads(dtype, name):
    shape = {"logits": (2, 3, 5), "temperature": ()}.get(name, (2, 3))
    value = torch.empty(shape, dtype=getattr(torch, dtype))
    arguments = {"logits": X, "target": Y, name: value}
    text = f"masked_cross_entropy: {name} must be"
    check(lambda: f(**arguments), ValueError, text, f"got torch.{dtype}")


@pytest.mark.parametrize("shape,at", [((2, 3, 4), (2, 4)), ((2, 3, 4, 5), (2, 4, 5))])
def test_logits_of_the_other_layout(shape, at):
    target = torch.zeros(at, dtype=torch.long)
    text = "for logits [N, C, ...] give class_dim=1"
    check(lambda: f(torch.zeros(shape), target), ValueError, "cross_entropy: target", text)
    assert f(torch.zeros(shape), target, class_dim=1).isfinite()


def test_a_mask_with_as_many_rows_as_classes_is_a_mask():
    """[N, V] with N = V: nothing but the name tells a mask from class weights."""
    x, y = torch.randn(5, 5), torch.arange(5)
    mask = torch.tensor([1.0, 0, 1, 0.5, 1])
    expected = torch.nn.functional.cross_entropy(x[mask > 0], y[mask > 0])
    torch.testing.assert_close(f(x, y, mask), expected)
    bools = torch.ones(5, dtype=torch.bool)  # no class weights
    check(lambda: f(X, Y, bools), ValueError, "mask must have the shape", "got [5]")
    module = mle.MaskedCrossEntropyLoss()
    check(lambda: module(X, Y, W), ValueError, "class weights go by weight=")
    check(lambda: mle.row_statistics(X, Y, W), ValueError, "row_statistics: mask", "by weight=")


def test_what_gets_no_gradient_may_not_ask_for_one():
    number = torch.tensor(2.0, requires_grad=True)
    check(lambda: f(X, Y, temperature=number), ValueError, "temperature", "require", "gradient")
    rows = torch.ones(2, 3, requires_grad=True)
    check(lambda: f(X, Y, temperature=rows), ValueError, "temperature", "require", "gradient")
    check(lambda: f(X, Y, normalizer=number), ValueError, "normalizer", "require", "gradient")


@pytest.mark.parametrize("value,text", [(0, "0"), (-2, "-2"), (math.nan, "nan"), (math.inf, "inf")])
def test_a_bad_temperature_names_its_row(value, text):
    """The first of rows that count, in the tensor of the caller; of others nothing is looked at."""
    t = torch.ones(2, 3)
    t[0, 1] = t[1, 0] = t[1, 2] = value
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    rule = f"temperature at row [1, 0] must be positive and finite, got {text}"
    x = X.clone().requires_grad_()
    for options in ({}, {"gradient_in_forward": True}, {"inplace_backward": True}):
        for logits in (X, x):
            run = lambda x=logits, o=options: f(x, Y, mask, temperature=t, **o)  # noqa: E731
            check(run, ValueError, "masked_cross_entropy: " + rule)
    run = lambda: mle.row_statistics(X, None, mask, temperature=t)  # noqa: E731
    check(run, ValueError, "row_statistics: " + rule)
    # With a shift it is the mask of the next position, and behind [1, 2] there is none.
    for row in (0, 1), (1, 0):
        rule = f"temperature at row {list(row)} must be positive and finite, got {text}"
        check(lambda: f(X, Y, mask, temperature=t, shift=1), ValueError, rule)
        t[row] = 1
    assert f(X, Y, mask, temperature=t, shift=1).isfinite()
    target = torch.where(t == 1, Y, -100)
    assert f(X, target, temperature=t).isfinite()
    wide = torch.zeros(2, 3, 40000)  # rows in pieces
    rule = "temperature at row [1, 2] must be positive and finite"
    check(lambda: f(wide, Y, mask, temperature=t), ValueError, rule)
    for call, name in ((backward, ""), (backward_in_place, "_")):
        name = f"_masked_cross_entropy_backward{name}: {rule}"
        check(lambda c=call, t=t: call_backward(c, temperature=t), ValueError, name)
    x = X.clone()
    check(lambda: sweep_in_place(x, Y, temperature=t), ValueError, rule)
    assert torch.equal(x, X)


def test_a_bad_label_goes_before_a_bad_temperature():
    with pytest.raises(IndexError, match=r"target at row \[0, 0\]"):
        f(X, Y + 7, temperature=T * 0)


def test_there_is_no_loss_without_labels():
    check(lambda: f(X, None), TypeError, "masked_cross_entropy: target", "got NoneType")


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 0), ()])
def test_no_class(shape):
    text = "logits must be [..., V] with at least one class, got "
    target = torch.zeros(shape[:-1], dtype=torch.long)
    check(lambda: f(torch.zeros(shape), target), ValueError, "masked_cross_entropy: " + text)
    check(lambda: mle.row_statistics(torch.zeros(shape)), ValueError, "row_statistics: " + text)


def test_a_shift_needs_a_sequence():
    text = "logits must be [..., S, V] where shift is not 0, got [5]"
    check(lambda: f(X[0, 0], Y[0, 0], shift=1), ValueError, "masked_cross_entropy: " + text)


@pytest.mark.parametrize("bad", [{"mask": M[:, :2]}, {"target": Y + 7}, {"shift": 1.5}], ids=str)
def test_a_caught_error_keeps_nothing_alive(bad):
    """As a training loop does that retries with a smaller batch."""
    x = torch.zeros(2, 3, 5, requires_grad=True)
    alive, call = weakref.ref(x), {"logits": x, "target": Y, **bad}
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(ValueError, IndexError, TypeError):
            f(**call)
        del x, call
        assert alive() is None
    finally:
        gc.enable()


def test_additive_masks_are_refused():
    additive = torch.tensor([[0.0, -torch.inf, 0], [0, 0, -1e9]])
    text = "additive"
    check(lambda: f(X, Y, additive), ValueError, "masked_cross_entropy: mask", text)
    check(lambda: mle.row_statistics(X, Y, additive), ValueError, "row_statistics: mask", text)


# --- labels ------------------------------------------------------------------------------------

BAD_LABELS = [(5, "5"), (-1, "-1"), (-101, "-101"), (2**31 - 1, "2147483647"), (2**62, str(2**62))]


@pytest.mark.parametrize("label,text", BAD_LABELS)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"shift": 1}], ids=str)
def test_a_bad_label_is_named(label, text, options):
    target = Y.clone()
    target[1, 2] = label
    for call in (f, lambda x, y, m, **o: mle.row_statistics(x, y, m)):
        for x in (X, X.clone().requires_grad_()):
            with pytest.raises(IndexError) as caught:
                call(x, target, M, **options)
            assert "target at row [1, 2] must be in [0, 5) or ignore_index" in str(caught.value)
            assert str(caught.value).endswith(f"got {text}")
    target[0, 1] = 9  # the first one is named, whatever the threads do
    with pytest.raises(IndexError, match=r"row \[0, 1\] .*got 9$"):
        f(X, target, M, **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_a_bad_label_of_a_small_dtype(dtype):
    """100 for all of them; and what would be a class if bytes were cut off."""
    for label in (100, 256 if dtype in (torch.int32, torch.int16) else 127):
        target = torch.zeros(4, dtype=dtype)
        target[2] = label
        with pytest.raises(IndexError, match=rf"row \[2\] must be in \[0, 5\).*got {label}$"):
            f(torch.zeros(4, 5), target)


def test_the_row_of_a_label_in_other_ranks():
    for shape, at in (((7,), (3,)), ((2, 3, 4), (1, 2, 3)), ((), ())):
        target = torch.zeros(shape, dtype=torch.long)
        target[at] = 8
        index = ", ".join(map(str, at))
        with pytest.raises(IndexError, match=rf"row \[{index}\] must be"):
            f(torch.zeros(*shape, 5), target)


def test_bad_labels_that_do_not_count():
    target = torch.tensor([[9, 1, -7], [0, -100, 2**40]])
    mask = torch.tensor([[0, 1, 0], [1, 1, 0]])
    each = f(X, target, mask, reduction="none")
    assert (each != 0).tolist() == [[False, True, False], [True, False, False]]


def test_a_bad_label_in_a_large_batch():
    """Many threads, a long row: no read beside the logits."""
    for rows, classes in ((3000, 50), (2, 300_000)):
        target = torch.zeros(rows, dtype=torch.long)
        target[rows - 1] = classes
        with pytest.raises(IndexError, match=rf"row \[{rows - 1}\].*got {classes}"):
            f(torch.zeros(rows, classes), target)


# --- the operators themselves ------------------------------------------------------------------


def call_op(**bad):
    arguments = {"logits": X, "target": Y, **bad}
    logits, target = arguments.pop("logits"), arguments.pop("target")
    return op(logits, target, **arguments)


def call_backward(function=backward, **bad):
    row, totals = torch.zeros(2, 3), torch.tensor([1.0, 5.0], dtype=torch.float64)
    arguments = {
        "grad_loss": torch.ones(()),
        **dict.fromkeys(("grad_lse", "grad_entropy", "grad_log_prob")),
        **{"row_sums": torch.zeros(2, 3, 2), "entropy": torch.zeros(0), "log_prob": row},
        **{"smooth_distance": torch.zeros(0), "totals": totals, "logits": X.clone(), "target": Y},
        **{"needs_token_weight": False, **bad},
    }
    return function(**arguments)


OP_ARGUMENTS = [
    ({"logits": X.long()}, "logits must be float16"),
    ({"target": Y.float()}, "target must be"),
    ({"target": Y[:1]}, "target must have the shape"),
    ({"mask": M[:1]}, "mask must have the shape"),
    ({"mask": M.to(torch.complex64)}, "mask must be bool"),
    ({"weight": W.double()}, "weight must have the dtype of the loss, Float, got Double"),
    ({"weight": W[:3]}, "weight must have one entry per class"),
    ({"token_weight": Y}, "token_weight must be float16"),
    ({"segment_ids": M}, "segment_ids must be"),
    ({"temperature": torch.ones(1)}, f"temperature must be {ROWS_TOO}, got [1]"),
    ({"temperature": T[:, :1]}, f"temperature must be {ROWS_TOO}, got [2, 1]"),
    ({"label_smoothing": 2.0}, "label_smoothing must be in [0, 1]"),
    ({"label_smoothing": math.nan}, "label_smoothing must be in [0, 1], got nan"),
    *(
        ({name: value}, f"{name} must be finite and not negative, got {text}")
        for name in ("softcap", "z_loss", "focal_gamma")
        for value, text in ((-1.0, "-1"), (math.inf, "inf"), (math.nan, "nan"))
    ),
    *(
        (
            {"temperature": torch.tensor(value)},
            f"temperature must be positive and finite, got {text}",
        )
        for value, text in ((0.0, "0"), (-1.0, "-1"), (math.inf, "inf"), (math.nan, "nan"))
    ),
    ({"shift": -1}, "shift must not be negative"),
    ({"reduction": "max"}, "reduction must be mean, sum or none, got max"),
    ({"schedule": torch.zeros(4)}, "schedule must be float64 [4] on the CPU, got [4]"),
    ({"schedule": torch.zeros(3).double()}, "schedule must be float64 [4] on the CPU, got [3]"),
    ({"schedule": torch.full((4,), 2.0).double()}, "label_smoothing must be in [0, 1], got 2"),
]
BACKWARD_ARGUMENTS = [
    ({"grad_loss": torch.ones(2)}, "grad_loss must be a number"),
    ({"grad_loss": torch.ones((), dtype=torch.float64)}, "grad_loss must have the dtype"),
    ({"grad_loss": torch.ones(()), "reduction": "none"}, "grad_loss must have the shape"),
    ({"grad_lse": torch.ones(3)}, "grad_lse must have the shape"),
    ({"grad_entropy": torch.ones(3)}, "grad_entropy must have the shape"),
    ({"grad_entropy": torch.ones(2, 3)}, "entropy must have the shape"),
    ({"grad_log_prob": torch.ones(3)}, "grad_log_prob must have the shape"),
    ({"row_sums": torch.ones(2, 3)}, "row_sums must be what the forward returned, Float [..., 2]"),
    ({"row_sums": torch.ones(2, 3, 2).double()}, "row_sums must be what the forward returned"),
    ({"log_prob": torch.ones(0)}, "log_prob must have the shape"),
    ({"log_prob": torch.ones(2, 3).double()}, "log_prob must have the dtype of the loss"),
    ({"label_smoothing": 0.1}, "smooth_distance must have the shape"),
    # Checked where the option is off, too.
    ({"entropy": torch.ones(3)}, "entropy must have the shape"),
    ({"smooth_distance": torch.ones(1)}, "smooth_distance must have the shape"),
    ({"totals": torch.ones(2)}, "totals must be what the forward returned, Double [2], got Float"),
    ({"totals": torch.ones(()).double()}, "totals must be what the forward returned, Double [2]"),
]
BOTH_BACKWARDS = pytest.mark.parametrize(
    "function,name",
    [
        (backward, "_masked_cross_entropy_backward"),
        (backward_in_place, "_masked_cross_entropy_backward_"),
    ],
    ids=["backward", "in_place"],
)


@pytest.mark.parametrize("bad,text", OP_ARGUMENTS)
def test_operator_called_directly(bad, text):
    check(lambda: call_op(**bad), ValueError, "masked_cross_entropy: " + text)


@BOTH_BACKWARDS
@pytest.mark.parametrize("bad,text", OP_ARGUMENTS + BACKWARD_ARGUMENTS)
def test_backward_operators_called_directly(function, name, bad, text):
    check(lambda: call_backward(function, **bad), ValueError, f"{name}: {text}")


@BOTH_BACKWARDS
def test_backward_operators_read_no_bad_label(function, name):
    """A label that the forward would have refused, or that was changed meanwhile."""
    for label in (5, -3, 2**40):
        target = Y.clone()
        target[1, 1] = label
        try:
            call_backward(function, target=target)
        except IndexError as error:
            assert "target" in str(error)


@pytest.mark.parametrize("name", ["target", "mask", "weight", "token_weight", "segment_ids"])
def test_operators_refuse_a_meta_tensor_among_others(name):
    value = W.to("meta") if name == "weight" else META
    value = value.long() if name in ("target", "segment_ids") else value
    for call in (call_op, call_backward):
        check(lambda c=call: c(**{name: value}), ValueError, "device", "meta")


@pytest.mark.parametrize("value,text", [(-1.0, "-1"), (math.nan, "nan"), (math.inf, "inf")])
def test_a_normalizer_that_is_read_is_checked(value, text):
    rule = f"masked_cross_entropy: normalizer must be finite and not negative, got {text}"
    value = torch.tensor(value)
    check(lambda: call_op(normalizer=value), ValueError, rule)
    for fused in (sweep_op, sweep_in_place):
        x = X.clone()
        check(lambda f=fused, x=x: f(x, Y, normalizer=value), ValueError, rule)
        assert x.equal(X)


def overlapping():
    """Logits whose rows share memory, as [2, 3, 5]."""
    return [torch.zeros(3, 5).expand(2, 3, 5), torch.zeros(40).as_strided((2, 3, 5), (9, 3, 1))]


@pytest.mark.parametrize("x", overlapping(), ids=["expanded", "overlapping"])
def test_nothing_is_written_over_memory_that_rows_share(x):
    rule = "must not be expanded or overlap to be written over"
    check(lambda: call_backward(backward_in_place, logits=x), ValueError, f"logits {rule}")
    check(lambda: sweep_in_place(x, Y), ValueError, f"logits {rule}")
    one = torch.ones(())
    check(lambda: scale(x, one), ValueError, f"grad_logits {rule}")
    column = torch.zeros(2, 5, 3).transpose(1, 2)
    rule = "must be contiguous in the last dimension to be written over, got a stride of 3"
    check(lambda: call_backward(backward_in_place, logits=column), ValueError, f"logits {rule}")
    check(lambda: sweep_in_place(column, Y), ValueError, f"logits {rule}")
    check(lambda: scale(column, one), ValueError, f"grad_logits {rule}")


def test_any_strides_are_read():
    x, w = torch.randn(2, 5, 3).transpose(1, 2), torch.rand(10)[::2]
    results = call_op(logits=x, weight=w, statistics=True)
    expected = call_op(logits=x.contiguous(), weight=w.contiguous(), statistics=True)
    assert all(map(torch.equal, results, expected))
    saved = dict(zip(("entropy", "log_prob"), results[2:4], strict=True), row_sums=results[8])
    saved["totals"] = results[7]
    grads = [call_backward(logits=a, weight=b, **saved) for a, b in ((x, w), (x.contiguous(), w))]
    assert grads[0][0].equal(grads[1][0]) and grads[0][0].any()
