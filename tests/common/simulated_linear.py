# SPDX-License-Identifier: BSD-3-Clause
"""The logit-free cross entropy as its CUDA source computes it, run by the simulator of cuda_sim.

truth    reference.masked_linear_cross_entropy on float64 copies
allowed  the rule of simulated_cross_entropy.py, with the error of F.linear and the reference of its
         logits in the dtype of hidden: logits and gradients of halves are halves. That error may be
         none by luck: half a unit of the largest half in the last place is always allowed.
"""

import functools

import torch
import torch.nn.functional as F
from cuda_sim import ORDERS
from simulated import Uploader
from simulated_cross_entropy import DIFFERENTIABLE, OUTPUTS, Call, assert_close, random_upstream

from masked_loss_ext import reference
from masked_loss_ext.reference.cross_entropy import counted_rows
from masked_loss_ext.reference.squared_error import select

LEAVES = ("hidden", "weight", "bias", "token_weight")
NEEDS = (True, True, True, True)
FLOAT_EPS = torch.finfo(torch.float32).eps


class SimulatedLinear(Uploader):
    """The operators with the keywords of reference.masked_linear_cross_entropy.

    Inputs are read-only there, and a write to them ends the process; outputs start as NaN patterns.
    """

    def __init__(self, device=None):
        super().__init__(device)
        self.forward_op = self.ops.linear_cross_entropy
        self.backward_op = self.ops._linear_cross_entropy_backward
        self.sweep_op = self.ops._linear_cross_entropy_sweep

    def number(self, value):
        return None if value is None else self.upload(torch.as_tensor(value, dtype=torch.float64))

    def __call__(self, hidden, weight, target, mask=None, *, order=ORDERS[0], **options):
        """A LinearCall: what the operator returned, on the device and as ordinary tensors."""
        call = LinearCall(self, hidden, weight, target, mask, options)
        with self.sim.order(order):
            outputs = self.forward_op(*call.tensors, *call.numbers(), True, *call.more())
        call.device = dict(zip(OUTPUTS, outputs, strict=True))
        call.results = {name: self.sim.download(out) for name, out in call.device.items()}
        return call

    def sweep(self, hidden, weight, target, mask=None, *, order=ORDERS[0], needs=NEEDS, **options):
        """{"loss": ..., "grad hidden": ..., ...}; without elements what was not asked for."""
        call = LinearCall(self, hidden, weight, target, mask, options)
        with self.sim.order(order):
            outputs = self.sweep_op(*call.tensors, *call.numbers(), False, *call.more(), *needs)
        loss, *grads = map(self.sim.download, outputs)
        return {"loss": loss} | named(grads)


def named(grads):
    return {f"grad {name}": grad for name, grad in zip(LEAVES, grads, strict=True)}


class LinearCall(Call):
    """One forward call and what its backward needs of it."""

    def __init__(self, op, hidden, weight, target, mask, options):
        given = options | {"weight": options.get("class_weight")}
        super().__init__(op, hidden, target, mask, given)
        layer = [op.upload(weight), op.upload(options.get("bias"))]
        self.inputs[1:1] = layer
        self.tensors[1:1] = layer

    def more(self):
        o = self.options
        return None, o.get("chunk_rows"), o.get("num_valid"), o.get("fp32_logits", False)

    def backward(self, upstream, order=ORDERS[0], needs=NEEDS):
        """As SimulatedLinear.sweep(); upstream: {"loss": ..., "lse": ...}, say."""
        sim, wide = self.op.sim, self.results["loss"].dtype
        grads = [upstream.get(name) for name in DIFFERENTIABLE]
        grads = [None if g is None else self.op.upload(g.to(wide)) for g in grads]
        saved = [self.device[name] for name in ("row_sums", "entropy", "log_prob")]
        saved += [self.device["smooth_distance"], self.device["totals"]]
        inputs = [*self.inputs, None]  # no normalizer: the denominator is in the totals
        with sim.order(order):
            arguments = (*grads, *saved, *inputs, *self.numbers(), False, *self.more(), *needs)
            outputs = self.op.backward_op(*arguments)
        return named(map(sim.download, outputs))


@functools.cache
def simulated_linear(device=None):
    """One for all test files."""
    return SimulatedLinear(device)


# --- what is right -------------------------------------------------------------------------------


def in_dtype_of_hidden(hidden, weight, target, mask, bias=None, class_weight=None, **options):
    """As masked_linear_cross_entropy of the reference, by F.linear in the dtype of hidden."""
    rows = {name: options[name] for name in ("shift", "segment_ids") if name in options}
    _, on = counted_rows(hidden, target, mask, options.get("ignore_index", -100), **rows)
    logits = F.linear(select(on.unsqueeze(-1), hidden), weight, bias)
    return reference.masked_cross_entropy(logits, target, mask, weight=class_weight, **options)


def evaluate(dtype, hidden, weight, target, mask, upstream, options):
    """Results and gradients with everything in `dtype`: in float64 those of the reference."""
    given = {name: o for name, o in options.items() if o is not None and name not in OURS}
    given |= {"hidden": hidden, "weight": weight}
    leaves = {n: given[n].to(dtype).detach().requires_grad_() for n in LEAVES if n in given}
    given = given | leaves | {"target": target, "mask": mask, "return_stats": True}
    right = reference.masked_linear_cross_entropy if dtype == torch.float64 else in_dtype_of_hidden
    loss, stats = right(**given)
    results = {"loss": loss, **stats._asdict()}
    results = {name: out for name, out in results.items() if out is not None}
    total = sum((upstream[name] * results[name]).sum() for name in upstream)
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    results |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: result.detach() for name, result in results.items()}


OURS = ("chunk_rows", "num_valid", "fp32_logits")


def largest(tensor):
    return tensor.abs().nan_to_num(0, 0, 0).max().item() if tensor.numel() else 0.0


def compare(results, truth, in_dtype, what):
    dtype = results["grad hidden"].dtype
    for name in truth:
        if name not in results:
            continue
        size = largest(truth["lse"]) if name in OUTPUTS else 0.0
        if dtype.itemsize == 2 and name != "hit":
            size = max(size, largest(truth[name])) * torch.finfo(dtype).eps / 8 / FLOAT_EPS
        assert_close(results[name], truth[name], in_dtype[name], f"{what} {name}", size)


def check(op, hidden, weight, target, mask=None, *, upstream=None, **options):
    """Forward and backward, and the sweep of a mean or a sum, against the reference; returns the
    results and gradients of the two."""
    reduction = options.get("reduction", "mean")
    if upstream is None:
        upstream = random_upstream(hidden, reduction, True)
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    upstream = {name: grad.to(wide) for name, grad in upstream.items()}
    what = f"{hidden.dtype} {list(hidden.shape)} {list(weight.shape)} {list(options)}"
    call = op(hidden, weight, target, mask, **options)
    results = call.results | call.backward(upstream)
    given = (hidden, weight, target, mask)
    truth = evaluate(torch.float64, *given, upstream, options)
    compare(results, truth, evaluate(hidden.dtype, *given, upstream, options), what)
    assert results["loss"].dtype == wide and results["grad hidden"].dtype == hidden.dtype
    if reduction == "none":
        return results, {}
    one = {"loss": torch.ones((), dtype=wide)}
    swept = op.sweep(*given, **options)
    truth = evaluate(torch.float64, *given, one, options)
    compare(swept, truth, evaluate(hidden.dtype, *given, one, options), f"{what} swept")
    return results, swept
