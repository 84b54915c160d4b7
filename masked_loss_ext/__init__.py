# SPDX-License-Identifier: BSD-3-Clause
"""Mask-aware losses for PyTorch, as native operators for CPU and CUDA.

What a mask excludes is never read, never touched and never counted.
"""

import sys as _sys

from . import environment as _environment
from ._version import __version__

if _environment.is_program():  # python -m masked_loss_ext: it speaks where the rest cannot load
    _sys.exit(_environment.main())

from .build import loading as _loading  # noqa: E402

_library_kind = _loading.load()  # the operators must exist before what is built on them

from . import distributed, reference  # noqa: E402
from ._aggregate import aggregate_tokens  # noqa: E402
from .attention import (  # noqa: E402
    PackedLayout,
    RowIntervals,
    nested_dropout_block_mask,
    sample_keep_k,
)
from .attention.attend import packed_attention  # noqa: E402
from .attention.pipeline import (  # noqa: E402
    AttentionMaskedNestedDropout,
    MaskedNestedDropout,
    NestedDropoutSequencePacker,
    SequenceUnpacker,
    generate_nested_dropout_attention_mask,
    generate_nested_dropout_mask_ids,
)
from .diagnostics import check_padding  # noqa: E402
from .environment import show_config  # noqa: E402
from .losses.autoencoder import masked_mse, masked_sse  # noqa: E402
from .losses.cross_entropy import MaskedCrossEntropyLoss  # noqa: E402
from .losses.element_mse import MaskEditLoss, MseLoss  # noqa: E402
from .losses.linear_cross_entropy import MaskedLinearCrossEntropyLoss  # noqa: E402
from .losses.multi_token import MultiTokenPredictionLoss  # noqa: E402
from .losses.token_mse import (  # noqa: E402
    AttentionMaskMseLoss,
    ChannelInvariantTokenLoss,
    compute_loss_multi_resolution,
    masked_edit_token_mean_loss,
)
from .ops.linear_cross_entropy import (  # noqa: E402
    linear_row_statistics,
    masked_linear_cross_entropy,
)
from .ops.masked_cross_entropy import masked_cross_entropy, row_statistics  # noqa: E402
from .padding import (  # noqa: E402
    lengths_to_mask,
    map_mask_to_latent,
    mask_labels,
    pad_latents_for_multi_res,
    shift_labels,
    unpad,
)
from .reference import RowStatistics  # noqa: E402
from .unified import MultiTokenPredictionLoss as HiddenStateMTPLoss  # noqa: E402
from .unified import UnifiedLoss, create_unified_loss  # noqa: E402

__all__ = [
    "AttentionMaskMseLoss",
    "AttentionMaskedNestedDropout",
    "ChannelInvariantTokenLoss",
    "HiddenStateMTPLoss",
    "MaskEditLoss",
    "MaskedCrossEntropyLoss",
    "MaskedLinearCrossEntropyLoss",
    "MaskedNestedDropout",
    "MseLoss",
    "MultiTokenPredictionLoss",
    "NestedDropoutSequencePacker",
    "PackedLayout",
    "RowIntervals",
    "RowStatistics",
    "SequenceUnpacker",
    "UnifiedLoss",
    "__version__",
    "aggregate_tokens",
    "check_padding",
    "compute_loss_multi_resolution",
    "create_unified_loss",
    "distributed",
    "generate_nested_dropout_attention_mask",
    "generate_nested_dropout_mask_ids",
    "lengths_to_mask",
    "linear_row_statistics",
    "map_mask_to_latent",
    "mask_labels",
    "masked_cross_entropy",
    "masked_edit_token_mean_loss",
    "masked_linear_cross_entropy",
    "masked_mse",
    "masked_sse",
    "nested_dropout_block_mask",
    "packed_attention",
    "pad_latents_for_multi_res",
    "reference",
    "row_statistics",
    "sample_keep_k",
    "shift_labels",
    "show_config",
    "unpad",
]
