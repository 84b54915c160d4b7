# SPDX-License-Identifier: BSD-3-Clause
"""Losses of more than one process, on torch.distributed as it is."""

from ._count import PendingCount, global_token_count
from ._state import keep_state_local, sync_state
from .vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_linear_row_statistics,
    vocab_parallel_row_statistics,
)

__all__ = [
    "PendingCount",
    "global_token_count",
    "keep_state_local",
    "sync_state",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_linear_row_statistics",
    "vocab_parallel_row_statistics",
]
