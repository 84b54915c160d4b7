# SPDX-License-Identifier: BSD-3-Clause
"""The integer operators as their CUDA source computes them, run by the simulator of cuda_sim."""

import functools

import torch
from cuda_sim import ORDERS
from simulated import Uploader


class SimulatedBlockMask(Uploader):
    """Operators by name, on tensors that are uploaded, their results downloaded again.

    Inputs are read-only there, and a write to them ends the process. Outputs start as -1.
    """

    def __call__(self, name, *args, order=ORDERS[0]):
        operator = getattr(self.ops, name)
        args = [self.upload(a) if isinstance(a, torch.Tensor) else a for a in args]
        with self.sim.order(order):
            return [self.sim.download(result) for result in operator(*args)]


@functools.cache
def simulated_block_mask(device=None):
    """One for all test files."""
    return SimulatedBlockMask(device)
