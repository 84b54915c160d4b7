# SPDX-License-Identifier: BSD-3-Clause
"""The operators as their CUDA sources compute them, run by the simulator of cuda_sim."""

import functools
import re

import torch
from cuda_sim import ORDERS, Simulator, build, mirror_schemas
from cuda_sim.build import COUNTING_FLAGS, ROOT

import masked_loss_ext  # noqa: F401  its schemas are mirrored
from masked_loss_ext.build.sources import CUDA_HOST_SOURCES, CUDA_SOURCES

ARGUMENTS = ("prediction", "target", "mask", "edit_mask", "weighting")
READER = re.compile(r"(Direct|Any)Reader<(?:c10::)?([\w, ]+)>")


def _simulator(name, namespace, kernel_flags=()):
    """All CUDA sources in one library, and the schemas its operators are registered for."""
    schemas = mirror_schemas(target=namespace)
    sources = [ROOT / "csrc" / source for source in CUDA_SOURCES + CUDA_HOST_SOURCES]
    sim = Simulator(build(name, sources, kernel_flags=kernel_flags))
    sim.schemas = schemas  # must live as long
    sim.ops = getattr(torch.ops, namespace)
    return sim


@functools.cache
def simulator():
    return _simulator("product", "masked_loss_ext_sim")


@functools.cache
def counting_simulator():
    """The same, slower: it tells how often each element of a tensor was read and written."""
    namespace = "masked_loss_ext_counted"
    flags = [*COUNTING_FLAGS, f"-DMASKED_LOSS_EXT_CUDA_LIBRARY={namespace}"]
    return _simulator("counted", namespace, flags)


class Uploader:
    """Tensors for the simulated device, or for another that uploads and downloads them."""

    def __init__(self, device=None):
        self.sim = device or simulator()
        self.ops = self.sim.ops

    def upload(self, tensor):
        """Tensors that lie on the device already stay as they are."""
        if tensor is None or (tensor.numel() > 0 and self.sim.holds(tensor)):
            return tensor
        return self.sim.upload(tensor)


class SimulatedOperator(Uploader):
    """masked_squared_error and its backward on tensors that are uploaded and downloaded again.

    Inputs are read-only there, and a write to them ends the process. Outputs start as NaN or -1.
    """

    def __init__(self, device=None):
        super().__init__(device)
        self.forward = self.ops.masked_squared_error
        self.backward = self.ops._masked_squared_error_backward

    def __call__(
        self,
        inputs,
        grad_loss=None,
        needs=None,
        order=ORDERS[0],
        foreground_weight=2.0,
        background_weight=1.0,
        reduction="mean",
    ):
        """{"loss": ..., "grad prediction": ..., ...} as accuracy.evaluate() has it, and the count.

        needs: which gradients of prediction, target, weighting; all that there are by default.
        """
        options = (foreground_weight, background_weight, reduction, inputs.get("loss", "mse"))
        options += (self.upload(inputs.get("delta")),)
        weighting = inputs["weighting"]
        if needs is None:
            needs = (True, True, weighting is not None)
        args = [self.upload(inputs[name]) for name in ARGUMENTS]
        with self.sim.order(order):
            loss, count = self.forward(*args, *options)
            results = {"loss": self.sim.download(loss)}
            if grad_loss is None:
                grad_loss = torch.ones_like(results["loss"])
            grad_loss = self.upload(grad_loss.to(results["loss"].dtype))
            grads = self.backward(grad_loss, *args, *options, count, *needs)
        for needed, name, grad in zip(needs, ARGUMENTS[:2] + ARGUMENTS[4:], grads, strict=True):
            assert needed or grad.shape == (0,), name
            if needed:
                results[f"grad {name}"] = self.sim.download(grad)
        if needs[2]:  # the last step is torch's, as in ops/masked_squared_error.py
            grad = results["grad weighting"].sum_to_size(weighting.shape)
            results["grad weighting"] = grad.to(weighting.dtype)
        return results, self.sim.download(count).item()

    def readers(self):
        """How each launch since the last reset() reads: "Direct float, 4" is packs of 4 floats,
        "Any float" is element by element of any dtype and strides."""
        found = [READER.search(launch) for launch in self.sim.launches()]
        return [f"{match[1]} {match[2]}" for match in found if match]


@functools.cache
def simulated_operator(device=None):
    """One for all test files."""
    return SimulatedOperator(device)
