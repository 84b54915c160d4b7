# SPDX-License-Identifier: BSD-3-Clause
"""The unified family: constructors by the names of their arguments, calls by the table of
tests/common/unified_cases.py."""

import inspect

import torch

from masked_loss_ext import unified as u
from tests.common.unified_cases import CASES, batch
from tests.invalid.calling import Entry
from tests.invalid.entries import CONSTRUCTOR
from tests.invalid.kinds import (
    FINE,
    changed,
    choice,
    first,
    flag,
    floats,
    integers,
    labels,
    list_of,
    mask,
    number,
    number_or_weights,
    one_is_any,
    unnamed,
    whole,
)

MOST = 2**31 - 1
TOKEN = whole(least=-(2**63), most=2**63 - 1)
KINDS = {
    "alpha focal_alpha": (0.5, number_or_weights),
    "penalty_weight margin diversity_weight balance_loss_weight target_balance_ratio "
    "gradient_balance_weight load_balancing_weight router_z_weight expert_diversity_weight "
    "mtp_weight repetition_penalty_weight diversity_bonus_weight initial_repetition_weight "
    "final_repetition_weight initial_eos_weight final_eos_weight adaptation_rate "
    "primary_loss_weight additional_loss_base_weight ngram_penalty_weight "
    "immediate_repetition_weight": (0.5, number()),
    "temperature initial_temperature": (1.5, number(above=0)),
    "gamma focal_gamma confidence_reg_strength eos_penalty_weight": (0.5, number(least=0)),
    "threshold momentum label_smoothing smoothing": (0.5, number(least=0, most=1)),
    "vocab_size num_classes hidden_size num_experts ngram_size max_repeat_length": (
        11,
        whole(least=1, most=MOST),
    ),
    "num_losses": (3, whole(least=1, most=2**20)),
    "num_future_tokens": (2, whole(least=1, most=1024)),
    "min_sequence_length warmup_steps": (3, whole(least=0, most=MOST)),
    "ignore_index pad_token_id": (-100, TOKEN),
    "eos_token_id": (1, whole(least=0)),
    "adaptive_temperature use_mtp use_confidence_weighting use_ngram_penalty "
    "use_immediate_repetition_penalty use_moe_balancing use_focal_loss use_diversity_loss "
    "use_auxiliary_loss shift_labels clamp_router_z normalize_topk detach_confidence "
    "shared_projection mask_sources inplace_backward cap_repeats normalize_embeddings "
    "use_threshold mean_over_all": (False, flag),
    "reduction consistency_type similarity_metric loss_type penalty_on focal_mode "
    "primary_loss_type mtp_type": ("", choice),
}
OF_NAME = {name: of for names, of in KINDS.items() for name in names.split()}
DEFAULTS = {"loss_type": "infonce"}
V = {"vocab_size": 11}
TOKENS = V | {"eos_token_id": 1, "pad_token_id": 2}
NEEDS = {
    "TemperatureScaledCrossEntropy": V,
    "UnifiedLoss": V | {"hidden_size": 4},
    "DeepSeekLoss": V | {"hidden_size": 4},
}
# What has a rule of its own, and where it is tested.
ELSEWHERE = {
    ("AuxiliaryFreeMoEBalancer", "expert_outputs"): "taken for older code and not looked at",
    ("TemperatureScaledCrossEntropy", "temperature_bounds"): "tests/unified/test_hostile.py",
    ("AdaptiveLossScaling", "init_weights"): "tests/unified/test_hostile.py",
    ("CompositeLoss", "loss_config"): "tests/unified/test_hostile.py",
    ("AdaptiveAntiRepetitionLoss", "kwargs"): "tests/unified/test_hostile.py",
    ("ContrastiveLoss", "positive_pairs"): "tests/unified/test_contrastive.py",
    ("ContrastiveLoss", "negative_pairs"): "tests/unified/test_contrastive.py",
}


# A part of UnifiedLoss that is on: its options are looked at in any case.
EVERYTHING = {
    "use_mtp": True,
    "num_experts": 4,
    "use_moe_balancing": True,
    "use_focal_loss": True,
}


def constructor(cls, also=(), key=""):
    """also: what is given besides."""
    arguments = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if (cls.__name__, name) in ELSEWHERE or name not in OF_NAME:
            continue
        good, kind = OF_NAME[name]
        if parameter.default not in (None, inspect.Parameter.empty):
            good = parameter.default  # a word of the choice, a weight that others allow for
        arguments[name] = (good, OWN.get((cls.__name__, name), kind))
    given = NEEDS.get(cls.__name__, {}) | dict(also)
    arguments |= {n: (x, arguments[n][1]) for n, x in given.items()}
    needs = dict.fromkeys(arguments, tuple(given))
    key = key or f"{cls.__name__}()"
    return Entry(cls.__name__, lambda: cls, arguments, needs, CONSTRUCTOR, key)


confidence = changed(
    floats,
    **dict.fromkeys(
        (
            *("of_one", "of_a_rank_more", "of_a_rank_less", "longer", "longer_at_the_end"),
            *("empty", "a_number"),
        ),
        FINE,
    ),
)
FORWARD = {
    "logits inputs primary_logits outputs_original embeddings hidden_states gate_logits": (first),
    "outputs_augmented": unnamed(floats),
    "confidence_scores": confidence,
    "targets labels target_ids token_ids": unnamed(labels),
    "attention_mask confidence_mask embedding_mask": one_is_any(mask),
    "segment_ids": one_is_any(integers),
    "expert_indices": unnamed(changed(labels, longer_at_the_end=FINE)),
    "additional_logits expert_outputs losses": list_of(first),
    "update_state is_optimizer_step compute_loss return_detailed return_components": flag,
    "reduction": choice,
    "num_experts": whole(least=1),
    "num_valid": whole(least=0),
    "normalizer": number(least=0, tensor=True),
    "mtp_active": changed(flag, a_tensor=FINE),
}
OF_CALL = {name: kind for names, kind in FORWARD.items() for name in names.split()}
# Of a class and argument, where it is another kind.
OWN = {
    ("ContrastiveLoss", "labels"): unnamed(integers),  # no class
    ("ContrastiveLoss", "embeddings"): changed(first, longer_at_the_end=FINE),
    ("PerplexityLoss", "logits"): changed(first, longer_at_the_end=FINE),
    ("SequenceRepetitionDetector", "logits"): changed(first, longer_at_the_end=FINE),
    ("FocalLoss", "inputs"): changed(first, longer_at_the_end=None),  # by the weights it has
    ("DiversityLoss", "attention_mask"): mask,
    ("AuxiliaryLoss", "attention_mask"): mask,
    ("FocalLoss", "targets"): changed(unnamed(labels), of_one=None),
    ("LabelSmoothingLoss", "targets"): one_is_any(unnamed(labels)),
    ("PerplexityLoss", "targets"): one_is_any(unnamed(labels)),
    # What is added for its gradient alone is no 0 in float32.
    ("AuxiliaryFreeMoEBalancer", "gate_logits"): changed(first, with_a_gradient=FINE),
    ("DeepSeekLoss", "gate_logits"): changed(first, with_a_gradient=FINE),
    ("UnifiedLoss", "gate_logits"): changed(first, with_a_gradient=FINE),
    ("AntiRepetitionLoss", "eos_penalty_weight"): number(),
    ("AdaptiveAntiRepetitionLoss", "eos_penalty_weight"): number(),
    ("UnifiedLoss", "num_future_tokens"): whole(least=1, most=MOST),  # of heads that are off
    ("DeepSeekLoss", "hidden_size"): changed(whole(least=1, most=MOST), **{"None": None}),
}
GOOD = {
    "segment_ids": torch.zeros(3, 7, dtype=torch.int64),
    "reduction": "mean",
    "num_valid": 21,
    "normalizer": 3.0,
}


def call(case):
    """With what the case gives, and flags."""
    name, given, arguments = type(case.make()).__name__, case.inputs(batch()), {}
    for argument, parameter in inspect.signature(case.make().forward).parameters.items():
        is_flag = isinstance(parameter.default, bool) and argument != "mtp_active"
        good = parameter.default if is_flag else given.get(argument, GOOD.get(argument))
        if good is not None and argument in OF_CALL:
            kind = OWN.get((name, argument), OF_CALL[argument])
            arguments[argument] = (given.get(argument, good), kind)
    needs = dict.fromkeys(arguments, tuple(given))
    return Entry(name, lambda: case.make().forward, arguments, needs, key=case.name)


CLASSES = [getattr(u, name) for name in u.__all__ if inspect.isclass(getattr(u, name))]
ENTRIES = [constructor(cls) for cls in CLASSES if cls is not u.CompositeLoss]
ENTRIES += [constructor(u.UnifiedLoss, EVERYTHING, "UnifiedLoss(everything)")]
ENTRIES += [call(case) for case in CASES if not case.name.startswith("composite")]
