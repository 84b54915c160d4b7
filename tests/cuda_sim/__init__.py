# SPDX-License-Identifier: BSD-3-Clause
"""CUDA kernels on the host, for tests: see cuda_sim.h for what is simulated."""

from .build import build, compiler
from .simulator import ORDERS, Simulator, mirror_schemas

__all__ = ["ORDERS", "Simulator", "build", "compiler", "mirror_schemas"]
