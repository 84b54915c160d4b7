# SPDX-License-Identifier: BSD-3-Clause
"""The fixture that every test of this room takes."""

from ranks import ranks

__all__ = ["ranks"]
