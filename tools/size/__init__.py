# SPDX-License-Identifier: BSD-3-Clause
"""Time and memory of calls over their sizes: ``python -m tools.size``."""
