# SPDX-License-Identifier: BSD-3-Clause
"""Padded texts: four-token cross entropy. ``act.run`` is the whole of it."""
