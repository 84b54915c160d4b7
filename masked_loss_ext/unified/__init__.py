# SPDX-License-Identifier: BSD-3-Clause
"""The unified loss and its parts, each of them usable alone."""

from .anti_repetition import AdaptiveAntiRepetitionLoss, AntiRepetitionLoss
from .composite import AdaptiveLossScaling, CompositeLoss
from .contrastive import ContrastiveLoss
from .diversity import DiversityLoss
from .hidden_state_mtp import MultiTokenPredictionLoss
from .moe import AuxiliaryFreeMoEBalancer, AuxiliaryLoss
from .simple import ConsistencyLoss, FocalLoss, LabelSmoothingLoss, PerplexityLoss

__all__ = [
    "AdaptiveAntiRepetitionLoss",
    "AdaptiveLossScaling",
    "AntiRepetitionLoss",
    "AuxiliaryFreeMoEBalancer",
    "AuxiliaryLoss",
    "CompositeLoss",
    "ConsistencyLoss",
    "ContrastiveLoss",
    "DiversityLoss",
    "FocalLoss",
    "LabelSmoothingLoss",
    "MultiTokenPredictionLoss",
    "PerplexityLoss",
]
