# SPDX-License-Identifier: BSD-3-Clause
"""Losses as functions and nn.Module shells, one file per family."""
