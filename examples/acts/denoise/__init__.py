# SPDX-License-Identifier: BSD-3-Clause
"""Padded crops of photographs: squared error. ``act.run`` is the whole of it."""
