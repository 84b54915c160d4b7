# SPDX-License-Identifier: BSD-3-Clause
"""What a training step sends: messages and bytes, and how long they take on machines of any size.

The formulas stand here once: tests/distributed/test_scale.py counts the messages of real processes
and holds them to be these, and docs/scale.md shows what comes of them for many GPUs.
"""
