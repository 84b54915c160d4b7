# SPDX-License-Identifier: BSD-3-Clause
"""Bad input: the text names function, argument, rule and what was got, as the caller calls them."""

import math

import pytest
import torch

import masked_loss_ext as mle
from tests.elementwise.test_errors import check

H = torch.zeros(2, 3, 4)
HEAD, B = torch.zeros(5, 4), torch.zeros(5)
Y = torch.zeros(2, 3, dtype=torch.long)
M, T, W = torch.ones(2, 3), torch.ones(2, 3), torch.ones(5)
META = torch.zeros(2, 3, device="meta")
f, statistics = mle.masked_linear_cross_entropy, mle.linear_row_statistics
op = torch.ops.masked_loss_ext.linear_cross_entropy
backward = torch.ops.masked_loss_ext._linear_cross_entropy_backward
sweep_op = torch.ops.masked_loss_ext._linear_cross_entropy_sweep

LAYER = [
    ({"hidden": [[1.0]]}, TypeError, "hidden", "torch.Tensor", "got list"),
    ({"hidden": None}, TypeError, "hidden", "torch.Tensor", "got NoneType"),
    ({"weight": [[1.0]]}, TypeError, "weight", "torch.Tensor", "got list"),
    ({"weight": None}, TypeError, "weight", "torch.Tensor", "got NoneType"),
    ({"bias": [1.0]}, TypeError, "bias", "torch.Tensor", "got list"),
    ({"hidden": H.long()}, ValueError, "hidden", "floating", "got torch.int64"),
    ({"hidden": H.bool()}, ValueError, "hidden", "floating", "got torch.bool"),
    ({"hidden": H.to(torch.complex64)}, ValueError, "hidden", "floating", "torch.complex64"),
    ({"hidden": H.to(torch.float8_e5m2)}, ValueError, "hidden", "float16, bf", "float8_e5m2"),
    ({"weight": HEAD.long()}, ValueError, "weight", "floating", "got torch.int64"),
    ({"bias": B.long()}, ValueError, "bias", "floating", "got torch.int64"),
    ({"hidden": torch.tensor(1.0)}, ValueError, "hidden", "be [..., D]", "got []"),
    ({"hidden": H[..., :3]}, ValueError, "weight", "the D of hidden [2, 3, 3]", "got [5, 4]"),
    ({"weight": HEAD[:, :3]}, ValueError, "weight", "the D of hidden [2, 3, 4]", "got [5, 3]"),
    ({"weight": HEAD.T}, ValueError, "weight", "[V, D]", "got [4, 5]"),
    ({"weight": HEAD[0]}, ValueError, "weight", "[V, D]", "got [4]"),
    ({"weight": HEAD[None]}, ValueError, "weight", "[V, D]", "got [1, 5, 4]"),
    ({"weight": HEAD[:0]}, ValueError, "weight", "at least one class", "got [0, 4]"),
    ({"bias": B[:4]}, ValueError, "bias", "one entry per class [5]", "got [4]"),
    ({"bias": torch.zeros(6)}, ValueError, "bias", "one entry per class [5]", "got [6]"),
    ({"bias": B[None]}, ValueError, "bias", "one entry per class [5]", "got [1, 5]"),
    ({"bias": torch.tensor(0.0)}, ValueError, "bias", "one entry per class [5]", "got []"),
    ({"weight": HEAD.to("meta")}, ValueError, "weight", "on the device of hidden (cpu)", "meta"),
    ({"bias": B.to("meta")}, ValueError, "bias", "on the device of hidden (cpu)", "got meta"),
    ({"hidden": H.to("meta")}, ValueError, "weight", "on the device of hidden (meta)", "got cpu"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows", "at least 1", "got 0"),
    ({"chunk_rows": -3}, ValueError, "chunk_rows", "at least 1", "got -3"),
    ({"chunk_rows": 2.0}, TypeError, "chunk_rows", "an int", "got float"),
    ({"chunk_rows": True}, TypeError, "chunk_rows", "an int", "got bool"),
    ({"num_valid": -1}, ValueError, "num_valid", "not be negative", "got -1"),
    ({"num_valid": 2.0}, TypeError, "num_valid", "an int", "got float"),
    ({"num_valid": 5}, ValueError, "num_valid", "at least the number of rows that count, 6", "5"),
    ({"logits_dtype": torch.float16}, ValueError, "logits_dtype", "None, torch.float32", "float16"),
    ({"logits_dtype": torch.float64}, ValueError, "logits_dtype", "None, torch.float32", "float64"),
    ({"logits_dtype": "float32"}, ValueError, "logits_dtype", "None, torch.float32", "got float32"),
]
ROWS = [
    ({"target": [0]}, TypeError, "target", "torch.Tensor", "got list"),
    ({"mask": [True]}, TypeError, "mask", "torch.Tensor", "got list"),
    ({"target": Y.float()}, ValueError, "target", "int64", "Float"),
    ({"target": Y.bool()}, ValueError, "target", "int64", "Bool"),
    ({"target": Y[:, :2]}, ValueError, "target", "shape of hidden [2, 3, 4]", "got [2, 2]"),
    ({"target": Y[:, :1]}, ValueError, "target", "shape of hidden", "got [2, 1]"),
    ({"target": Y[..., None]}, ValueError, "target", "without the last", "got [2, 3, 1]"),
    ({"target": META.long()}, ValueError, "target", "on the device of hidden", "meta"),
    ({"mask": M[:, :2]}, ValueError, "mask", "shape of hidden [2, 3, 4]", "got [2, 2]"),
    ({"mask": M[0]}, ValueError, "mask", "shape of hidden", "got [3]"),
    ({"mask": H}, ValueError, "mask", "without the last dimension", "got [2, 3, 4]"),
    ({"mask": M.to(torch.complex64)}, ValueError, "mask", "bool, integer", "complex64"),
    ({"mask": M - 2}, ValueError, "mask", "on where it is not 0", "additive mask"),
    ({"mask": META}, ValueError, "mask", "on the device of hidden", "meta"),
    ({"temperature": 0}, ValueError, "temperature", "above 0", "got 0"),
    ({"temperature": -1.0}, ValueError, "temperature", "above 0", "got -1"),
    ({"temperature": math.nan}, ValueError, "temperature", "above 0", "got nan"),
    ({"temperature": torch.tensor(-2.0)}, ValueError, "temperature", "positive", "got -2"),
    ({"temperature": torch.ones(3)}, ValueError, "temperature", "", "got [3]"),
    ({"temperature": torch.ones(2, 2)}, ValueError, "temperature", "", "got [2, 2]"),
    ({"temperature": "hot"}, TypeError, "temperature", "number", "got str"),
    ({"temperature": True}, TypeError, "temperature", "number", "got bool"),
    ({"softcap": 0.0}, ValueError, "softcap", "above 0", "got 0"),
    ({"softcap": "a"}, TypeError, "softcap", "number", "got str"),
    ({"ignore_index": None}, TypeError, "ignore_index", "an int", "got NoneType"),
    ({"ignore_index": 2**70}, ValueError, "ignore_index", "fit in 64 bits", f"got {2**70}"),
]
SIX = "mean, sum, none, sequence_mean, sequence_sum or weighted_mean"
LOSS = [
    ({"target": None}, TypeError, "target", "torch.Tensor", "got NoneType"),
    ({"class_weight": [1.0]}, TypeError, "class_weight", "torch.Tensor", "got list"),
    ({"class_weight": W[:4]}, ValueError, "class_weight", "one entry per class [5]", "got [4]"),
    ({"class_weight": torch.ones(6)}, ValueError, "class_weight", "per class [5]", "got [6]"),
    ({"class_weight": W[None]}, ValueError, "class_weight", "per class [5]", "got [1, 5]"),
    ({"class_weight": W.to(torch.complex64)}, ValueError, "class_weight", "float", "complex64"),
    ({"class_weight": W.to("meta")}, ValueError, "class_weight", "on the device of", "meta"),
    ({"class_weight": W.clone().requires_grad_()}, ValueError, "class_weight", "detach", ""),
    ({"token_weight": T[:, :2]}, ValueError, "token_weight", "shape of hidden", "got [2, 2]"),
    ({"token_weight": Y}, ValueError, "token_weight", "float16", "Long"),
    ({"token_weight": META}, ValueError, "token_weight", "on the device of hidden", "meta"),
    ({"segment_ids": M}, ValueError, "segment_ids", "int64", "Float"),
    ({"segment_ids": Y[:, :2]}, ValueError, "segment_ids", "shape of hidden", "got [2, 2]"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing", "at most 1", "got 1.5"),
    ({"label_smoothing": None}, TypeError, "label_smoothing", "number", "got NoneType"),
    ({"z_loss": -1e-4}, ValueError, "z_loss", "at least 0", "got -0.0001"),
    ({"focal_gamma": math.inf}, ValueError, "focal_gamma", "finite", "got inf"),
    ({"shift": -1}, ValueError, "shift", "not be negative", "got -1"),
    ({"shift": 1.5}, TypeError, "shift", "an int", "got float"),
    ({"reduction": "avg"}, ValueError, "reduction", SIX, "got 'avg'"),
    ({"reduction": None}, ValueError, "reduction", SIX, "got None"),
    ({"reduction": "weighted_mean"}, ValueError, "token_weight", "given", "None"),
    ({"normalizer": torch.ones(2)}, ValueError, "normalizer", "number", "got [2]"),
    ({"normalizer": -3}, ValueError, "normalizer", "at least 0", "got -3"),
    ({"normalizer": 3, "reduction": "sum"}, ValueError, "normalizer", "means", "sum"),
    ({"return_stats": "no"}, TypeError, "return_stats", "a bool", "got"),
]


def arguments(bad):
    return {"hidden": H, "weight": HEAD, "target": Y, "mask": M, **bad}


@pytest.mark.parametrize("bad,kind,name,rule,got", LAYER + ROWS + LOSS)
def test_masked_linear_cross_entropy(bad, kind, name, rule, got):
    """In inference, in training by the sweep, and by the operator."""
    text = f"masked_linear_cross_entropy: {name} must "
    for how in ({}, {"reduction": "none"}, {"return_stats": True}):
        if set(how) & set(bad) or (how and "normalizer" in bad):
            continue
        given = arguments(bad) | how
        check(lambda given=given: f(**given), kind, text, rule, got)
        if bad.get("hidden", H) is H and bad.get("weight", HEAD) is HEAD:
            given |= {"hidden": H.clone().requires_grad_(), "weight": HEAD.clone().requires_grad_()}
            check(lambda given=given: f(**given), kind, text, rule, got)


@pytest.mark.parametrize("bad,kind,name,rule,got", LAYER + ROWS)
def test_linear_row_statistics(bad, kind, name, rule, got):
    check(
        lambda: statistics(**arguments(bad)),
        kind,
        f"linear_row_statistics: {name} must ",
        rule,
        got,
    )


SEEN_BY_PYTHON = [
    case
    for case in LAYER + ROWS + LOSS
    if case[2] not in ("num_valid", "logits_dtype")
    and not any(isinstance(v, (str, list)) for v in case[0].values())
    and "additive" not in case[4]
    and case[4] not in ("got -2", "meta", "got meta", "Long", "Float", "Bool")
    and case[0].get("hidden", H) is H
]


@pytest.mark.parametrize("bad,kind,name,rule,got", SEEN_BY_PYTHON)
def test_under_torch_func(bad, kind, name, rule, got):
    """Plain PyTorch would broadcast, or say it in its own words."""

    def loss(h):
        return f(**{**arguments(bad), "hidden": h}).sum()

    check(lambda: torch.func.grad(loss)(H), kind, f"masked_linear_cross_entropy: {name}", rule, got)


@pytest.mark.parametrize(
    "bad",
    [
        {"weight": HEAD[:, :3]}, {"bias": B[:4]}, {"class_weight": W[:4]}, {"target": Y[:, :2]},
        {"mask": M[0]}, {"token_weight": T[:, :2]}, {"chunk_rows": 0}, {"num_valid": -1},
        {"z_loss": math.nan}, {"shift": 1.5},
    ],
)  # fmt: skip
def test_under_torch_compile(bad):
    """PyTorch chooses the kind of error and may add to the text."""
    compiled = torch.compile(
        lambda h: f(**{**arguments(bad), "hidden": h}), fullgraph=True, backend="aot_eager"
    )
    (name,) = bad
    with pytest.raises(Exception, match=f"masked_linear_cross_entropy: {name} must "):
        compiled(H)
    torch._dynamo.reset()


def test_a_temperature_per_row_of_the_wrong_shape():
    for temperature in (torch.ones(2, 4), torch.ones(3), torch.ones(2, 3, 1)):
        for function in (f, statistics):
            check(
                lambda fn=function, t=temperature: fn(H, HEAD, Y, temperature=t),
                ValueError,
                "temperature must",
                f"got {list(temperature.shape)}",
            )


@pytest.mark.parametrize("argument", ["hidden", "weight", "target", "mask", "class_weight"])
@pytest.mark.parametrize("kind", ["jagged", "sparse"])
def test_nested_and_sparse_tensors(argument, kind):
    value = {"hidden": H, "weight": HEAD, "target": Y, "mask": M, "class_weight": W}[argument]
    if kind == "sparse":
        value, what = value.to_sparse(), "dense tensor, got layout"
    else:
        value = torch.nested.nested_tensor([value, value], layout=torch.jagged)
        what = "plain tensor, got a nested"
    given = arguments({argument: value})
    check(lambda: f(**given), ValueError, f"cross_entropy: {argument} must be a {what}")


def test_num_valid_at_least_what_counts():
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    for n in (3, 4, 6, 1000, 2**40):
        assert torch.equal(f(H, HEAD, Y, mask, num_valid=n), f(H, HEAD, Y, mask))
    for h in (H, H.clone().requires_grad_()):
        for how in ({}, {"reduction": "none"}):
            text = "num_valid must be at least the number of rows that count, 3, got 2"
            check(lambda h=h, how=how: f(h, HEAD, Y, mask, num_valid=2, **how), ValueError, text)
    check(
        lambda: statistics(H, HEAD, Y, mask, num_valid=0), ValueError, "row_statistics: num_valid"
    )


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [5, -1, -101, 2**40, -(2**63)])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"return_stats": True}], ids=str)
def test_the_row_of_a_bad_label_is_the_callers(label, options):
    """Not that of the rows side by side, of which the first four are left out."""
    target, mask = Y.clone(), torch.tensor([[0, 0, 0], [0, 1, 1]])
    target[1, 2] = label
    for h in (H, H.clone().requires_grad_()):
        with pytest.raises(IndexError) as caught:
            f(h, HEAD, target, mask, chunk_rows=1, **options)
        text = f"target at row [1, 2] must be in [0, 5) or ignore_index -100, got {label}"
        assert str(caught.value) == f"masked_linear_cross_entropy: {text}"
    with pytest.raises(IndexError, match=r"^linear_row_statistics: target at row \[1, 2\]"):
        statistics(H, HEAD, target, mask)


def test_the_row_of_a_bad_label_with_a_shift():
    target = Y.clone()
    target[1, 2] = 9
    with pytest.raises(IndexError, match=r"target at row \[1, 2\] must be in \[0, 5\).*got 9"):
        f(H, HEAD, target, shift=1)
    assert f(H, HEAD, target, M * torch.tensor([1, 1, 0]), shift=1).isfinite()


def test_the_row_of_a_bad_label_in_other_ranks():
    for shape, at in (((7,), (3,)), ((2, 3, 4), (1, 2, 3)), ((), ())):
        target = torch.zeros(shape, dtype=torch.long)
        target[at] = 8
        index = ", ".join(map(str, at))
        with pytest.raises(IndexError, match=rf"row \[{index}\] must be"):
            f(torch.zeros(*shape, 4), HEAD, target)


def test_bad_labels_that_do_not_count():
    target = torch.tensor([[9, 1, -7], [0, -100, 2**40]])
    mask = torch.tensor([[0, 1, 0], [1, 1, 0]])
    for h in (H, H.clone().requires_grad_()):
        each = f(h, HEAD, target, mask, reduction="none")
        assert (each != 0).tolist() == [[False, True, False], [True, False, False]]
        assert f(h, HEAD, target, mask).item() == pytest.approx(math.log(5))


# --- the operators themselves ------------------------------------------------------------------

OP = [
    ({"hidden": H.long()}, "hidden must be float16"),
    ({"hidden": torch.tensor(1.0)}, "hidden must be [..., D], got []"),
    ({"linear_weight": HEAD.long()}, "weight must be float16"),
    ({"linear_weight": HEAD[:, :3]}, "weight must be [V, D] with at least one class"),
    ({"linear_weight": HEAD.double()}, "weight must have the dtype of hidden, Float, got Double"),
    ({"bias": B.double()}, "bias must have the dtype of hidden, Float, got Double"),
    ({"bias": B[:3]}, "bias must have one entry per class [5], got [3]"),
    ({"target": Y[:1]}, "target must have the shape of hidden"),
    ({"mask": M[:1]}, "mask must have the shape of hidden"),
    ({"weight": W.double()}, "class_weight must have the dtype of the loss, Float, got Double"),
    ({"weight": W[:3]}, "class_weight must have one entry per class"),
    ({"token_weight": T[:1]}, "token_weight must have the shape of hidden"),
    ({"temperature": torch.tensor(0.0)}, "temperature must be positive and finite, got 0"),
    ({"shift": -1}, "shift must not be negative"),
    ({"reduction": "max"}, "reduction must be mean, sum or none, got max"),
    ({"chunk_rows": 0}, "chunk_rows must be"),
    ({"num_valid": -1}, "num_valid must"),
    ({"num_valid": 2}, "num_valid must be at least the number of rows that count, 6, got 2"),
]


def call(function, bad):
    given = {"hidden": H, "linear_weight": HEAD, "bias": None, "target": Y, **bad}
    return function(**given)


def call_backward(bad):
    results = op(H, HEAD, None, Y)
    names = [r.name for r in op.default._schema.returns]
    given = dict(zip(names, results, strict=True))
    given |= dict.fromkeys(("grad_lse", "grad_entropy", "grad_log_prob"))
    given |= {"hidden": H, "linear_weight": HEAD, "bias": None, "target": Y}
    given |= {"grad_loss": torch.ones(()), **bad}
    wanted = [a.name for a in backward.default._schema.arguments]
    return backward(**{n: given[n] for n in wanted if n in given})


@pytest.mark.parametrize("bad,text", OP)
def test_operators_called_directly(bad, text):
    check(lambda: call(op, bad), ValueError, "masked_linear_cross_entropy: " + text)
    check(lambda: call(sweep_op, bad), ValueError, "masked_linear_cross_entropy: " + text)
    name = "_linear_cross_entropy_backward: "
    check(lambda: call_backward(bad), ValueError, name + text)


@pytest.mark.parametrize(
    "bad,text",
    [
        ({"grad_loss": torch.ones(2)}, "grad_loss must be a number"),
        ({"grad_lse": torch.ones(3)}, "grad_lse must have the shape of hidden"),
        ({"row_sums": torch.ones(2, 3)}, "row_sums must be what the forward returned"),
        ({"log_prob": torch.ones(0)}, "log_prob must have the shape"),
        ({"label_smoothing": 0.1}, "smooth_distance must have the shape"),
        ({"totals": torch.ones(2)}, "totals must be what the forward returned"),
    ],
)
def test_the_backward_operator_called_directly(bad, text):
    check(lambda: call_backward(bad), ValueError, f"_linear_cross_entropy_backward: {text}")


def test_the_sweep_of_what_it_does_not_make():
    for bad, text in (
        ({"target": None}, "target must be given for a gradient"),
        ({"reduction": "none"}, "reduction must be mean or sum"),
    ):
        check(lambda b=bad: call(sweep_op, b), ValueError, f"masked_linear_cross_entropy: {text}")


@pytest.mark.parametrize("name", ["linear_weight", "target", "mask", "weight", "token_weight"])
def test_operators_refuse_a_meta_tensor_among_others(name):
    value = {"linear_weight": HEAD, "weight": W, "target": Y}.get(name, T).to("meta")
    for function in (op, sweep_op):
        check(lambda fn=function: call(fn, {name: value}), ValueError, "device", "meta")
    check(lambda: call_backward({name: value}), ValueError, "device", "meta")
