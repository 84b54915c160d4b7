# SPDX-License-Identifier: BSD-3-Clause
"""Modules for pipelines that hand a dict from one to the next: draw, pack, attend, unpack."""

from .pipeline_dropout import AttentionMaskedNestedDropout, MaskedNestedDropout
from .pipeline_ids import (
    generate_nested_dropout_attention_mask,
    generate_nested_dropout_mask_ids,
)
from .pipeline_packer import NestedDropoutSequencePacker
from .pipeline_unpacker import SequenceUnpacker

__all__ = [
    "AttentionMaskedNestedDropout",
    "MaskedNestedDropout",
    "NestedDropoutSequencePacker",
    "SequenceUnpacker",
    "generate_nested_dropout_attention_mask",
    "generate_nested_dropout_mask_ids",
]
