# SPDX-License-Identifier: BSD-3-Clause
"""Runs the probe kernels, here or in a process of its own where the launch is to end it."""

import faulthandler
import os
import resource
import warnings

import torch

from .build import HERE, ROOT, build
from .simulator import Simulator

DEVICE = ROOT / "csrc" / "common" / "cuda" / "device.cpp"  # what the product launches with


def _triple(value):
    return list(value) if isinstance(value, tuple) else [value, 1, 1]


class Probes:
    """The probe kernels under their simulator."""

    def __init__(self, runtime_flags=()):
        self.sim = Simulator(build("probes", [*sorted(HERE.glob("*.cu")), DEVICE], runtime_flags))

    def launch(self, name, x, y, n=0, grid=1, block=32, smem=0):
        """Launch on uploaded tensors."""
        torch.ops.cuda_sim_probe.run(name, x, y, n, _triple(grid), _triple(block), smem)

    def __call__(self, name, x, size, n=0, grid=1, block=32, smem=0, order="ascending"):
        """y after a launch with x, where y starts as `size` zeros."""
        with self.sim.order(order):
            y = self.sim.upload(torch.zeros(size), writable=True)
            self.launch(name, self.sim.upload(x), y, n, grid, block, smem)
            return self.sim.download(y)


def message_of_abort(action):
    """Run action() in a fork that it has to kill by SIGABRT; return what went to its stderr."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's threads are idle
        child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(write, 2)
        if faulthandler.is_enabled():
            faulthandler.enable(2)  # pytest's copy of stderr would get its traceback
        try:
            action()
        finally:
            os._exit(7)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode(errors="replace")
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == 6, f"status {status}, stderr: {text}"
    return text
