# SPDX-License-Identifier: BSD-3-Clause
"""Bad input of cross_entropy_terms: the text names function, argument, rule and what was got."""

import pytest
import torch

from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms as f
from tests.elementwise.test_errors import check

op = torch.ops.masked_loss_ext.cross_entropy_terms
backward = torch.ops.masked_loss_ext._cross_entropy_terms_backward

X = torch.zeros(2, 3, 5)
Y = torch.zeros(2, 3, dtype=torch.long)
C = torch.zeros(2, 3, 4, dtype=torch.long)
L = torch.full((2, 3), -1, dtype=torch.int32)
META = torch.zeros(2, 3, device="meta")

BAD = [
    ({"logits": [[1.0]]}, TypeError, "logits", "torch.Tensor", "got list"),
    ({"target": None}, TypeError, "target", "torch.Tensor", "got NoneType"),
    ({"target": [0]}, TypeError, "target", "torch.Tensor", "got list"),
    ({"mask": [True]}, TypeError, "mask", "torch.Tensor", "got list"),
    ({"classes": [0]}, TypeError, "classes", "torch.Tensor", "got list"),
    ({"links": L}, TypeError, "links", "pair (context_before, ngram_after)", "got Tensor"),
    ({"links": (L, None)}, TypeError, "ngram_after", "torch.Tensor", "got NoneType"),
    ({"logits": X.long()}, ValueError, "logits", "float16, bfloat16, float32", "Long"),
    ({"logits": X[..., :0]}, ValueError, "logits", "at least one class", "got [2, 3, 0]"),
    ({"target": Y.float()}, ValueError, "target", "soft labels are not what", "Float"),
    ({"target": Y[:, :2]}, ValueError, "target", "shape of logits [2, 3, 5]", "got [2, 2]"),
    ({"mask": X}, ValueError, "mask", "without the last dimension", "got [2, 3, 5]"),
    ({"mask": -X[..., 0] - 1}, ValueError, "mask", "on where it is not 0", "additive"),
    ({"temperature": 0}, ValueError, "temperature", "above 0", "got 0"),
    ({"temperature": torch.tensor(-2.0)}, ValueError, "temperature", "positive", "got -2"),
    ({"temperature": torch.ones(3)}, ValueError, "temperature", "number", "got [3]"),
    ({"temperature": torch.ones(Y.shape)}, ValueError, "temperature", "number []", "got ["),
    ({"temperature": "hot"}, TypeError, "temperature", "number", "got str"),
    ({"classes": C[0]}, ValueError, "classes", "[..., K] with the leading", "got [3, 4]"),
    ({"classes": C[:, :1]}, ValueError, "classes", "leading dimensions", "got [2, 1, 4]"),
    ({"classes": C.float()}, ValueError, "classes", "int64", "Float"),
    ({"links": (L.long(), L)}, ValueError, "context_before", "int32", "Long"),
    ({"links": (L, L.long())}, ValueError, "ngram_after", "int32", "Long"),
    ({"links": (L, L[:1])}, ValueError, "ngram_after", "shape of logits", "got [1, 3]"),
    ({"classes": C, "unscaled": False}, ValueError, "classes and links", "None", "unscaled"),
    ({"links": (L, L), "unscaled": False}, ValueError, "classes and links", "None", "unscaled"),
    ({"target": META.long()}, ValueError, "all tensors", "one device", "cpu and meta"),
]


@pytest.mark.parametrize("bad,kind,name,rule,got", BAD)
def test_bad_arguments(bad, kind, name, rule, got):
    arguments = {"logits": X, "target": Y, **bad}
    text = f"cross_entropy_terms: {name}"
    check(lambda: f(**arguments), kind, text, " must ", rule, got)
    if bad.get("logits", X) is X:  # the way of training
        arguments["logits"] = X.clone().requires_grad_()
        check(lambda: f(**arguments), kind, text, rule, got)


def test_what_gets_no_gradient_may_not_ask_for_one():
    number = torch.tensor(2.0, requires_grad=True)
    check(lambda: f(X, Y, temperature=number), ValueError, "temperature", "require", "gradient")


def test_links_need_a_sequence():
    none = torch.tensor(-1, dtype=torch.int32)
    text = "logits must be [..., S, V] where links are given, got [5]"
    check(lambda: f(X[0, 0], Y[0, 0], links=(none, none)), ValueError, text)


def test_under_torch_func():
    """Where plain PyTorch stands in for the operator."""

    def checked(**bad):
        arguments = {"target": Y, **bad}
        return lambda: torch.func.grad(lambda x: f(x, **arguments).log_prob.sum())(X)

    check(checked(target=Y.float()), ValueError, "cross_entropy_terms: target", "integers")
    check(checked(target=Y[:1]), ValueError, "cross_entropy_terms: target", "shape of logits")
    check(checked(classes=C[0]), ValueError, "cross_entropy_terms: classes", "leading")
    check(checked(links=(L, L[0])), ValueError, "cross_entropy_terms: ngram_after", "shape")
    check(checked(classes=C, unscaled=False), ValueError, "unscaled is False")


@pytest.mark.parametrize("label", [5, -1, -101, 2**31 - 1, 2**62])
def test_a_bad_label_is_named(label):
    target, mask = Y.clone(), torch.ones(2, 3)
    target[1, 2] = label
    for x in (X, X.clone().requires_grad_()):
        with pytest.raises(IndexError) as caught:
            f(x, target)
        text = "cross_entropy_terms: target at row [1, 2] must be in [0, 5) or ignore_index -100, "
        assert str(caught.value) == f"{text}got {label}"
    mask[1, 2] = 0
    assert f(X, target, mask).log_prob[1, 2] == 0
    assert f(X, target, ignore_index=label).log_prob[1, 2] == 0


@pytest.mark.parametrize("asked", [5, 2**40])
def test_a_bad_class_is_named(asked):
    classes = C.clone()
    classes[1, 0, 3] = asked
    with pytest.raises(IndexError) as caught:
        f(X, Y, classes=classes)
    text = "cross_entropy_terms: classes at row [1, 0] must be below 5 (negative where none is "
    assert str(caught.value) == f"{text}asked for), got {asked}"
    assert f(X, Y, torch.zeros(2, 3), classes=classes).class_log_prob.eq(0).all()


def test_the_operators_themselves():
    sums = op(X, Y)[-1]
    none = (None,) * 5
    g = torch.ones(2, 3)
    check(lambda: op(X, Y, None, None, None, L), ValueError, "links must be a pair", "one of the")
    check(
        lambda: backward(g.double(), *none, X, Y, *none, sums, -100),
        ValueError, "grad_scaled_log_prob must have the dtype of the loss", "Double",
    )  # fmt: skip
    check(
        lambda: backward(g[:1], *none, X, Y, *none, sums, -100),
        ValueError, "grad_scaled_log_prob must have the shape of logits", "got [1, 3]",
    )  # fmt: skip
    check(
        lambda: backward(g, *none, X, Y, *none, sums[:1], -100),
        ValueError, "sums must be what the forward returned", "got Double [1, 3, 4]",
    )  # fmt: skip
    check(
        lambda: backward(None, None, None, None, g, None, X, Y, *none, sums, -100),
        ValueError, "grad_class_log_prob must be None without classes",
    )  # fmt: skip
