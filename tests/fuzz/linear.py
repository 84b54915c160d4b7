# SPDX-License-Identifier: BSD-3-Clause
"""Properties of the losses and statistics of hidden states and a classifier: the rows of
cross_entropy.py, of which no logits are given."""

import torch
from accuracy_cross_entropy import assert_all_accurate, converted, evaluate
from accuracy_linear import LinearExpected
from cases_linear import DIFFERENTIABLE, linear

import masked_loss_ext as mle
from masked_loss_ext import reference
from tests.fuzz.agreement import assert_bits, is_close
from tests.fuzz.cross_entropy import dresses, swept_factor
from tests.fuzz.rows import Problem
from tests.fuzz.shards import merged_by_hand, some_shards

WIDTHS = (2, 1, 3, 5, 7, 8, 4, 17)
FORWARD = ("linear_cross_entropy", "_linear_cross_entropy_backward")
SHARDED = (
    "_vocab_parallel_linear_cross_entropy_sums",
    "vocab_parallel_linear_cross_entropy",
    "_vocab_parallel_linear_cross_entropy_backward",
)
LAYERS = (*(torch.float32,) * 3, *(torch.float64,) * 2, torch.bfloat16, torch.float16)


class LinearProblem(Problem):
    """how: keywords that only these functions have."""

    def __init__(self, c, aggregations=()):
        super().__init__(c, aggregations, values="hidden")
        count, wanted = int(self.on.sum()), c.byte()
        self.how = {}
        if wanted & 1:
            self.how["chunk_rows"] = c.pick((1, 2, 3, 7))
        if wanted & 2:
            self.how["num_valid"] = count + c.below(3)
        self.half = self.dtype.itemsize == 2
        if wanted & 4 and self.half:
            self.how["logits_dtype"] = torch.float32
            self.half = False

    def _logits(self, c, g, shape):
        *rows, classes = shape
        self.dtype, layout, width = c.pick(LAYERS), c.layout(), c.pick(WIDTHS)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        spread, biased, banned = c.pick((2.0, 0.1, 5.0)), c.below(2), c.chance(0.1)
        values = [
            torch.randn(size, generator=g, dtype=torch.float64)
            for size in ((*rows, width), (classes, width), (classes,))
        ]
        self.put("hidden", values[0].to(self.dtype), layout)
        self.put("head", (values[1] * spread / width**0.5).to(self.dtype), c.layout())
        bias, self.banned = values[2], None
        if banned:
            self.banned = torch.rand(classes, generator=g) < 0.3
            self.banned[:1] = False
            bias = bias.masked_fill(self.banned, -torch.inf)
            self.options.pop("label_smoothing", None)  # it would be infinite
        if biased or banned:
            self.put("bias", bias.to(self.dtype))


class LinearTruth:
    """As Truth, with the sizes that a gradient of the logits gives the products made of it."""

    def __init__(self, problem, upstream, statistics=True):
        self.problem, self.upstream = problem, upstream
        self.given = problem.plain
        doubled = converted(self.given, torch.float64)
        doubled["added"] = torch.zeros(*problem.rows, problem.classes, dtype=torch.float64)
        self.values = evaluate(
            self._reference, doubled, upstream, differentiable=(*DIFFERENTIABLE, "added"),
            **problem.options,
        )  # fmt: skip
        g = self.values.pop("grad added").abs()
        flat = g.reshape(-1, problem.classes)
        hidden = torch.where(problem.on.unsqueeze(-1), doubled["hidden"], 0).abs()
        self.sizes = {
            "grad hidden": g @ doubled["head"].abs(),
            "grad head": flat.T @ hidden.reshape(-1, hidden.shape[-1]),
            "grad bias": flat.sum(0),
        }
        self.expected = None

    def _reference(self, hidden, head, target, mask=None, *, added, weight=None, **options):
        """reference.masked_linear_cross_entropy, with a place for the gradient of its logits."""
        bias = options.pop("bias", None)
        logits = reference.linear.logits_of(hidden, head, bias, self.problem.on) + added
        return reference.masked_cross_entropy(logits, target, mask, weight=weight, **options)

    def check(self, actual, what):
        # Halves are multiplied as they are, so that few come near enough.
        near = not self.problem.half
        terms = self.problem.on.numel() * self.problem.classes
        if near and is_close(actual, self.values, terms, self.sizes):
            return
        if self.expected is None:
            options = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in
                       self.problem.options.items()}  # fmt: skip
            rounded = self.problem.dtype if self.problem.half else None
            self.expected = LinearExpected(self.given, self.upstream, rounded, **options)
        assert_all_accurate(actual, self.expected, what)


def linear_cross_entropy(c):
    """masked_linear_cross_entropy with statistics: gradients by a second pass."""
    problem = LinearProblem(c)
    problem.say(**problem.how)
    up, bad_up = problem.upstream(statistics=True)
    truth = LinearTruth(problem, up)
    keywords = {**problem.options, **problem.how, "differentiable": DIFFERENTIABLE}
    actual = evaluate(linear(mle), problem.given, up, **keywords)
    truth.check(actual, "masked_linear_cross_entropy")
    bad = problem.with_garbage(c.poison())
    assert_bits(evaluate(linear(mle), bad, bad_up, **keywords), actual, "garbage")
    for again in dresses(c, problem):  # in whose strides ATen may add up its products otherwise
        truth.check(evaluate(linear(mle), again, bad_up, **keywords), "other strides")
    c.saw(*FORWARD, calls=4)
    for _ in range(2):
        sharded(c, problem, truth, up)


def linear_sweep(c):
    """A mean or a sum without statistics: gradients in the forward."""
    problem = LinearProblem(c)
    if problem.options["reduction"] == "none":
        problem.options["reduction"] = "mean"
    problem.say(**problem.how)
    up = {"loss": torch.tensor(swept_factor(c, problem))}
    truth = LinearTruth(problem, up)
    keywords = {**problem.options, **problem.how, "stats": False, "differentiable": DIFFERENTIABLE}
    actual = evaluate(linear(mle), problem.given, up, **keywords)
    truth.check(actual, "masked_linear_cross_entropy")
    bad = problem.with_garbage(c.poison())
    assert_bits(evaluate(linear(mle), bad, up, **keywords), actual, "garbage")
    for again in dresses(c, problem):
        truth.check(evaluate(linear(mle), again, up, **keywords), "other strides")
    c.saw("_linear_cross_entropy_sweep", calls=4)


def linear_row_statistics(c):
    """Without a loss."""
    problem = LinearProblem(c)
    problem.for_statistics()
    if "num_valid" in problem.how:
        problem.how["num_valid"] = int(problem.on.sum()) + 1
    problem.say(**problem.how)
    up, _ = problem.upstream(statistics=True)
    up["loss"] = torch.zeros(problem.rows)
    truth = LinearTruth(problem, up)

    def call(hidden, head, target, mask=None, *, return_stats, reduction, **keywords):
        assert return_stats and reduction == "none"
        found = mle.linear_row_statistics(hidden, head, target, mask, **keywords)
        return found.lse * 0, found

    keywords = {**problem.options, **problem.how, "differentiable": DIFFERENTIABLE}
    actual = evaluate(call, problem.given, up, **keywords)
    again = evaluate(call, problem.with_garbage(c.poison()), up, **keywords)
    del actual["loss"], again["loss"]
    truth.check(actual, "linear_row_statistics")
    assert_bits(again, actual, "garbage")
    c.saw(*FORWARD, calls=2)


def sharded(c, problem, truth, up):
    """Shards merged by hand, and a world of one."""
    plain, classes = problem.plain, problem.classes
    cuts = some_shards(c, classes)
    more = {"hidden": plain["hidden"], "vocab_size": classes}
    more |= {k: v for k, v in problem.how.items() if k != "logits_dtype"}
    more["fp32_logits"] = "logits_dtype" in problem.how
    bias = plain.get("bias")
    shards = [
        {
            **more,
            "linear_weight": plain["head"][a : a + n].contiguous(),
            "bias": None if bias is None else bias[a : a + n].contiguous(),
            "vocab_start": a,
        }
        for a, n in cuts
    ]
    first, (grads,) = merged_by_hand(SHARDED, problem, shards, up)
    found = {name: first[name] for name in truth.values if name in first}
    hidden, head, biases, weights = zip(*grads, strict=True)
    if not problem.dtype.itemsize == 2 or len(shards) == 1:  # shares of halves are rounded ones
        found["grad hidden"] = sum(hidden)
    found["grad head"] = torch.cat(head)
    if bias is not None:
        found["grad bias"] = torch.cat(biases)
    if "token_weight" in plain:
        found["grad token_weight"] = weights[0].to(problem.dtype)
    truth.check(found, f"shards {cuts}")
    c.saw(*SHARDED, calls=len(shards))
    if c.chance(0.1):
        keywords = {**problem.options, **problem.how, "differentiable": DIFFERENTIABLE}
        function = linear(_WorldOfOne)
        truth.check(evaluate(function, problem.given, up, **keywords), "a world of one")


class _WorldOfOne:
    masked_linear_cross_entropy = staticmethod(mle.distributed.vocab_parallel_linear_cross_entropy)
