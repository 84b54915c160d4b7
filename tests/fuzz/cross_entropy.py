# SPDX-License-Identifier: BSD-3-Clause
"""Properties of the losses and statistics of rows of logits: one problem with every keyword, whose
truth is computed once, and all the ways to an operator that come to it."""

import torch
from accuracy_cross_entropy import Expected, assert_all_accurate, converted, evaluate

import masked_loss_ext as mle
from masked_loss_ext import reference
from tests.fuzz.agreement import assert_bits, is_close
from tests.fuzz.choices import poisoned
from tests.fuzz.rows import Problem
from tests.fuzz.shards import merged_by_hand, some_shards

SHARDED = (
    "_vocab_parallel_cross_entropy_sums",
    "vocab_parallel_cross_entropy",
    "_vocab_parallel_cross_entropy_backward",
    "_vocab_parallel_cross_entropy_backward_",
)


class SweptExpected(Expected):
    """Of the logits' gradient alone, which is rounded before it is multiplied: below the normal
    numbers of float16 a rounding is 2^-25."""

    differentiable = ("logits",)

    def __init__(self, inputs, upstream, **options):
        super().__init__(inputs, upstream, **options)
        if inputs["logits"].dtype == torch.float16:
            factor = 1 + upstream["loss"].abs().item()
            self.floor["grad logits"] = 2.0**-24 * factor

    def sizes(self, doubled, upstream, options, dtype):
        found, largest = super().sizes(doubled, upstream, options, dtype)
        found.pop("grad token_weight", None)
        return found, largest


class Truth:
    """What the reference says in float64, and the accuracy rule where that is wanted."""

    def __init__(self, problem, upstream, differentiable=("logits", "token_weight")):
        self.problem, self.upstream = problem, upstream
        self.given = {k: v for k, v in problem.plain.items() if v is not None}
        self.differentiable = differentiable
        doubled = converted(self.given, torch.float64)
        self.values = evaluate(
            reference.masked_cross_entropy, doubled, upstream, differentiable=differentiable,
            **self.options(),
        )  # fmt: skip
        self.expected = None

    def options(self):
        return self.problem.options

    def check(self, actual, what):
        """All that ``actual`` has."""
        if is_close(actual, self.values, self.given["logits"].numel()):
            return
        if self.expected is None:
            options = {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in
                       self.options().items()}  # fmt: skip
            rule = Expected if len(self.differentiable) > 1 else SweptExpected
            self.expected = rule(self.given, self.upstream, **options)
        assert_all_accurate(actual, self.expected, what)


def moved(function, c):
    """The function by way of class_dim, by lot."""
    wanted, dim = c.chance(0.2), c.below(4)

    def call(logits, *args, **options):
        at = dim % logits.dim()
        return function(logits.movedim(-1, at), *args, class_dim=at, **options)

    return call if wanted else function


def overwritable(inputs, name="logits"):
    """A copy that may be written over, of the same strides."""
    tensor = inputs[name]
    return {**inputs, name: poisoned(tensor, torch.zeros((), dtype=torch.bool), "nan")}


def cross_entropy(c):
    """masked_cross_entropy with statistics: ordinary, in place, and of shards of the classes."""
    problem = Problem(c).say()
    up, bad_up = problem.upstream(statistics=True)
    truth = Truth(problem, up)
    function, options = moved(mle.masked_cross_entropy, c), problem.options
    actual = evaluate(function, problem.given, up, **options)
    truth.check(actual, "masked_cross_entropy")
    bad = problem.with_garbage(c.poison())
    assert_bits(evaluate(function, bad, bad_up, **options), actual, "garbage")
    c.saw("masked_cross_entropy", "_masked_cross_entropy_backward", calls=2)
    for again in (bad, *dresses(c, problem)):
        over = overwritable(again)
        found = evaluate(mle.masked_cross_entropy, over, bad_up, **options, inplace_backward=True)
        assert_bits(found, actual, "inplace_backward")
        c.saw("masked_cross_entropy", "_masked_cross_entropy_backward_")
    for again in dresses(c, problem):
        assert_bits(evaluate(function, again, bad_up, **options), actual, "other strides")
        c.saw("masked_cross_entropy", "_masked_cross_entropy_backward")
    sharded(c, problem, truth, up)


def dresses(c, problem):
    """The same problem twice more, in other memory, with other garbage."""
    return [problem.with_garbage(c.poison(), problem.dressed(c)) for _ in range(2)]


def sharded(c, problem, truth, up):
    """Shards merged by hand, and a world of one."""
    plain, classes = problem.plain, problem.classes
    cuts = some_shards(c, classes)
    shards = [
        {"logits": plain["logits"][..., a : a + n].clone(), "vocab_start": a, "vocab_size": classes}
        for a, n in cuts
    ]
    first, (grads, over) = merged_by_hand(SHARDED, problem, shards, up)
    found = {name: first[name] for name in truth.values if name in first}
    found["grad logits"] = torch.cat([logits for logits, _ in grads], -1)
    if "token_weight" in plain:
        found["grad token_weight"] = grads[0][1].to(problem.dtype)
    truth.check(found, f"shards {cuts}")
    for shard, (logits, weights), again in zip(shards, grads, over, strict=True):
        pairs = {"logits": shard["logits"], "token_weight": again}
        assert_bits(pairs, {"logits": logits, "token_weight": weights}, "shards in place")
    c.saw(*SHARDED, calls=len(shards))
    if c.chance(0.1):
        alone = evaluate(_world_of_one, problem.given, up, **problem.options)
        truth.check(alone, "a world of one")


def _world_of_one(logits, *args, **options):
    return mle.distributed.vocab_parallel_cross_entropy(logits, *args, **options)


def swept_factor(c, problem):
    """What comes in. A half gradient is rounded before it is multiplied: by what makes no second
    rounding, and of float16 brings back no infinity."""
    factor = c.pick((1.0, 2.0, -1.0, 4.0, 0.5))
    return 2.0 if factor == 0.5 and problem.dtype == torch.float16 else factor


def cross_entropy_sweep(c):
    """gradient_in_forward, fresh and over the logits, times what comes in."""
    problem = Problem(c)
    if problem.options["reduction"] == "none":
        problem.options["reduction"] = "sum"
    problem.say()
    up = {"loss": torch.tensor(swept_factor(c, problem))}
    truth = Truth(problem, up, ("logits",))
    given, bad = problem.given, problem.with_garbage(c.poison())
    function, options = moved(mle.masked_cross_entropy, c), problem.options
    how = {"stats": False, "differentiable": ("logits",), "gradient_in_forward": True}
    actual = evaluate(function, given, up, **how, **options)
    truth.check(actual, "gradient_in_forward")
    assert_bits(evaluate(function, bad, up, **how, **options), actual, "garbage")
    c.saw("_masked_cross_entropy_sweep", calls=2)
    for again in (bad, *dresses(c, problem)):
        found = evaluate(
            mle.masked_cross_entropy,
            overwritable(again),
            up,
            **how,
            **options,
            inplace_backward=True,
        )
        assert_bits(found, actual, "inplace_backward")
        c.saw("_masked_cross_entropy_sweep_")
    for again in dresses(c, problem):
        assert_bits(evaluate(function, again, up, **how, **options), actual, "other strides")
        c.saw("_masked_cross_entropy_sweep")
    c.saw("_masked_cross_entropy_scale_gradient_", calls=7)


def row_statistics(c):
    """Without a loss, with and without labels."""
    problem = Problem(c)
    labelled = not c.chance(0.3)
    problem.for_statistics(labelled)
    problem.say(labelled=labelled)
    up, _ = problem.upstream(statistics=True)
    up["loss"] = torch.zeros(problem.rows)
    if not labelled:
        up["log_prob"] = torch.zeros(problem.rows)
    truth = Truth(problem, up)
    options = problem.options

    def call(logits, target, mask=None, *, return_stats, reduction, **keywords):
        assert return_stats and reduction == "none"
        found = mle.row_statistics(logits, target if labelled else None, mask, **keywords)
        if not labelled:
            assert found.log_prob is None and found.hit is None
            found = found._replace(log_prob=found.lse * 0, hit=found.argmax)
        return found.lse * 0, found

    bad, of = problem.with_garbage(c.poison()), moved(call, c)
    actual = evaluate(of, problem.given, up, **options)
    again = evaluate(of, bad, up, **options)
    for found in (actual, again):
        found.pop("loss")
        if not labelled:
            del found["log_prob"], found["hit"]
    truth.check(actual, "row_statistics")
    assert_bits(again, actual, "garbage")
    c.saw("masked_cross_entropy", "_masked_cross_entropy_backward", calls=2)
