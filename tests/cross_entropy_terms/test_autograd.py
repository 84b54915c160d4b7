# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy_terms: numeric derivatives, the second one, torch.func, forward mode."""

import pytest
import torch
from cases_terms import BY_NAME, DIFFERENTIABLE, Case, make
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from masked_loss_ext import reference
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

SMALL = Case("small", "", (2, 5, 4), spread=1.0)
OPTIONS = {
    "all": {},
    "t1": {"temperature": None},
    "scaled_only": {"unscaled": False},
    "no_links": {"links": None},
    "no_classes": {"classes": None},
}


def arguments_of(name, dtype=torch.float64):
    arguments = {**make(SMALL, dtype), **OPTIONS[name]}
    if name == "scaled_only":
        arguments |= {"classes": None, "links": None}
    return arguments


def as_function(f, arguments):
    """The differentiable terms as a function of the logits."""
    rest = {k: v for k, v in arguments.items() if k not in ("logits", "target", "mask")}

    def function(logits, target=arguments["target"], mask=arguments["mask"]):
        terms = f(logits, target, mask, **rest)._asdict()
        return tuple(terms[n] for n in DIFFERENTIABLE if terms[n] is not None)

    return function


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    arguments = arguments_of(name)
    x = arguments["logits"].requires_grad_()
    function = as_function(cross_entropy_terms, arguments)
    assert gradcheck(function, x)
    assert gradgradcheck(function, x, fast_mode=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_second_derivative_is_the_references(name):
    arguments = arguments_of(name)

    def second(f):
        x = arguments["logits"].detach().requires_grad_()
        total = sum((i + 1) * t.square().sum() for i, t in enumerate(as_function(f, arguments)(x)))
        (grad,) = torch.autograd.grad(total, x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(*map(second, (cross_entropy_terms, reference.cross_entropy_terms)))


@pytest.mark.parametrize("name", OPTIONS)
def test_torch_func(name):
    arguments = arguments_of(name)
    ours, theirs = (
        as_function(f, arguments) for f in (cross_entropy_terms, reference.cross_entropy_terms)
    )
    x = arguments["logits"]
    total = lambda f: lambda x: sum(t.sum() for t in f(x))  # noqa: E731
    torch.testing.assert_close(torch.func.grad(total(ours))(x), torch.func.grad(total(theirs))(x))
    direction = torch.randn_like(x)
    for function in (torch.func.jvp, torch.autograd.functional.jvp):
        values, tangents = function(ours, (x,), (direction,))
        expected = torch.func.jvp(theirs, (x,), (direction,))
        torch.testing.assert_close((values, tangents), expected)
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(x, direction))
        for term, tangent in zip(dual, expected[1], strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(term).tangent, tangent)


@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_is_a_loop(name):
    arguments = arguments_of(name)
    function = as_function(cross_entropy_terms, arguments)
    x = torch.stack([arguments["logits"], -arguments["logits"]])
    mask = torch.stack([arguments["mask"], ~arguments["mask"]])
    together = torch.vmap(lambda x, m: function(x, mask=m))(x, mask)
    apart = [function(a, mask=m) for a, m in zip(x, mask, strict=True)]
    for ours, theirs in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


def test_no_gradient_is_asked_for():
    arguments = make(BY_NAME["all"], torch.float32)
    function = as_function(cross_entropy_terms, arguments)
    assert not any(term.requires_grad for term in function(arguments["logits"]))
    x = arguments["logits"].clone().requires_grad_()
    with torch.no_grad():
        assert not any(term.requires_grad for term in function(x))
    assert all(term.requires_grad for term in function(x))


def test_gradients_arrive_expanded_or_not_at_all():
    arguments = make(BY_NAME["all"], torch.float32)
    x = arguments["logits"].requires_grad_()
    terms = as_function(cross_entropy_terms, arguments)(x)
    one = torch.ones(())
    for term in terms:
        grads = [
            torch.autograd.grad(term, x, g, retain_graph=True)[0]
            for g in (one.expand(term.shape), torch.ones_like(term))
        ]
        assert torch.equal(*grads)


def test_logits_changed_in_place_are_noticed():
    arguments = make(BY_NAME["all"], torch.float32)
    leaf = arguments["logits"].requires_grad_()
    x = leaf * 1
    terms = as_function(cross_entropy_terms, arguments)(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        terms[0].sum().backward()
