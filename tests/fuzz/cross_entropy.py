# SPDX-License-Identifier: BSD-3-Clause
"""Properties of the losses and statistics of rows of logits: one problem with every keyword, whose
truth is computed once, and all the ways to an operator that come to it."""

import torch
from accuracy_cross_entropy import STATISTICS, Expected, assert_all_accurate, converted, evaluate
from sharded import shards_of
from simulated_cross_entropy import OUTPUTS as RESULTS

import masked_loss_ext as mle
from masked_loss_ext import reference
from masked_loss_ext.reference.cross_entropy import counted_rows
from tests.fuzz.agreement import assert_bits, is_close
from tests.fuzz.choices import CONVERTED, INTEGERS, laid, mask_values, poisoned, used_by

OPS = torch.ops.masked_loss_ext
SAVED = ("row_sums", "entropy", "log_prob", "smooth_distance", "totals")
SHARDED = (
    "_vocab_parallel_cross_entropy_sums",
    "vocab_parallel_cross_entropy",
    "_vocab_parallel_cross_entropy_backward",
    "_vocab_parallel_cross_entropy_backward_",
)
CLASSES = (2, 3, 5, 8, 1, 9, 16, 17, 33)
WIDE = (1024, 1025, 2049)
CUTS = ([1], [1, 1], [2, 1, 1], [1, 0, 2], [0, 3, 1])
NARROW = ("target", "mask", "segment_ids")  # may be [1, S] for [B, S]


def row_shape(c):
    sizes = [c.pick((3, 2, 1, 5, 4, 1, 7, 0)) for _ in range(3)]
    return tuple(sizes[: c.pick((2, 1, 2, 2, 3, 0))])


def numbers(c):
    """The keywords that are numbers; a tensor by lot where one may be."""
    wanted, options = c.byte(), {}
    if wanted & 1:
        options["label_smoothing"] = c.pick((0.1, 0.5, 1.0, 0.0, 1))
    temperature, as_tensor = c.pick((0.5, 2.0, 1.0, 0.7, 0.05, 30, 2)), c.below(2)
    if wanted & 2:
        options["temperature"] = torch.tensor(temperature) if as_tensor else temperature
    if wanted & 4:
        options["softcap"] = c.pick((3.0, 30.0, 0.5, 1000))
    if wanted & 8:
        options["z_loss"] = c.pick((1e-3, 0.3, 0.0, 1))
    if wanted & 16:
        options["focal_gamma"] = c.pick((2.0, 0.5, 1.0, 5.0, 0.0, 1.5))
    if wanted & 32:
        options["shift"] = c.pick((1, 2, 0, 3, 9))
    return options


def labels_of(c, g, rows, classes, banned=None):
    """Labels of any integer dtype, and the number that says a row is ignored."""
    dtype = c.pick((*INTEGERS[:2], *INTEGERS, *CONVERTED)) if classes < 100 else torch.int64
    signed = dtype in INTEGERS[:4]
    ignore = c.pick((-100 if signed else 120, -100 if signed else 120, 0, classes - 1, 77))
    labels = torch.randint(0, classes, rows, generator=g)
    if banned is not None:  # a label that is banned makes the loss infinite: tested apart
        labels = torch.where(banned[labels], 0, labels)
    share = c.pick((0.0, 0.3, 0.6, 1.0))
    labels = torch.where(torch.rand(rows, generator=g) < share, ignore, labels)
    return labels, dtype, ignore


class Problem:
    """given: what the function gets, by name. plain: the same for the reference, without strides,
    broadcasting, and dtypes that say the same. on: the rows that count."""

    def __init__(self, c, aggregations=(), values="logits"):
        self.c, self.values = c, values
        rows, classes = row_shape(c), c.pick(CLASSES)
        if c.chance(0.01):
            classes = c.pick(WIDE)
        self.rows, self.classes = rows, classes
        self.g = g = c.generator()
        self.options = numbers(c)
        if not rows:  # no sequence to shift along
            self.options.pop("shift", None)
        self.given, self.plain = {}, {}
        self._logits(c, g, (*rows, classes))
        self._tensors(c, g, rows, classes)
        self._reduction(c, aggregations)
        self.on = counted_rows(
            torch.empty(*rows, 0),
            self.plain["target"],
            self.plain.get("mask"),
            self.options.get("ignore_index", -100),
            self.options.get("shift", 0),
            self.plain.get("segment_ids"),
        )[1]
        self._temperatures(c, g)

    def _logits(self, c, g, shape):
        self.dtype, layout = c.dtype(), c.layout()
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        spread, banned = c.pick((2.0, 0.1, 10.0, 30.0)), c.chance(0.1)
        logits = torch.randn(shape, generator=g, dtype=torch.float64) * spread
        self.banned = None
        if banned:
            self.banned = torch.rand(shape[-1], generator=g) < 0.3
            self.banned[:1] = False
            self.options.pop("label_smoothing", None)  # it would be infinite
            logits = logits.masked_fill(self.banned, -torch.inf)
        self.put("logits", logits.to(self.dtype), layout)

    def put(self, name, tensor, layout="contiguous", dtype=None, narrow=False):
        """dtype: of what is given, which the reference has as it is."""
        if narrow and tensor.dim() > 1 and tensor.shape[0] > 1:
            tensor = tensor[:1]
        given = tensor if dtype is None else tensor.to(dtype)
        self.given[name] = laid(given, layout)
        rows = self.rows if name in NARROW else tensor.shape
        self.plain[name] = tensor.expand(rows)

    def _tensors(self, c, g, rows, classes):
        labels, dtype, ignore = labels_of(c, g, rows, classes, self.banned)
        wanted, narrow, layout = c.byte(), c.byte() & c.byte(), c.layout()
        if ignore != -100:
            self.options["ignore_index"] = ignore
        self.put("target", labels, layout, dtype, narrow & 1)
        kind, share = c.mask_dtype(), c.pick((0.6, 0.9, 0.2, 0.0, 1.0))
        if wanted & 1:
            on = torch.rand(rows, generator=g) < share
            self.put("mask", on, layout, None, narrow & 2)
            self.given["mask"] = laid(
                mask_values(on[:1] if narrow & 2 and on.dim() > 1 else on, kind), layout
            )
        weight_kind = c.pick((self.dtype, torch.float32, torch.int64))
        if wanted & 2:
            weight = torch.rand(classes, generator=g) * c.pick((1.0, 3.0))
            weight = weight.masked_fill(torch.rand(classes, generator=g) < 0.1, 0)
            weight = weight.to(weight_kind).to(self.dtype)
            self.put("weight", weight)
        if wanted & 4:
            values = torch.randn(rows, generator=g).to(self.dtype)
            self.put("token_weight", values, layout)
        if wanted & 8 and rows:
            ids = (torch.rand(rows, generator=g) < 0.4).cumsum(-1)
            self.put("segment_ids", ids, layout, c.pick((*INTEGERS, torch.uint16)), narrow & 4)

    def _reduction(self, c, aggregations):
        self.options["reduction"] = c.pick(("mean", "sum", "none", "mean", *aggregations))
        value, as_tensor = c.pick((7.5, 1, 0.25, 0.0, 123)), c.below(2)
        if self.options["reduction"] not in ("sum", "none") and c.chance(0.3):
            self.options["normalizer"] = torch.tensor(value) if as_tensor else value

    def _temperatures(self, c, g):
        """One per row by lot, NaN where that does not count."""
        if not c.chance(0.15) or not self.rows:
            return
        self.options.pop("temperature", None)
        values = torch.rand(self.rows, generator=g) + 0.5
        self.put("temperature", values.masked_fill(~self.on, torch.nan), "contiguous")

    def upstream(self, statistics):
        """Incoming gradients; those of rows that do not count are garbage in ``bad``."""

        def values(shape):
            return torch.randn((*shape, 2), generator=self.g)[..., 1]

        shape = self.rows if self.options["reduction"] == "none" else ()
        up = {"loss": values(shape)}
        if statistics:
            up |= {name: values(self.rows) for name in STATISTICS}
        rows = [name for name in up if name != "loss" or shape == self.rows]
        for name in rows:
            up[name] = torch.where(self.on, up[name], 0)
        garbage = {name: torch.where(self.on, up[name], torch.nan) for name in rows}
        return up, up | (garbage if self.options["reduction"] == "none" else {})

    def read(self):
        """Which positions hold the label and the weight of a row that counts."""
        shift = self.options.get("shift", 0)
        if shift == 0:
            return self.on
        read = torch.zeros_like(self.on)
        if self.on.dim():
            length = max(self.on.shape[-1] - shift, 0)
            read[..., shift:] = self.on[..., :length]
        return read

    def with_garbage(self, kind):
        """given, with garbage in all that no row that counts has to do with."""
        bad, read = dict(self.given), self.read()
        bad[self.values] = poisoned(bad[self.values], ~self.on.unsqueeze(-1), kind)
        if "token_weight" in bad:
            bad["token_weight"] = poisoned(bad["token_weight"], ~read, kind)
        if "temperature" in bad:
            bad["temperature"] = poisoned(bad["temperature"], ~self.on, kind)
        if "mask" in bad:  # else the label itself says which rows count
            used = (self.plain["mask"] != 0) | read
            target = bad["target"]
            bad["target"] = poisoned(target, ~used_by(used, target.shape), kind)
        return bad

    def say(self, **more):
        said = self.c.said
        for name, value in (*self.given.items(), *self.options.items(), *more.items()):
            if isinstance(value, torch.Tensor) and value.dim():
                value = f"{str(value.dtype)[6:]}{list(value.shape)}/{value.stride()}"
            said[name] = value
        return self


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
    c.saw("masked_cross_entropy", "_masked_cross_entropy_backward")
    again = evaluate(
        mle.masked_cross_entropy, overwritable(bad), bad_up, **options, inplace_backward=True
    )
    assert_bits(again, actual, "inplace_backward")
    c.saw("_masked_cross_entropy_backward_")
    sharded(c, problem, truth, up)


def operator_arguments(problem):
    """Those of the native operators for rows, by name."""
    plain, options, wide = problem.plain, dict(problem.options), problem.wide
    given = {name: plain.get(name) for name in ("target", "mask", "token_weight", "segment_ids")}
    given["weight"] = plain["weight"].to(wide) if "weight" in plain else None
    temperature = plain.get("temperature", options.pop("temperature", None))
    for name, number in (("temperature", temperature), ("normalizer", options.pop("normalizer", None))):
        is_number = number is not None and not isinstance(number, torch.Tensor)
        given[name] = torch.tensor(float(number), dtype=torch.float64) if is_number else number
    return {**given, **options}


def merged_by_hand(forms, problem, shards, up):
    """The results of whole rows and what each shard's backward returns, in place too; forms: names
    of the operators, without their prefix; shards: the arguments of each."""
    sums, results, *backwards = (getattr(OPS, name) for name in forms)
    shared = operator_arguments(problem) | {"statistics": True}
    messages = torch.stack([sums(**shared, **shard) for shard in shards])
    every = [results(**shared, **shard, messages=messages) for shard in shards]
    first = dict(zip(RESULTS, every[0], strict=True))
    for other in every[1:]:
        assert_bits(dict(zip(RESULTS, other, strict=True)), first, "another rank")
    shared |= {name: first[name] for name in SAVED}
    shared |= {f"grad_{name}": grad.to(problem.wide) for name, grad in up.items()}
    shared |= {"statistics": False, "normalizer": None}
    grads = [[backward(**shared, **shard) for shard in shards] for backward in backwards]
    return first, grads


def sharded(c, problem, truth, up):
    """Shards merged by hand, and a world of one."""
    plain, classes = problem.plain, problem.classes
    cuts = shards_of(c.pick(CUTS), classes)
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
    c.saw(*SHARDED)
    if c.chance(0.1):
        alone = evaluate(_world_of_one, problem.given, up, **problem.options)
        truth.check(alone, "a world of one")


def _world_of_one(logits, *args, **options):
    return mle.distributed.vocab_parallel_cross_entropy(logits, *args, **options)


def cross_entropy_sweep(c):
    """gradient_in_forward, fresh and over the logits, times what comes in."""
    problem = Problem(c)
    if problem.options["reduction"] == "none":
        problem.options["reduction"] = "sum"
    problem.say()
    # A half gradient is rounded before it is multiplied: by what makes no second rounding.
    factor = c.pick((0.5, 2.0, -1.0, 4.0))
    up = {"loss": torch.tensor(factor)}
    truth = Truth(problem, up, ("logits",))
    given, bad = problem.given, problem.with_garbage(c.poison())
    function, options = moved(mle.masked_cross_entropy, c), problem.options
    how = {"stats": False, "differentiable": ("logits",), "gradient_in_forward": True}
    actual = evaluate(function, given, up, **how, **options)
    truth.check(actual, "gradient_in_forward")
    assert_bits(evaluate(function, bad, up, **how, **options), actual, "garbage")
    over = overwritable(bad)
    again = evaluate(mle.masked_cross_entropy, over, up, **how, **options, inplace_backward=True)
    assert_bits(again, actual, "inplace_backward")
    c.saw("_masked_cross_entropy_sweep", "_masked_cross_entropy_sweep_")
    c.saw("_masked_cross_entropy_scale_gradient_")


def row_statistics(c):
    """Without a loss, with and without labels."""
    problem = Problem(c)
    kept = ("temperature", "softcap", "ignore_index")
    for name in ("weight", "token_weight", "segment_ids"):
        problem.given.pop(name, None)
        problem.plain.pop(name, None)
    problem.options = {k: v for k, v in problem.options.items() if k in kept}
    problem.options["reduction"] = "none"
    labelled = not c.chance(0.3)
    if not labelled:
        problem.plain["target"] = torch.zeros_like(problem.plain["target"])
        problem.options.pop("ignore_index", None)
    _, problem.on = counted_rows(
        problem.plain["logits"], problem.plain["target"], problem.plain.get("mask"),
        problem.options.get("ignore_index", -100),
    )  # fmt: skip
    if "temperature" in problem.plain:
        values = problem.plain["temperature"].nan_to_num(0.8).masked_fill(~problem.on, torch.nan)
        problem.plain["temperature"] = problem.given["temperature"] = values
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
    c.saw("masked_cross_entropy", "_masked_cross_entropy_backward")
