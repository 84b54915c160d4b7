# SPDX-License-Identifier: BSD-3-Clause
"""Wrong lines, one at a time, and which test says so: `python -m tools.mutation`."""
