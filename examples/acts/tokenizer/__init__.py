# SPDX-License-Identifier: BSD-3-Clause
"""Packed crops and registers with nested dropout: attention. ``act.run`` is the whole of it."""
