# SPDX-License-Identifier: BSD-3-Clause
"""The fixture of tests with several processes."""

from ranks import ranks

__all__ = ["ranks"]
