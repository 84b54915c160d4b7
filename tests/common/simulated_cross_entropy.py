# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy as its CUDA source computes it, run by the simulator of cuda_sim, and the
accuracy rule that its tests share.

truth    the reference on float64 copies
allowed  4 * (largest error of the reference in the dtype of the loss + a rounding of the largest
         value or, for what a row comes to, of its log-sum-exp), and one rounding of the output
"""

import functools

import torch
from cuda_sim import ORDERS
from simulated import Uploader

from masked_loss_ext import reference

STATISTICS = ("lse", "entropy", "log_prob", "hit", "argmax")
OUTPUTS = ("loss", *STATISTICS, "smooth_distance", "totals", "row_sums")
DIFFERENTIABLE = ("loss", "lse", "entropy", "log_prob")
ROUNDINGS_IN_A_ROW = 64  # in float64; the reference's own error is 0 there


class SimulatedCrossEntropy(Uploader):
    """The forward operator with the keywords of reference.masked_cross_entropy, and its backward.

    Inputs are read-only there, and a write to them ends the process; outputs start as NaN patterns.
    """

    def __init__(self, device=None):
        super().__init__(device)
        self.forward_op = self.ops.masked_cross_entropy
        self.backward_op = self.ops._masked_cross_entropy_backward
        self.overwriting_op = self.ops._masked_cross_entropy_backward_

    def number(self, value):
        return None if value is None else self.upload(torch.as_tensor(value, dtype=torch.float64))

    def __call__(self, logits, target, mask=None, *, order=ORDERS[0], statistics=True, **options):
        """A Call: what the operator returned, on the device and as ordinary tensors."""
        call = Call(self, logits, target, mask, options)
        with self.sim.order(order):
            outputs = self.forward_op(*call.tensors, *call.numbers(), statistics)
        call.device = dict(zip(OUTPUTS, outputs, strict=True))
        call.results = {name: self.sim.download(out) for name, out in call.device.items()}
        return call


class Call:
    """One forward call and what its backward needs of it."""

    def __init__(self, op, logits, target, mask, options):
        o = {"temperature": None, "normalizer": None, "reduction": "mean", "weight": None} | options
        self.op, self.options = op, o
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weight = None if o["weight"] is None else o["weight"].to(wide)
        inputs = (logits, target, mask, weight, o.get("token_weight"), o.get("segment_ids"))
        per_row = isinstance(o["temperature"], torch.Tensor) and o["temperature"].dim() > 0
        upload = op.upload if per_row else op.number
        self.inputs = [*map(op.upload, inputs), upload(o["temperature"])]
        self.tensors = [*self.inputs, op.number(o["normalizer"])]

    def numbers(self):
        o = self.options
        real = [o.get(k) or 0.0 for k in ("label_smoothing", "softcap", "z_loss", "focal_gamma")]
        return (o.get("ignore_index", -100), *real, o.get("shift", 0), o["reduction"])

    def backward(self, upstream, order=ORDERS[0], needs=(True, True), in_place=False):
        """{"logits": ..., "token_weight": ...}; upstream: {"loss": ..., "lse": ...}, say."""
        sim = self.op.sim
        wide = self.results["loss"].dtype
        grads = [upstream.get(name) for name in DIFFERENTIABLE]
        grads = [None if g is None else self.op.upload(g.to(wide)) for g in grads]
        saved = [self.device[name] for name in ("row_sums", "entropy", "log_prob")]
        saved += [self.device["smooth_distance"], self.device["totals"]]
        inputs = [*self.inputs, None]  # no normalizer: the denominator is in the totals
        if in_place:
            inputs[0] = sim.upload(sim.download(inputs[0]), writable=True)
        op = self.op.overwriting_op if in_place else self.op.backward_op
        with sim.order(order):
            arguments = (*grads, *saved, *inputs, *self.numbers(), False, None)
            outputs = op(*arguments, *needs[in_place:])
        outputs = (inputs[0], outputs) if in_place else outputs
        names = ("logits", "token_weight")
        return {name: sim.download(out) for name, out in zip(names, outputs, strict=True)}


@functools.cache
def simulated_cross_entropy(device=None):
    """One for all test files."""
    return SimulatedCrossEntropy(device)


def evaluate(dtype, logits, target, mask, upstream, options):
    """Results and gradients of the reference with everything in `dtype`."""
    options = {name: value for name, value in options.items() if value is not None}
    leaves = [logits.to(dtype).detach().requires_grad_()]
    if "token_weight" in options:
        leaves.append(options["token_weight"].to(dtype).detach().requires_grad_())
        options["token_weight"] = leaves[1]
    loss, stats = reference.masked_cross_entropy(
        leaves[0], target, mask, return_stats=True, **options
    )
    results = {"loss": loss, **stats._asdict()}
    total = sum((upstream[name].to(dtype) * results[name]).sum() for name in upstream)
    grads = torch.autograd.grad(total, leaves)
    for name, grad in zip(("logits", "token_weight"), grads, strict=False):
        results[f"grad {name}"] = grad
    return {name: result.detach() for name, result in results.items()}


def random_upstream(logits, reduction, statistics):
    """Incoming gradients of the loss and, where asked for, of the statistics."""
    rows = logits.shape[:-1]
    upstream = {"loss": torch.rand(rows if reduction == "none" else ()) + 0.5}
    if statistics:
        upstream |= {name: torch.randn(rows) for name in DIFFERENTIABLE[1:]}
    return upstream


def assert_close(actual, truth, in_dtype, what, size=0.0):
    """The rule above; places of NaN, inf and exact 0 apart."""
    assert actual.shape == truth.shape, f"{what}: {list(actual.shape)} for {list(truth.shape)}"
    if not actual.dtype.is_floating_point:
        assert torch.equal(actual, truth), what
        return
    rounded = truth.to(actual.dtype)
    assert torch.equal(actual.isnan(), truth.isnan()), f"{what}: NaN in other places"
    infinite = rounded.isinf()
    assert torch.equal(actual[infinite], rounded[infinite]), f"{what}: inf in other places"
    finite = rounded.isfinite()
    actual, truth, in_dtype = (t[finite].double() for t in (actual, truth, in_dtype))
    if truth.numel() == 0:
        return
    info, wide = torch.finfo(rounded.dtype), torch.float64
    eps = torch.finfo(wide if rounded.dtype == wide else torch.float32).eps
    roundings = ROUNDINGS_IN_A_ROW if rounded.dtype == wide else 1
    size = max(truth.abs().max().item(), size)
    error = (in_dtype - truth).abs().nan_to_num(0).max() + roundings * eps * size
    allowed = 4 * error + info.eps * truth.abs() + info.tiny * info.eps
    excess = (actual - truth).abs() - allowed
    assert excess.max() <= 0, f"{what}: off by {(actual - truth).abs().max():.3g}"


def check(op, logits, target, mask=None, *, upstream=None, **options):
    """Forward, backward, backward in place against the reference; returns results and gradients."""
    reduction = options.get("reduction", "mean")
    if upstream is None:
        upstream = random_upstream(logits, reduction, True)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    upstream = {name: grad.to(wide) for name, grad in upstream.items()}
    call = op(logits, target, mask, **options)
    grads = call.backward(upstream)
    results = call.results | {f"grad {name}": grad for name, grad in grads.items()}
    truth = evaluate(torch.float64, logits, target, mask, upstream, options)
    in_dtype = evaluate(wide, logits, target, mask, upstream, options)
    what = f"{logits.dtype} {list(logits.shape)} {list(options)}"
    lse = truth["lse"].abs().nan_to_num(0, 0, 0)
    for name in truth:
        size = lse.max().item() if name in OUTPUTS and lse.numel() else 0.0
        assert_close(results[name], truth[name], in_dtype[name], f"{what} {name}", size)
    assert results["loss"].dtype == wide and results["grad logits"].dtype == logits.dtype
    over = call.backward(upstream, in_place=True)
    for name, grad in grads.items():
        assert over[name].equal(grad) or grad.isnan().any(), f"{what} in place {name}"
    return results


class SimulatedSweep(Uploader):
    """The operators that make the gradient with the loss, and what scales it afterwards."""

    def __init__(self, device=None):
        super().__init__(device)
        self.device = device
        self.fresh_op = self.ops._masked_cross_entropy_sweep
        self.overwriting_op = self.ops._masked_cross_entropy_sweep_
        self.scale_op = self.ops._masked_cross_entropy_scale_gradient_

    def __call__(self, logits, target, mask=None, *, order=ORDERS[0], in_place=False, **options):
        """(loss, gradient), on the device."""
        call = Call(simulated_cross_entropy(self.device), logits, target, mask, options)
        inputs = list(call.tensors)
        if in_place:
            inputs[0] = self.sim.upload(self.sim.download(inputs[0]), writable=True)
        with self.sim.order(order):
            if in_place:
                return self.overwriting_op(*inputs, *call.numbers()), inputs[0]
            return self.fresh_op(*inputs, *call.numbers())

    def scale(self, gradient, factor, order=ORDERS[0]):
        """In place; gradient: on the device."""
        wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
        with self.sim.order(order):
            self.scale_op(gradient, self.upload(torch.tensor(factor, dtype=wide)))


@functools.cache
def simulated_sweep(device=None):
    """One for all test files."""
    return SimulatedSweep(device)


def check_sweep(sweep, logits, target, mask=None, order=ORDERS[0], **options):
    """Fresh and in place against the reference; returns loss and gradient."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    one = {"loss": torch.ones((), dtype=wide)}
    truth = evaluate(torch.float64, logits, target, mask, one, options)
    in_dtype = evaluate(wide, logits, target, mask, one, options)
    what = f"{logits.dtype} {list(logits.shape)} {list(options)}"
    lse = truth["lse"].abs().nan_to_num(0, 0, 0)
    size = lse.max().item() if lse.numel() else 0.0
    for in_place in (True, False):
        results = sweep(logits, target, mask, order=order, in_place=in_place, **options)
        loss, gradient = map(sweep.sim.download, results)
        assert loss.dtype == wide and gradient.dtype == logits.dtype
        name = f"{what} in place" if in_place else what
        assert_close(loss, truth["loss"], in_dtype["loss"], f"{name} loss", size)
        assert_close(gradient, truth["grad logits"], in_dtype["grad logits"], f"{name} gradient")
    assert gradient.is_contiguous()
    return loss, gradient
