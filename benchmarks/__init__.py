# SPDX-License-Identifier: BSD-3-Clause
"""Measurements of masked_loss_ext beside the same formulas in PyTorch: ``python -m benchmarks``."""

BENCHMARKS = ("squared_error", "cross_entropy", "block_mask")
"""Every module of this package that offers ``cases(device, quick)``; each is a subcommand."""
