# SPDX-License-Identifier: BSD-3-Clause
"""The unified loss and its parts, each of them usable alone."""

__all__ = []
