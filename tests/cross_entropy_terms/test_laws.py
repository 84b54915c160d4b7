# SPDX-License-Identifier: BSD-3-Clause
"""What the mask drops changes no bit; rows and threads do not know each other; large numbers,
banned classes, classes that coincide."""

import pytest
import torch
from accuracy import assert_same_bits
from cases_terms import BY_NAME, assert_agrees, evaluate, make

from masked_loss_ext import reference
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms as f

NAN, INF = float("nan"), float("inf")


def on_of(arguments):
    on = arguments["target"].long() != arguments["ignore_index"]
    return on if "mask" not in arguments else on & arguments["mask"]


def assert_all_same(results, expected):
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert_same_bits(result, expected[name], name)


@pytest.mark.parametrize("name", ["all", "t1", "ignored", "uint8", "scaled_only", "many_rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_that_do_not_count_change_no_bit(name, dtype):
    arguments = make(BY_NAME[name], dtype)
    expected = evaluate(f, arguments)
    on = on_of(arguments)
    for value in (NAN, INF, -INF):
        bad = {**arguments, "logits": arguments["logits"].masked_fill(~on[..., None], value)}
        if arguments["target"].dtype == torch.int64:
            bad["target"] = arguments["target"].masked_fill(~on & arguments["mask"].eq(0), 2**31)
        if "classes" in bad:
            bad["classes"] = arguments["classes"].masked_fill(~on[..., None], 10**9)
        results = evaluate(f, bad)
        assert_all_same(results, expected)
        for result in results.values():
            assert not result[~on].any()


@pytest.mark.parametrize("name", ["all", "t1", "long_chains", "many_rows", "v4097"])
def test_bits_do_not_depend_on_threads(name):
    arguments = make(BY_NAME[name], torch.float32)
    torch.set_num_threads(1)
    expected = evaluate(f, arguments)
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert_all_same(evaluate(f, arguments), expected)


def test_a_row_does_not_depend_on_the_others():
    arguments = make(BY_NAME["v2049"], torch.float32)
    arguments.pop("links")
    together = evaluate(f, arguments)
    for t in range(arguments["target"].shape[-1]):
        per_row = ("logits", "target", "mask", "classes")
        alone = {n: a[:, t : t + 1] if n in per_row else a for n, a in arguments.items()}
        upstream = None
        for name, result in evaluate(f, alone, upstream).items():
            if name != "grad logits":  # its incoming gradients are others
                assert_same_bits(result, together[name][:, t : t + 1], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_a_constant_changes_nothing(dtype, temperature):
    """Integers stay exact at 2^20, so every term keeps its digits."""
    arguments = make(BY_NAME["all"], dtype)
    arguments.update(logits=arguments["logits"].round(), temperature=temperature)
    expected = evaluate(f, arguments)
    arguments["logits"] = arguments["logits"] + 2.0**20
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    for name, result in evaluate(f, arguments).items():
        torch.testing.assert_close(result, expected[name], rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_classes_that_coincide_are_written_once(dtype):
    """Label, classes asked for (twice) and candidate in one place; rounded once."""
    target = torch.tensor([[0, 1, 0, 2]])
    links = [torch.tensor([x], dtype=torch.int32) for x in ([-1, -1, -1, 1], [4, 4, 4, 4])]
    arguments = {
        "logits": torch.randn(1, 4, 5).to(dtype),
        "target": target,
        "classes": torch.tensor([[[0, 0, 0, -1], [1, 3, 1, 3], [2, 2, -1, -5], [1, 2, 1, 2]]]),
        "links": links,
        "temperature": 0.9,
    }
    results = evaluate(f, arguments)
    assert results["candidates"].tolist() == [[0, 0, 0, 1]]
    assert_agrees(results, arguments, "coincide")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_banned_classes(dtype):
    """Their probability and gradient are 0; asked for, as label or candidate, ln 0 is -inf."""
    x = torch.randn(1, 4, 40).to(dtype)
    x[..., 3:9] = -INF
    x[0, 1, 1] = -INF  # the label
    x[0, 3, 1] = -INF  # the candidate
    x.requires_grad_()
    target = torch.tensor([[0, 1, 0, 2]])
    links = [torch.tensor([x], dtype=torch.int32) for x in ([-1, -1, -1, 1], [4, 4, 4, 4])]
    terms = f(x, target, temperature=0.8, classes=torch.full((1, 4, 1), 5), links=links)
    assert terms.class_log_prob.tolist() == [[[-INF]] * 4]
    assert terms.log_prob[0, 1] == terms.scaled_log_prob[0, 1] == -INF
    assert terms.log_prob[0, [0, 2, 3]].isfinite().all() and terms.entropy.isfinite().all()
    assert terms.candidates[0, 3] == 1 and terms.unlikelihood[0, 3] == 0
    total = sum(term.sum() for term in terms if term.requires_grad)
    (grad,) = torch.autograd.grad(total, x)
    assert grad.isfinite().all() and not grad[x == -INF].any()


@pytest.mark.parametrize("temperature", [None, 0.8])
def test_blocks_of_nothing_but_banned_classes(temperature):
    """Before there is any maximum, and after."""
    arguments = make(BY_NAME["v4097"], torch.float32)
    arguments |= {"temperature": temperature, "target": arguments["target"] + 2500}
    arguments["classes"] = arguments["classes"].add(2500)
    for banned in (slice(0, 2300), slice(4000, 4097)):
        arguments["logits"][..., banned] = -INF
        assert_agrees(evaluate(f, arguments), arguments, f"{banned}")


def test_nothing_left_in_a_row():
    """A counted row of -inf alone has no softmax: NaN, and a gradient of 0."""
    x = torch.full((2, 5), -INF)
    x[1] = 0.0
    x.requires_grad_()
    terms = f(x, torch.tensor([0, 0]))
    assert terms.log_prob[0].isnan() and terms.entropy[0].isnan()
    assert terms.log_prob[1].isfinite()
    (grad,) = torch.autograd.grad(terms.log_prob.sum(), x)
    assert not grad[0].any() and grad[1].any()


def test_nan_at_a_counted_row_shows():
    arguments = make(BY_NAME["no_mask"], torch.float32)
    arguments["logits"][0, 3, 7] = NAN
    results = evaluate(f, arguments)
    for name in ("scaled_log_prob", "scaled_mean_log_prob", "log_prob", "entropy"):
        assert results[name].isnan().sum() == 1 and results[name][0, 3].isnan(), name
    assert results["grad logits"][0, 3].isnan().all()
    assert results["grad logits"].isnan().sum() == 37


def test_links_that_lead_nowhere():
    """Whatever they hold, nothing outside the sequence is read and the walk ends."""
    g = torch.Generator().manual_seed(3)
    arguments = make(BY_NAME["no_mask"], torch.float64)
    shape = arguments["target"].shape
    for low, high in ((-5, 30), (-(2**31), 2**31 - 1), (0, 12)):
        before, after = (
            torch.randint(low, high, shape, generator=g, dtype=torch.int32) for _ in range(2)
        )
        arguments["links"] = before, after
        ours = f(arguments["logits"], arguments["target"], links=(before, after))
        theirs = reference.cross_entropy_terms(
            arguments["logits"], arguments["target"], links=(before, after)
        )
        torch.testing.assert_close(ours.unlikelihood, theirs.unlikelihood)
        assert torch.equal(ours.candidates, theirs.candidates)


def test_nothing_counts_keeps_the_graph():
    x = torch.full((2, 3, 5), NAN, requires_grad=True)
    terms = f(x, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))
    assert all(term.requires_grad and not term.any() for term in terms[:4])
    sum(term.sum() for term in terms[:4]).backward()
    assert not x.grad.any()


def test_a_large_gradient_in_fresh_memory():
    """Pages that nobody has touched are not written where the mask drops rows: they must be 0."""
    x = torch.randn(96, 50257, requires_grad=True)
    target, mask = torch.arange(96), torch.arange(96) % 3 > 0
    terms = f(x, target, mask, temperature=0.9)
    (grad,) = torch.autograd.grad(terms.scaled_log_prob.sum() + terms.entropy.sum(), x)
    assert not grad[~mask].any()
    assert grad[mask].ne(0).all(-1).all()
    assert grad[mask].sum(-1).abs().max() < 1e-4  # a softmax does not see a constant
