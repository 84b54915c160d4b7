# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy on paper, for the function and for the reference.

Three rows of logits are logarithms of small numbers, so that every probability is a fraction:

    row   e^logit      sum   p                  lse     label   p_y   ce       w_y
    0     1, 1, 2        4   1/4, 1/4, 1/2      ln 4    2       1/2   ln 2     5
    1     6, 1, 1        8   3/4, 1/8, 1/8      ln 8    1       1/8   ln 8     3
    2     1, 2, 3        6   1/6, 1/3, 1/2      ln 6    0       1/6   ln 6     2

with class weights w = 2, 3, 5. A fourth row of NaN is masked out everywhere.
"""

from math import log, nan, sqrt

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext import reference

LN2, LN3, LN4, LN6, LN8 = (log(n) for n in (2, 3, 4, 6, 8))
ODDS = torch.tensor([[1.0, 1, 2], [6, 1, 1], [1, 2, 3], [nan, nan, nan]], dtype=torch.float64)
TARGET = torch.tensor([2, 1, 0, 77])
MASK = torch.tensor([True, True, True, False])
WEIGHT = torch.tensor([2.0, 3, 5], dtype=torch.float64)
BOTH = pytest.mark.parametrize("module", [mle, reference], ids=["native", "reference"])
P = [[1 / 4, 1 / 4, 1 / 2], [3 / 4, 1 / 8, 1 / 8], [1 / 6, 1 / 3, 1 / 2]]


def logits():
    return ODDS.log().requires_grad_()


def rows(module, x=None, **options):
    """The losses of rows 0, 1, 2; that of row 3 must be exactly 0."""
    x = logits() if x is None else x
    loss = module.masked_cross_entropy(x, TARGET, MASK, reduction="none", **options)
    assert loss.shape == (4,) and loss[3] == 0
    return loss[:3]


def check(actual, expected, rtol=1e-13):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=rtol)


@BOTH
def test_plain(module):
    check(rows(module), [LN2, LN8, LN6])
    f = module.masked_cross_entropy
    check(f(logits(), TARGET, MASK), (LN2 + LN8 + LN6) / 3)
    check(f(logits(), TARGET, MASK, reduction="sum"), LN2 + LN8 + LN6)
    check(f(logits(), TARGET, MASK, ignore_index=1), (LN2 + LN6) / 2)
    check(f(logits(), TARGET, MASK.double(), ignore_index=2, reduction="sum"), LN8 + LN6)
    check(f(logits()[2], TARGET[2]), LN6)  # [V] and a label []
    check(
        f(logits().reshape(2, 2, 3), TARGET.reshape(2, 2), MASK.reshape(2, 2)),
        (LN2 + LN8 + LN6) / 3,
    )


@BOTH
def test_plain_in_float32_and_bfloat16(module):
    loss = module.masked_cross_entropy(logits().float(), TARGET, MASK)
    assert loss.dtype == torch.float32
    check(loss, (LN2 + LN8 + LN6) / 3, 1e-6)
    flat = torch.zeros(2, 4, dtype=torch.bfloat16)  # ln 4 has no bfloat16
    loss = module.masked_cross_entropy(flat, torch.tensor([0, 3]))
    assert loss.dtype == torch.float32
    check(loss, LN4, 1e-6)


@BOTH
def test_gradient(module):
    x = logits()
    module.masked_cross_entropy(x, TARGET, MASK, reduction="sum").backward()
    expected = [[1 / 4, 1 / 4, -1 / 2], [3 / 4, -7 / 8, 1 / 8], [-5 / 6, 1 / 3, 1 / 2], [0.0] * 3]
    check(x.grad, expected)
    y = logits()
    module.masked_cross_entropy(y, TARGET, MASK).backward()
    check(y.grad * 3, expected)
    z = logits()
    upstream = torch.tensor([2.0, -1, 0.5, nan], dtype=torch.float64)
    module.masked_cross_entropy(z, TARGET, MASK, reduction="none").backward(upstream)
    check(z.grad, [[s * v for v in e] for s, e in zip((2, -1, 0.5, 0), expected, strict=True)])


@BOTH
def test_label_smoothing(module):
    # sum_c (lse - z_c): ln 4 + ln 4 + ln 2;  ln(4/3) + 2 ln 8;  ln 6 + ln 3 + ln 2
    q = [2 * LN4 + LN2, LN4 - LN3 + 2 * LN8, LN6 + LN3 + LN2]
    ce = [LN2, LN8, LN6]
    check(rows(module, label_smoothing=1.0), [d / 3 for d in q])
    check(
        rows(module, label_smoothing=0.3), [0.7 * c + 0.1 * d for c, d in zip(ce, q, strict=True)]
    )
    x = logits()
    rows(module, x, label_smoothing=0.3).sum().backward()  # p - 0.7 [c = y] - 0.1
    check(x.grad[0], [0.15, 0.15, 0.5 - 0.8])


@BOTH
def test_class_weights(module):
    f = module.masked_cross_entropy
    check(rows(module, weight=WEIGHT), [5 * LN2, 3 * LN8, 2 * LN6])
    check(f(logits(), TARGET, MASK, weight=WEIGHT), (5 * LN2 + 3 * LN8 + 2 * LN6) / 10)
    # smoothed: weights 2, 3, 5 of the distances ln 4, ln 4, ln 2
    loss = rows(module, weight=WEIGHT, label_smoothing=0.3)[0]
    check(loss, 0.7 * 5 * LN2 + 0.1 * (5 * LN4 + 5 * LN2))
    # the denominator is that of the labels: smoothing does not change it
    whole = f(logits()[:1], TARGET[:1], weight=WEIGHT, label_smoothing=0.3)
    check(whole, (0.7 * 5 * LN2 + 0.1 * (5 * LN4 + 5 * LN2)) / 5)


@BOTH
def test_token_weights(module):
    t = torch.tensor([2.0, -0.5, 3, nan], dtype=torch.float64, requires_grad=True)
    check(rows(module, token_weight=t), [2 * LN2, -0.5 * LN8, 3 * LN6])
    loss = module.masked_cross_entropy(logits(), TARGET, MASK, token_weight=t)
    check(loss, (2 * LN2 - 0.5 * LN8 + 3 * LN6) / 3)  # the denominator stays the count
    loss.backward()
    check(t.grad, [LN2 / 3, LN8 / 3, LN6 / 3, 0.0])


@BOTH
def test_temperature(module):
    # T = 1/2 squares the odds: 1, 1, 4;  36, 1, 1;  1, 4, 9
    check(rows(module, temperature=0.5), [log(6 / 4), log(38), log(14)])
    check(rows(module, temperature=torch.tensor(0.5)), [log(6 / 4), log(38), log(14)])
    x = logits()
    rows(module, x, temperature=0.5).sum().backward()  # (p - [c = y]) / T
    check(x.grad[0], [2 / 6, 2 / 6, 2 * (4 / 6 - 1)])


@BOTH
def test_temperatures_of_rows(module):
    # odds 1, 1, 4 at T = 1/2;  6, 1, 1 at 1;  1, 4, 9 at 1/2; the last row does not count
    t = torch.tensor([0.5, 1, 0.5, nan])
    check(rows(module, temperature=t), [log(6 / 4), LN8, log(14)])
    x = logits()
    rows(module, x, temperature=t.double()).sum().backward()  # (p - [c = y]) / T
    check(x.grad[0], [2 / 6, 2 / 6, 2 * (4 / 6 - 1)])
    check(x.grad[1], [3 / 4, -7 / 8, 1 / 8])
    check(x.grad[2], [2 * (1 / 14 - 1), 2 * 4 / 14, 2 * 9 / 14])
    assert (x.grad[3] == 0).all()
    s = module.row_statistics(logits(), TARGET, MASK, temperature=t)
    check(s.lse, [LN6, LN8, log(14), 0.0])
    check(s.log_prob, [log(4 / 6), -LN8, -log(14), 0.0])
    assert s.argmax.tolist() == [2, 0, 2, 0]


@BOTH
def test_a_temperature_is_that_of_the_logits_not_of_the_label(module):
    # scored against the next label: odds 1 of 6 at T = 1/2, 6 of 8 at T = 1 (of the labels T would
    # be 1 and 1/4)
    x = logits().detach()[None].requires_grad_()
    t = torch.tensor([[0.5, 1, 0.25, -1]])
    f = module.masked_cross_entropy
    loss = f(x, TARGET[None], MASK[None], shift=1, temperature=t, reduction="none")
    check(loss, [[LN6, LN8 - LN6, 0.0, 0.0]])
    # one for each sample: both rows of the first at 1/2, the one that counts of the second at 1
    x, y = logits().detach().reshape(2, 2, 3), TARGET.reshape(2, 2)
    t = torch.tensor([[0.5], [1.0]])
    if module is reference:
        t = t.expand(2, 2)
    loss = f(x, y, MASK.reshape(2, 2), temperature=t, reduction="none")
    check(loss, [[log(6 / 4), log(38)], [LN6, 0.0]])


@BOTH
def test_softcap(module):
    # tanh(ln 2) = (4 - 1) / (4 + 1) = 3/5, so a cap of 5 makes 0 and 3 of 0 and 5 ln 2
    x = torch.tensor([[0.0, 5 * LN2]], dtype=torch.float64, requires_grad=True)
    loss = module.masked_cross_entropy(x, torch.tensor([0]), softcap=5.0)
    lse = log(1 + 2.718281828459045**3)
    check(loss, lse)
    loss.backward()
    p = 2.718281828459045**3 / (1 + 2.718281828459045**3)
    check(x.grad, [[-p, p * (1 - 9 / 25)]])


@BOTH
def test_z_loss(module):
    check(rows(module, z_loss=0.5), [LN2 + LN4**2 / 2, LN8 + LN8**2 / 2, LN6 + LN6**2 / 2])
    x = logits()
    rows(module, x, z_loss=0.5).sum().backward()  # p (1 + lse) - [c = y]
    check(x.grad[0], [(1 + LN4) / 4, (1 + LN4) / 4, (1 + LN4) / 2 - 1])
    # weighted per token, but not per class
    w = rows(module, weight=WEIGHT, z_loss=0.5, token_weight=torch.full((4,), 2.0).double())
    check(w[0], 2 * (5 * LN2 + LN4**2 / 2))


@BOTH
def test_focal(module):
    check(rows(module, focal_gamma=2.0), [LN2 / 4, LN8 * 49 / 64, LN6 * 25 / 36])
    check(rows(module, focal_gamma=0.5)[0], LN2 * sqrt(0.5))
    x = logits()
    rows(module, x, focal_gamma=2.0).sum().backward()
    # d / d ce = (1 - p)^2 + 2 (1 - p) p ce = 1/4 + ln 2 / 2, times p - [c = y]
    s = 0.25 + LN2 / 2
    check(x.grad[0], [s / 4, s / 4, -s / 2])
    # smoothing inside, z-loss outside the factor; p is that of the label
    loss = rows(module, focal_gamma=2.0, label_smoothing=0.3, z_loss=0.5)[0]
    check(loss, (0.7 * LN2 + 0.1 * (2 * LN4 + LN2)) / 4 + LN4**2 / 2)


@BOTH
def test_normalizer(module):
    f = module.masked_cross_entropy
    total = LN2 + LN8 + LN6
    for normalizer in (10, 2.5, 0.25, torch.tensor(8), torch.tensor(0.5, dtype=torch.float64)):
        check(f(logits(), TARGET, MASK, normalizer=normalizer), total / float(normalizer))
    weighted = 5 * LN2 + 3 * LN8 + 2 * LN6
    check(f(logits(), TARGET, MASK, weight=WEIGHT, normalizer=4.0), weighted / 4)
    for zero in (0, 0.0, torch.tensor(0)):
        x = logits()
        loss = f(x, TARGET, MASK, normalizer=zero)
        loss.backward()
        assert loss.item() == 0 and (x.grad == 0).all()


@BOTH
def test_shift(module):
    # rows 0 and 1 are scored against the labels of rows 1 and 2: odds 1 of 4, odds 6 of 8
    x = logits().detach()[None].requires_grad_()
    f = module.masked_cross_entropy
    loss = f(x, TARGET[None], MASK[None], shift=1, reduction="none")
    check(loss, [[LN4, LN8 - LN6, 0.0, 0.0]])
    check(f(x, TARGET[None], MASK[None], shift=1), (LN4 + LN8 - LN6) / 2)
    check(f(x, TARGET[None], MASK[None], shift=2, reduction="none"), [[LN4, 0.0, 0.0, 0.0]])
    # the weight belongs to the label
    t = torch.tensor([[nan, 3, 5, nan]], dtype=torch.float64, requires_grad=True)
    loss = f(x, TARGET[None], MASK[None], shift=1, token_weight=t, reduction="sum")
    check(loss, 3 * LN4 + 5 * (LN8 - LN6))
    loss.backward()
    check(t.grad, [[0.0, LN4, LN8 - LN6, 0.0]])
    check(x.grad[0], [[3 / 4, -9 / 4, 3 / 2], [-5 / 4, 5 / 8, 5 / 8], [0.0] * 3, [0.0] * 3])


@BOTH
def test_segments(module):
    # documents of one and three tokens: the first has nothing to predict
    ids = torch.tensor([[7, 8, 8, 8]])
    f = module.masked_cross_entropy
    args = (logits()[None], TARGET[None], MASK[None])
    check(f(*args, shift=1, segment_ids=ids, reduction="none"), [[0.0, LN8 - LN6, 0.0, 0.0]])
    check(f(*args, shift=1, segment_ids=ids), LN8 - LN6)


@BOTH
def test_statistics(module):
    _, stats = module.masked_cross_entropy(logits(), TARGET, MASK, return_stats=True)
    alone = module.row_statistics(logits(), TARGET, MASK)
    for s in (stats, alone):
        check(s.lse, [LN4, LN8, LN6, 0.0])
        h1 = 3 / 4 * (LN8 - LN6) + 2 / 8 * LN8
        h2 = LN6 / 6 + LN3 / 3 + LN2 / 2
        check(s.entropy, [1.5 * LN2, h1, h2, 0.0])
        check(s.log_prob, [-LN2, -LN8, -LN6, 0.0])
        assert s.hit.tolist() == [True, False, False, False]
        assert s.argmax.tolist() == [2, 0, 2, 0]
    assert module.row_statistics(logits(), None, MASK).argmax.tolist() == [2, 0, 2, 0]


@BOTH
@pytest.mark.parametrize("classes", [1, 2, 16, 33, 1000, 4099])
def test_statistics_of_a_uniform_row(module, classes):
    x = torch.full((2, classes), 0.75, dtype=torch.float64)
    s = module.row_statistics(x, torch.tensor([0, classes - 1]))
    check(s.lse, [0.75 + log(classes)] * 2)
    check(s.entropy, [log(classes)] * 2, 1e-12)
    check(s.log_prob, [-log(classes)] * 2)
    assert s.hit.tolist() == [True, classes == 1]  # the first of equal ones
    assert s.argmax.tolist() == [0, 0]
    alone = module.row_statistics(x)
    assert alone.hit is None and alone.argmax.tolist() == [0, 0]


@BOTH
def test_gradients_of_statistics(module):
    x = logits()
    s = module.row_statistics(x, TARGET, MASK)
    for name, expected in (
        ("lse", P),
        ("log_prob", [[-1 / 4, -1 / 4, 1 / 2], [-3 / 4, 7 / 8, -1 / 8], [5 / 6, -1 / 3, -1 / 2]]),
        ("entropy", [[(LN4 - 1.5 * LN2) / 4] * 2 + [(LN2 - 1.5 * LN2) / 2]]),  # -p (ln p + H)
    ):
        (grad,) = torch.autograd.grad(getattr(s, name).sum(), x, retain_graph=True)
        check(grad[: len(expected)], expected)
        assert (grad[3] == 0).all()
