# SPDX-License-Identifier: BSD-3-Clause
"""Random malformed calls straight at the operators, in child processes that may die of them."""
