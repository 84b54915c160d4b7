# SPDX-License-Identifier: BSD-3-Clause
"""``make coverage``: which lines of Python, C++ and CUDA the tests run."""
