# SPDX-License-Identifier: BSD-3-Clause
"""The unified loss and its parts, each of them usable alone."""

from .composite import AdaptiveLossScaling, CompositeLoss
from .consistency import ConsistencyLoss
from .contrastive import ContrastiveLoss
from .deepseek import DeepSeekLoss
from .experts import AuxiliaryFreeMoEBalancer, AuxiliaryLoss, DiversityLoss
from .hidden_state_mtp import MultiTokenPredictionLoss
from .multi_token import AdaptiveMTPLoss
from .penalties import (
    AdaptiveAntiRepetitionLoss,
    AntiRepetitionLoss,
    NGramRepetitionPenalty,
    SequenceRepetitionDetector,
)
from .simple import FocalLoss, LabelSmoothingLoss, PerplexityLoss
from .temperature import TemperatureScaledCrossEntropy
from .unified_loss import UnifiedLoss, create_unified_loss

__all__ = [
    "AdaptiveAntiRepetitionLoss",
    "AdaptiveLossScaling",
    "AdaptiveMTPLoss",
    "AntiRepetitionLoss",
    "AuxiliaryFreeMoEBalancer",
    "AuxiliaryLoss",
    "CompositeLoss",
    "ConsistencyLoss",
    "ContrastiveLoss",
    "DeepSeekLoss",
    "DiversityLoss",
    "FocalLoss",
    "LabelSmoothingLoss",
    "MultiTokenPredictionLoss",
    "NGramRepetitionPenalty",
    "PerplexityLoss",
    "SequenceRepetitionDetector",
    "TemperatureScaledCrossEntropy",
    "UnifiedLoss",
    "create_unified_loss",
]
