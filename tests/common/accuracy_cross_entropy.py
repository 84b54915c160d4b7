# SPDX-License-Identifier: BSD-3-Clause
"""The accuracy rule of accuracy.py for cross entropy, whose terms cancel (p - 1, lse - z_y).

A result is measured against the numbers that it is made of, without their signs: ``Magnitudes``
says for each how many times one relative rounding of a term moves it, to first order. With
d = m - z (m the largest z of a row), a term e^(z - m) moves by d roundings, their sum by the mean
of d under the softmax and 1 for itself, and the logarithm of the sum by as much. z itself is
rounded where there is a temperature or a cap; in float64, where the reference is its own truth, so
is lse. The error of the reference in this dtype, in that measure, is what PyTorch can do; allowed
is twice that, but no less than 8 roundings of half a unit for a term and log2(terms) for a sum. A
float16 or bfloat16 gradient is rounded once, at the end.
"""

import math

import torch
from accuracy import assert_accurate, assert_same_places

from masked_loss_ext import reference
from masked_loss_ext.reference.cross_entropy import counted_rows, scaled_logits, shifted

FLOATING_INPUTS = ("logits", "weight", "token_weight", "hidden", "head", "bias")
STATISTICS = ("lse", "entropy", "log_prob")
DIFFERENTIABLE = ("logits", "token_weight")
# An exponential below so many smallest normal numbers may be 0 (csrc/common/cpu/exponential.inc).
LOST_EXPONENTIAL = 1.5
ROUNDINGS_OF_A_TERM = 8


def converted(inputs, dtype):
    return {
        name: value.to(dtype) if name in FLOATING_INPUTS else value
        for name, value in inputs.items()
    }


def evaluate(function, inputs, upstream=None, stats=True, differentiable=DIFFERENTIABLE, **options):
    """{"loss", "lse", ..., "hit", "grad logits", ...} of function(**inputs, **options).

    upstream: gradients of loss, lse, entropy and log_prob by name; those missing are 1 and nothing.
    """
    leaves = {n: inputs[n].detach().requires_grad_() for n in differentiable if n in inputs}
    given = {**inputs, **leaves}
    results = {}
    if stats:
        results["loss"], statistics = function(**given, **options, return_stats=True)
        results.update(statistics._asdict())
    else:
        results["loss"] = function(**given, **options)
    upstream = {"loss": torch.ones_like(results["loss"]), **(upstream or {})}
    names = [n for n in upstream if n in results]
    outputs = [results[n] for n in names]
    grad_outputs = [upstream[n].to(results[n].dtype) for n in names]
    empty = (
        0 in inputs[differentiable[0]].shape
    )  # the reference then leaves token_weight out of the graph
    grads = torch.autograd.grad(
        outputs, list(leaves.values()), grad_outputs, materialize_grads=empty
    )
    for name, grad in zip(leaves, grads, strict=True):
        results[f"grad {name}"] = grad
    return {name: value.detach() for name, value in results.items()}


def upstream_for(inputs, options, statistics=True, seed=5):
    """Of both signs, not contiguous, different for each row."""
    g = torch.Generator().manual_seed(seed)
    rows = inputs["target"].shape

    def values(shape):
        v = torch.randn((*shape, 2), generator=g)
        return v.add(v.sign())[..., 1]

    loss = values(rows if options.get("reduction") == "none" else ())
    return {"loss": loss, **({n: values(rows) for n in STATISTICS} if statistics else {})}


class Magnitudes:
    """By result: the measure of the module's docstring, from float64 inputs.

    moved: how many roundings, of 1, each z is wrong by, where the logits are results themselves.
    """

    def __init__(self, inputs, upstream, options, is_its_own_truth, moved=0.0):
        self.o = {"label_smoothing": 0.0, "z_loss": 0.0, "focal_gamma": 0.0, **options}
        self.inputs, self.upstream = inputs, upstream or {}
        shift = options.get("shift", 0)
        labels, self.on = counted_rows(
            inputs["logits"],
            inputs["target"],
            inputs.get("mask"),
            options.get("ignore_index", -100),
            shift,
            inputs.get("segment_ids"),
        )
        softcap, T = options.get("softcap"), options.get("temperature", 1.0)
        if "temperature" in inputs:
            T = torch.where(self.on, inputs["temperature"], 1).double()
        z = scaled_logits(inputs["logits"], self.on, T, softcap)
        self.is_label = torch.nn.functional.one_hot(labels, z.shape[-1]).bool()
        banned = z == -torch.inf
        self.z = z.masked_fill(banned, 0)
        self.log_p = torch.log_softmax(z, -1)
        self.p, self.log_p = self.log_p.exp(), self.log_p.masked_fill(banned, 0)
        top = z.amax(-1, keepdim=True)
        d = (top - z).masked_fill(banned, 0)
        exact = isinstance(T, float) and T == 1.0 and softcap is None
        if isinstance(T, torch.Tensor):
            T = T.unsqueeze(-1)
        self.u = (d if exact else d + self.z.abs()) + moved
        self.log_sum = torch.logsumexp(z - top, -1)
        self.unit = 1 + self.log_sum + (self.p * self.u).sum(-1)
        self.lse = torch.logsumexp(z, -1).abs()
        if is_its_own_truth:  # and takes lse - z_y, not log_sum + d_y
            self.unit = self.unit + self.lse
        self.entropy = self.log_sum + (self.p * d).sum(-1)
        self.entropy_size = self.unit + self.entropy + self._mean_of_entropy_terms()
        if is_its_own_truth:  # and takes lse - sum p z: as lse is wrong, so is every p
            self.entropy_size = self.entropy_size + self.lse * (self.p * self.z.abs()).sum(-1)
        self.slope_of_z, self.rounded_slope = 1 / T, 0.0
        if softcap is not None:
            self.slope_of_z = (1 - torch.tanh(inputs["logits"] / softcap).square()) / T
            self.slope_of_z = torch.where(self.on.unsqueeze(-1), self.slope_of_z, 0)
            self.rounded_slope = 1 / T + 2 / softcap * moved  # 1 - tanh^2 cancels
        self._weights(labels, shift)
        self._focal(torch.float64 if is_its_own_truth else torch.float32)
        self._losses()

    def _mean_of_entropy_terms(self):
        h = -(self.p * self.log_p).sum(-1, keepdim=True)
        self.entropy_term = (self.log_p + h).abs()
        return (self.p * self.entropy_term * self.u).sum(-1)

    def _label(self, values):
        return (values * self.is_label).sum(-1)

    def _weights(self, labels, shift):
        w = self.inputs.get("weight")
        self.w = self.z.new_ones(self.z.shape[-1]) if w is None else w
        self.w_y = self.w[labels]
        self.t = self.inputs.get("token_weight")
        self.t = 1.0 if self.t is None else shifted(self.t, shift, 0).abs()
        denominator = 1.0
        if self.o.get("reduction", "mean") == "mean":
            denominator = self.o.get("normalizer")
            if denominator is None:
                denominator = (self.on * (1 if w is None else self.w_y)).sum().item()
            denominator = denominator or torch.inf  # 0 gives 0
        self.denominator = denominator

    def _focal(self, dtype):
        ce, gamma = -self._label(self.log_p), self.o["focal_gamma"]
        self.F, self.F1, self.F2 = torch.ones_like(ce), torch.zeros_like(ce), torch.zeros_like(ce)
        self.unknown = torch.zeros_like(ce)
        if gamma > 0:
            # 1 - p, also where float64 does not tell p from 1.
            rest = (self.p * ~self.is_label).sum(-1).clamp(min=1e-300)
            p = torch.exp(-ce)
            self.F = rest**gamma
            self.F1 = gamma * self.F / rest * p
            self.F2 = self.F1 * (abs(gamma - 1) / rest * p + 1)
            # The truth takes lse - z_y, of which float64 may have lost all: in roundings of dtype.
            lost = torch.finfo(torch.float64).eps * (1 + self.lse) / rest
            self.unknown = lost.clamp(max=2) / torch.finfo(dtype).eps

    def _losses(self):
        eps, V = self.o["label_smoothing"], self.z.shape[-1]
        self.log_prob = self.unit + self._label(self.u)
        ce = self._label(self.log_p).abs()
        distance = (self.w * self.log_p.abs()).sum(-1)
        self.core = (1 - eps) * self.w_y * ce + eps / V * distance
        moved = (self.w * (self.unit.unsqueeze(-1) + self.u)).sum(-1)
        self.core_size = self.core + (1 - eps) * self.w_y * self.log_prob + eps / V * moved
        self.lse_size = self.unit + self.lse
        z_loss = abs(self.o["z_loss"]) * (2 * self.lse * self.lse_size + self.lse.square())
        self.row = self.core_size * self.F + self.core * self.F1 * self.log_prob + z_loss
        self.row = self.row + self.core * self.F * self.unknown

    def loss(self):
        row = torch.where(self.on, self.t * self.row, 0)
        if self.o.get("reduction") == "none":
            return row
        return (row.sum() / self.denominator).abs()

    def row_gradient(self):
        g = self.upstream.get("loss", torch.ones(())).double().abs() / abs(self.denominator)
        return torch.where(self.on, g, 0)

    def statistics(self):
        sizes = {"lse": self.lse_size, "entropy": self.entropy_size}
        sizes["log_prob"] = self.log_prob + self._label(self.log_p).abs()
        return {name: torch.where(self.on, size, 0) for name, size in sizes.items()}

    def grad_logits(self):
        g = self.row_gradient() * self.t
        up = {
            n: torch.where(self.on, self.upstream[n].double().abs(), 0)
            if n in self.upstream
            else torch.zeros_like(self.unit)
            for n in STATISTICS
        }
        eps, V, W = self.o["label_smoothing"], self.z.shape[-1], self.w.sum()
        direct = (1 - eps) * self.w_y
        Y = (
            g
            * (
                direct * (self.F + self.F1 * self.log_prob)
                + self.core_size * self.F1
                + self.core * (self.F2 * self.log_prob + self.F1 * self.unknown)
            )
            + up["log_prob"]
        )
        M = g * (self.F + self.F1 * self.log_prob) * eps / V
        X = M * W + 2 * g * abs(self.o["z_loss"]) * self.lse_size + up["lse"]
        relative = 1 + self.unit.unsqueeze(-1) + self.u
        column = lambda v: v.unsqueeze(-1)  # noqa: E731
        entropy = (
            column(up["entropy"])
            * self.p
            * (self.entropy_term * relative + self.u + column(self.entropy_size))
        )
        each = column(Y + X) * self.p * relative + entropy
        each = each + self.is_label * column(Y) + column(M) * self.w
        factor = column(Y + X) + column(up["entropy"]) * (1 + self.entropy_term)
        self.largest = max(1.0, (factor * self.slope_of_z).max().item())
        return each * (self.slope_of_z + self.rounded_slope)

    def all(self):
        sizes = {"loss": self.loss(), **self.statistics(), "grad logits": self.grad_logits()}
        if "token_weight" in self.inputs:
            full = self.row_gradient() * self.row
            sizes["grad token_weight"] = full
            if shift := self.o.get("shift", 0):
                moved = torch.zeros_like(full)
                moved[..., shift:] = full[..., : max(full.shape[-1] - shift, 0)]
                sizes["grad token_weight"] = moved
        return sizes


class Expected:
    """What the reference says in float64, in this dtype, and how far they are apart."""

    function = staticmethod(reference.masked_cross_entropy)
    differentiable: tuple = DIFFERENTIABLE  # the first has the rows
    tie = 1e-5  # logits that are no further apart, relatively, may take each other's place

    def __init__(self, inputs, upstream=None, **options):
        f, leaves = self.function, self.differentiable
        dtype = inputs[leaves[0]].dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.in_dtype = evaluate(f, inputs, upstream, differentiable=leaves, **options)

        def of(kind):
            given = [inputs[name].dtype for name in FLOATING_INPUTS if name in inputs]
            if all(dtype == kind for dtype in given):
                return self.in_dtype
            return evaluate(f, converted(inputs, kind), upstream, differentiable=leaves, **options)

        unrounded, self.truth = of(wide), of(torch.float64)
        doubled = converted(inputs, torch.float64)
        # 0 by cancelling, to rounding: 1 - p, and 1 - tanh^2, of large ones in float64.
        self.sums = ("loss", *STATISTICS, "grad logits", "grad token_weight")
        self.floor = {}
        self.logits = self.logits_of(doubled)
        self.capped = self.logits
        if (softcap := options.get("softcap")) is not None:  # which brings large ones together
            self.capped = softcap * torch.tanh(self.logits / softcap)
        self.floor = {}
        if min(self.logits.shape) == 0:
            self.size = {name: value.double() for name, value in self.truth.items()}
            self.relative_error = dict.fromkeys(self.truth, 0.0)
            return
        self.size, largest_slope = self.sizes(doubled, upstream, options, dtype)
        eps, tiny = torch.finfo(wide).eps, torch.finfo(wide).tiny
        terms = math.log2(self.logits.numel())
        self.relative_error = {}
        for name, size in self.size.items():
            error = ((unrounded[name].double() - self.truth[name]).abs() / size)[size > 0]
            error = error[error.isfinite()]
            largest = error.max().item() if error.numel() else 0.0
            self.relative_error[name] = max(largest, (terms + ROUNDINGS_OF_A_TERM) * eps / 2)
            self.floor[name] = LOST_EXPONENTIAL * tiny * largest_slope.get(name, 1.0)

    def logits_of(self, doubled):
        return doubled["logits"]

    def sizes(self, doubled, upstream, options, dtype):
        """Of each result, and the largest factor of an exponential in each gradient."""
        found = Magnitudes(doubled, upstream, options, dtype == torch.float64)
        return found.all(), {"grad logits": found.largest}


def assert_all_accurate(actual, expected, what=""):
    """``actual``: what ``evaluate`` returned, with or without statistics."""
    for name in actual:
        if name in ("hit", "argmax"):
            _assert_same_choice(actual[name], expected, name, what)
        else:
            assert_accurate(actual[name], expected, name, what)


def _assert_same_choice(actual, expected, name, what):
    assert actual.dtype == {"hit": torch.bool, "argmax": torch.int64}[name]
    wrong = actual != expected.truth[name]
    if not wrong.any():
        return
    # A temperature or a cap may make different logits equal by rounding; then the first is taken.
    values, chosen = expected.capped, expected.truth["argmax"].unsqueeze(-1)
    top = values.amax(-1, keepdim=True)
    near = top - values < expected.tie * top.abs()
    near &= expected.logits != expected.logits.gather(-1, chosen)
    if name == "argmax":
        near = near.gather(-1, actual.unsqueeze(-1))
    assert_same_places(wrong & ~near.any(-1), torch.zeros_like(wrong), f"{what}: {name}")
