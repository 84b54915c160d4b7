# SPDX-License-Identifier: BSD-3-Clause
"""Attention masks of packed sequences as row intervals, and nested dropout by masking."""

from .intervals import RowIntervals
from .layout import PackedLayout
from .nested_dropout import nested_dropout_block_mask, sample_keep_k

__all__ = ["PackedLayout", "RowIntervals", "nested_dropout_block_mask", "sample_keep_k"]
