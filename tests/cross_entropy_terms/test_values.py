# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy_terms on paper, and every case of the table against the reference.

On paper the logits are logarithms of small numbers, so that every probability is a fraction; at
temperature 1/2 the numbers are squared:

    e^logit    sum   p                  squares    sum   q                  label
    1, 1, 2      4   1/4, 1/4, 1/2      1, 1, 4      6   1/6, 1/6, 2/3      2
    6, 1, 1      8   3/4, 1/8, 1/8      36, 1, 1    38   18/19, 1/38, 1/38  1

A third row of NaN is masked out.
"""

from math import log, nan

import pytest
import torch
from accuracy import assert_same_bits
from cases_terms import BY_NAME, CASES, FLOATING, assert_agrees, evaluate, links_of, make

from masked_loss_ext import reference
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms
from masked_loss_ext.ops.repetition import repetition_links

ODDS = torch.tensor([[1.0, 1, 2], [6, 1, 1], [nan, nan, nan]], dtype=torch.float64)
TARGET, MASK = torch.tensor([2, 1, 77]), torch.tensor([True, True, False])
BOTH = pytest.mark.parametrize(
    "f", [cross_entropy_terms, reference.cross_entropy_terms], ids=["native", "reference"]
)


def logits():
    return ODDS.log().requires_grad_()


def check(actual, expected, rtol=1e-13):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach(), expected, rtol=rtol, atol=rtol)


@BOTH
def test_terms_on_paper(f):
    classes = torch.tensor([[0, 2, -1], [0, -1, 0], [1, 1, 1]])
    terms = f(logits(), TARGET, MASK, temperature=0.5, classes=classes)
    check(terms.scaled_log_prob, [log(2 / 3), log(1 / 38), 0])
    mean = [(2 * log(1 / 6) + log(2 / 3)) / 3, (log(18 / 19) + 2 * log(1 / 38)) / 3, 0]
    check(terms.scaled_mean_log_prob, mean)
    check(terms.log_prob, [-log(2), -log(8), 0])
    check(terms.entropy, [1.5 * log(2), 0.75 * log(4 / 3) + 0.25 * log(8), 0])
    check(terms.class_log_prob, [[-log(4), -log(2), 0], [log(3 / 4), 0, log(3 / 4)], [0, 0, 0]])
    assert terms.unlikelihood is None and terms.candidates is None
    alone = f(logits(), TARGET, MASK, temperature=0.5, unscaled=False)
    check(alone.scaled_log_prob, [log(2 / 3), log(1 / 38), 0])
    check(alone.scaled_mean_log_prob, mean)
    assert alone[2:] == (None,) * 5


@BOTH
def test_gradients_on_paper(f):
    """Each of the first row alone; [j = y] - p and its like."""

    def gradient(term, **options):
        x = logits()
        f(x, TARGET, MASK, **options)._asdict()[term].sum().backward()
        assert not x.grad[2].any()
        return x.grad[0]

    check(gradient("log_prob"), [-1 / 4, -1 / 4, 1 / 2])
    check(gradient("scaled_log_prob"), [-1 / 4, -1 / 4, 1 / 2])
    check(gradient("scaled_log_prob", temperature=0.5), [-1 / 3, -1 / 3, 2 / 3])
    check(gradient("scaled_mean_log_prob", temperature=0.5), [1 / 3, 1 / 3, -2 / 3])
    classes = torch.tensor([[0, 0, 2], [0, 0, 0], [0, 0, 0]])  # 2 [0] + [2] - 3 p
    check(gradient("class_log_prob", classes=classes), [5 / 4, -3 / 4, -1 / 2])
    # -p (ln p + 3/2 ln 2): ln p is -2 ln 2 or -ln 2
    check(gradient("entropy"), [log(2) / 8, log(2) / 8, -log(2) / 4])


@BOTH
def test_candidates_on_paper(f):
    """Tokens 0 1 0 2 0 1: after 0 came 1, then 2; each row has p = 1/4, 1/4, 1/2."""
    target = torch.tensor([[0, 1, 0, 2, 0, 1]])
    links = torch.tensor([[-1, -1, -1, 1, -1, 3]]), torch.tensor([[6, 5, 6, 6, 6, 6]])
    links = [link.int() for link in links]
    x = ODDS[:1].log().repeat(6, 1)[None].requires_grad_()
    terms = f(x, target, links=links)
    # At 3 the label is 2 and 1 came before; at 5 the label is 1, which came before, and so did 2.
    check(terms.candidates, [[0, 0, 0, 1, 0, 1]])
    check(terms.unlikelihood, [[0, 0, 0, log(4 / 3), 0, log(2)]])
    assert not terms.candidates.requires_grad
    terms.unlikelihood.sum().backward()
    check(x.grad[0, 3], [-1 / 12, 1 / 4, -1 / 6])  # r ([j = 1] - p), r = 1/3
    check(x.grad[0, 5], [-1 / 4, -1 / 4, 1 / 2])  # r = 1
    assert not x.grad[0, [0, 1, 2, 4]].any()
    # At 6 both came, 1 twice: once counted. A masked position is no candidate.
    target = torch.tensor([[0, 1, 0, 2, 0, 1, 0, 0]])
    links = (
        torch.tensor([[-1, -1, -1, 1, -1, 3, -1, 5]], dtype=torch.int32),
        torch.tensor([[8, 5, 8, 8, 8, 8, 8, 8]], dtype=torch.int32),
    )
    x = ODDS[:1].log().repeat(8, 1)[None]
    check(f(x, target, links=links).candidates[0, 7], 2)
    check(f(x, target, links=links).unlikelihood[0, 7], log(4 / 3) + log(2))
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
    check(f(x, target, mask, links=links).unlikelihood[0, 7], log(4 / 3))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("alphabet", [2, 9])
def test_links_that_pass_over_repeats_have_the_same_candidates(alphabet, n):
    g = torch.Generator().manual_seed(n)
    target = torch.randint(alphabet, (2, 150), generator=g)
    mask = torch.rand(2, 150, generator=g) < 0.95
    logits = torch.randn(2, 150, alphabet, generator=g)
    all_links, short = links_of(target, mask, n), repetition_links(target, mask, n)
    assert (all_links[0] != short[0]).any() and torch.equal(all_links[1], short[1])
    ours = [
        evaluate(cross_entropy_terms, dict(logits=logits, target=target, mask=mask, links=x))
        for x in (all_links, short)
    ]
    for name in ("candidates", "unlikelihood", "grad logits"):
        assert torch.equal(ours[0][name], ours[1][name]), name


@BOTH
def test_unlikelihood_is_bounded(f):
    """-ln(1 - p) of a p of 1 is 24 ln 2, and constant there."""
    links = torch.tensor([-1, -1, 1], dtype=torch.int32), torch.full((3,), 3, dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(3, 4, dtype=dtype)
        x[2, 1] = 200.0
        x.requires_grad_()
        terms = f(x, torch.tensor([0, 1, 2]), links=links)
        check(terms.unlikelihood.double(), [0, 0, 24 * log(2)], rtol=1e-6)
        (grad,) = torch.autograd.grad(terms.unlikelihood.sum(), x)
        assert not grad.any()


@pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_agrees_with_reference(case, dtype):
    arguments = make(case, dtype)
    assert_agrees(evaluate(cross_entropy_terms, arguments), arguments, case.name)


@pytest.mark.parametrize("term", ["scaled_log_prob", "scaled_mean_log_prob", "log_prob"])
@pytest.mark.parametrize("name", ["all", "t1", "v2049"])
def test_one_gradient_alone(term, name):
    """Where one temperature has no gradient the loop over the row is another one."""
    arguments = make(BY_NAME[name], torch.float32)
    rows = arguments["target"].shape
    upstream = {term: torch.randn(rows, dtype=torch.float64)}
    results = evaluate(cross_entropy_terms, arguments, upstream)
    assert_agrees(results, arguments, f"{name} {term}", upstream)
    pair = {**upstream, "entropy": torch.randn(rows, dtype=torch.float64)}
    results = evaluate(cross_entropy_terms, arguments, pair)
    assert_agrees(results, arguments, f"{name} {term} entropy", pair)


def test_temperature_as_a_tensor():
    arguments = make(BY_NAME["all"], torch.float32)
    number = evaluate(cross_entropy_terms, arguments)
    for dtype in (torch.float64, torch.float32):
        given = {**arguments, "temperature": torch.tensor(0.7, dtype=dtype)}
        for name, result in evaluate(cross_entropy_terms, given).items():
            torch.testing.assert_close(result, number[name])
    arguments["temperature"] = None
    none = evaluate(cross_entropy_terms, arguments)
    for one in (1, 1.0, torch.tensor(1.0)):
        same = evaluate(cross_entropy_terms, {**arguments, "temperature": one})
        for name, result in same.items():
            assert_same_bits(result, none[name], name)
