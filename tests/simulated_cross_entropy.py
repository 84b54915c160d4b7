# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy as its CUDA source computes it, run by the simulator of cuda_sim."""

import functools

import torch
from cuda_sim import ORDERS
from simulated import Uploader

PER_ROW = ("target", "mask", "token_weight", "segment_ids")
STATISTICS = ("lse", "entropy", "log_prob", "hit")
FORWARD_OUTPUTS = ("loss", *STATISTICS, "smooth_distance", "denominator")


class SimulatedCrossEntropy(Uploader):
    """The forward operator with the keywords of reference.masked_cross_entropy, and its backward.

    Inputs are read-only there, and a write to them ends the process; outputs start as NaN patterns.
    """

    def __init__(self):
        super().__init__()
        ops = torch.ops.masked_loss_ext_sim
        self.forward_op = ops.masked_cross_entropy
        self.backward_op = ops._masked_cross_entropy_backward
        self.backward_op_in_place = ops._masked_cross_entropy_backward_

    def number(self, value):
        return None if value is None else self.upload(torch.as_tensor(value, dtype=torch.float64))

    def forward(self, logits, target, mask=None, *, order=ORDERS[0], statistics=True, **options):
        """A Call: what the operator returned, on the device and as ordinary tensors."""
        call = Call(self, logits, target, mask, options)
        with self.sim.order(order):
            outputs = self.forward_op(*call.tensors, *call.numbers(), statistics)
        call.device = dict(zip(FORWARD_OUTPUTS, outputs, strict=True))
        call.results = {name: self.sim.download(out) for name, out in call.device.items()}
        return call


class Call:
    """One forward call and what its backward needs of it."""

    def __init__(self, op, logits, target, mask, options):
        o = {"temperature": 1.0, "normalizer": None, "reduction": "mean", "weight": None, **options}
        self.op, self.options = op, o
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weight = None if o["weight"] is None else o["weight"].to(wide)
        names = (target, mask, weight, o.get("token_weight"), o.get("segment_ids"))
        temperature = None if o["temperature"] == 1.0 else o["temperature"]
        self.inputs = [op.upload(t) for t in (logits, *names)] + [op.number(temperature)]
        self.tensors = [*self.inputs, op.number(o["normalizer"])]

    def numbers(self):
        o = self.options
        real = (o.get(k) or 0.0 for k in ("label_smoothing", "softcap", "z_loss", "focal_gamma"))
        return (o.get("ignore_index", -100), *real, o.get("shift", 0), o["reduction"])

    def backward(self, grads=None, order=ORDERS[0], needs=(True, True), in_place=False):
        """{"logits": ..., "token_weight": ...} for {"loss": ..., "lse": ...}; for a loss of 1."""
        sim = self.op.sim
        if grads is None:
            grads = {"loss": torch.ones_like(self.results["loss"])}
        grads = [grads.get(name) for name in ("loss", "lse", "entropy", "log_prob")]
        wide = self.results["loss"].dtype
        grads = [None if g is None else self.op.upload(g.to(wide)) for g in grads]
        saved = ("lse", "entropy", "log_prob", "smooth_distance", "denominator")
        saved = [self.device[name] for name in saved]
        inputs = list(self.inputs)
        if in_place:
            inputs[0] = sim.upload(sim.download(inputs[0]), writable=True)
        op = self.op.backward_op_in_place if in_place else self.op.backward_op
        with sim.order(order):
            outputs = op(*grads, *inputs, *saved, *self.numbers(), *needs[in_place:])
        outputs = (inputs[0], outputs) if in_place else outputs
        names = ("logits", "token_weight")
        return {name: sim.download(out) for name, out in zip(names, outputs, strict=True)}


@functools.cache
def simulated_cross_entropy():
    """One for all test files."""
    return SimulatedCrossEntropy()
