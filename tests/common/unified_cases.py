# SPDX-License-Identifier: BSD-3-Clause
"""One table of the modules of masked_loss_ext.unified, for the laws that hold for all of them.

A case names a module, the entries of a batch that its forward takes, and which of its results is
the loss. To have another module tested, add a row to CASES.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from masked_loss_ext import unified

CLASSES, HIDDEN, EXPERTS, TOP_K = 11, 6, 4, 2
EOS, PAD = 9, 10


def batch(rows=3, length=7, dtype=torch.float32, seed=0, mask=None):
    """Every input that any module takes. Rows end in padding; the last is nothing else."""
    g = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=g)

    tokens = rows * length
    lengths = torch.linspace(length, 0, max(rows, 1)).round().long()[:rows]
    if mask is None:
        mask = torch.arange(length) < lengths[:, None]
    return {
        "logits": noise(rows, length, CLASSES),
        "other_logits": noise(rows, length, CLASSES),
        "targets": integers(EOS + 1, rows, length),
        "attention_mask": mask,
        "hidden_states": noise(rows, length, HIDDEN),
        "additional_logits": [noise(rows, length, CLASSES) for _ in range(2)],
        "confidence": noise(rows, length, 1).sigmoid(),
        "gate_logits": noise(rows, length, EXPERTS),
        "expert_indices": integers(EXPERTS, rows, length, TOP_K),
        "expert_outputs": [noise(tokens, HIDDEN) for _ in range(EXPERTS)],
        "embeddings": noise(tokens, HIDDEN),
        "embedding_labels": integers(3, tokens),
        "embedding_mask": mask.flatten(),
        "losses": noise(5),
    }


@dataclass(frozen=True)
class Case:
    """make() -> module; takes: forward's keyword -> entry of the batch (those that are floating
    get a gradient, and NaN is stored where ``masked`` ones are masked)."""

    name: str
    make: Callable[[], torch.nn.Module]
    takes: dict[str, str]
    loss: Callable[[Any], torch.Tensor] = lambda result: result
    constants: dict[str, Any] = field(default_factory=dict)
    masked: tuple[str, ...] = ("logits",)  # entries of which nothing is read where masked
    mask: str | None = "attention_mask"  # the entry that masks them
    empty_is_zero: bool = True

    def inputs(self, entries):
        return {key: entries[name] for key, name in self.takes.items()} | self.constants

    def __call__(self, module, entries):
        return self.loss(module(**self.inputs(entries)))


def floating(entries, names):
    """The floating tensors among these entries, lists among them taken apart."""
    found = []
    for name in names:
        value = entries[name]
        found += [
            x
            for x in (value if isinstance(value, list) else [value])
            if isinstance(x, torch.Tensor) and x.is_floating_point()
        ]
    return found


TOKENS = {"targets": "targets", "attention_mask": "attention_mask"}
LOGITS = {"logits": "logits", **TOKENS}
INPUTS = {"inputs": "logits", **TOKENS}
ROUTING = {
    "gate_logits": "gate_logits",
    "expert_indices": "expert_indices",
    "attention_mask": "attention_mask",
}
OUTPUTS = {"expert_outputs": "expert_outputs", "attention_mask": "attention_mask"}
PAIR = {
    "outputs_original": "logits",
    "outputs_augmented": "other_logits",
    "confidence_mask": "attention_mask",
}
EMBEDDINGS = {"embeddings": "embeddings", "embedding_mask": "embedding_mask"}
MTP = {
    "hidden_states": "hidden_states",
    "target_ids": "targets",
    "attention_mask": "attention_mask",
}
PAIRS = torch.tensor([[0, 1], [2, 4], [3, 3], [4, 0]])
BOTH = ("logits", "other_logits")


def by_key(key):
    return lambda result: result[key]


def anti_repetition(adaptive=False):
    cls = unified.AdaptiveAntiRepetitionLoss if adaptive else unified.AntiRepetitionLoss
    return cls(CLASSES, EOS, PAD, ngram_size=2)


def contrastive(loss_type):
    return Case(
        f"contrastive_{loss_type}",
        lambda: unified.ContrastiveLoss(loss_type=loss_type),
        {**EMBEDDINGS, "labels": "embedding_labels"},
        masked=("embeddings",),
        mask="embedding_mask",
    )


ADAPTIVE = {"additional_logits": "additional_logits", "confidence_scores": "confidence"}
EVERYTHING = {
    "use_mtp": True,
    "ngram_size": 2,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "min_sequence_length": 4,
    "num_experts": EXPERTS,
    "use_moe_balancing": True,
    "use_focal_loss": True,
    "use_diversity_loss": True,
    "use_auxiliary_loss": True,
}


def unified_case(name, takes, masked, **options):
    return Case(
        name,
        lambda: unified.UnifiedLoss(CLASSES, HIDDEN, **options),
        takes,
        masked=masked,
        constants={"mtp_active": True} if "confidence_scores" in takes else {},
    )


def end_to_end():
    """UnifiedLoss with nothing, with everything, and each of its kinds."""
    hidden = {"hidden_states": "hidden_states"}
    all_of_it = LOGITS | hidden | ROUTING | OUTPUTS
    read = ("logits", "hidden_states", "gate_logits", "expert_outputs")
    heads, masked = LOGITS | ADAPTIVE, ("logits", "additional_logits", "confidence")
    kinds = {"penalty_on": "model", "eos_token_id": EOS, "focal_mode": "add"}
    other = {"primary_logits": "other_logits"}
    return [
        unified_case("unified_defaults", LOGITS, ("logits",)),
        unified_case("unified_everything", all_of_it, read, **EVERYTHING),
        unified_case("unified_model", all_of_it, read, **EVERYTHING | kinds),
        unified_case("unified_shifted", all_of_it, read, **EVERYTHING | {"shift_labels": True}),
        unified_case(
            "unified_standard", LOGITS, ("logits",), primary_loss_type="standard", **kinds
        ),
        unified_case("unified_heads", heads, masked, primary_loss_type="adaptive_mtp", **kinds),
        unified_case(
            "unified_other_logits",
            heads | other,
            (*masked, "other_logits"),
            primary_loss_type="adaptive_mtp",
        ),
        unified_case("unified_second_heads", heads, masked, use_mtp=True, mtp_type="adaptive"),
    ]


CASES = [
    Case("focal", lambda: unified.FocalLoss(0.5), INPUTS),
    Case(
        "focal_classes",
        lambda: unified.FocalLoss(torch.linspace(0.1, 2, CLASSES, dtype=torch.float32)),
        INPUTS,
    ),
    Case("label_smoothing", lambda: unified.LabelSmoothingLoss(CLASSES), INPUTS),
    Case("perplexity", unified.PerplexityLoss, LOGITS, by_key("loss")),
    *(
        Case(
            f"consistency_{kind}",
            lambda kind=kind: unified.ConsistencyLoss(kind, 2.0),
            PAIR,
            masked=BOTH,
        )
        for kind in ("mse", "kl", "ce")
    ),
    *(
        Case(
            f"diversity_{metric}",
            lambda metric=metric: unified.DiversityLoss(metric),
            OUTPUTS,
            masked=("expert_outputs",),
        )
        for metric in ("cosine", "l2", "dot")
    ),
    *(contrastive(kind) for kind in ("infonce", "standard", "triplet")),
    Case(
        "moe_balancer",
        lambda: unified.AuxiliaryFreeMoEBalancer(EXPERTS, balance_loss_weight=1.0),
        ROUTING,
        lambda result: result["balancing_term"] + result["balance_loss"],
        {"compute_loss": True},
        masked=("gate_logits",),
    ),
    Case(
        "auxiliary",
        lambda: unified.AuxiliaryLoss(1.0, 1.0, 1.0),
        ROUTING | OUTPUTS,
        lambda result: sum(result.values()),
        {"num_experts": EXPERTS},
        masked=("gate_logits", "expert_outputs"),
    ),
    *(
        Case(
            "mtp_shared" if shared else "mtp",
            lambda shared=shared: unified.MultiTokenPredictionLoss(
                CLASSES, HIDDEN, shared_projection=shared
            ),
            MTP,
            by_key("mtp_loss"),
            masked=("hidden_states",),
        )
        for shared in (False, True)
    ),
    *(
        Case(
            "adaptive_anti_repetition" if adaptive else "anti_repetition",
            lambda adaptive=adaptive: anti_repetition(adaptive),
            {"logits": "logits", "labels": "targets", "attention_mask": "attention_mask"},
            by_key(0),
        )
        for adaptive in (False, True)
    ),
    Case(
        "adaptive_scaling",
        lambda: unified.AdaptiveLossScaling(5, [1, 2, 3, 4, 5]),
        {"losses": "losses"},
        by_key(0),
        masked=(),
        mask=None,
        empty_is_zero=False,
    ),
    Case(
        "composite",
        lambda: unified.CompositeLoss(
            {
                "tokens": {"type": "label_smoothing", "num_classes": CLASSES},
                "auxiliary": {"weight": 2.0, "router_z_weight": 1.0},
                "moe_balancing": {"num_experts": EXPERTS},
            }
        ),
        INPUTS | ROUTING,
        by_key("total"),
        {"num_experts": EXPERTS},
        masked=("logits", "gate_logits"),
    ),
    *(
        Case(
            f"temperature_{on}",
            lambda on=on: unified.TemperatureScaledCrossEntropy(
                0.8, vocab_size=CLASSES, eos_token_id=EOS, penalty_on=on
            ),
            LOGITS,
            by_key("loss"),
        )
        for on in ("targets", "model")
    ),
    Case(
        "adaptive_mtp",
        lambda: unified.AdaptiveMTPLoss(CLASSES, label_smoothing=0.1),
        {"primary_logits": "logits", **TOKENS, **ADAPTIVE},
        by_key("loss"),
        {"mtp_active": True},
        masked=("logits", "additional_logits", "confidence"),
    ),
    *(
        Case(
            f"ngram_{on}",
            lambda on=on: unified.NGramRepetitionPenalty(2, 0.1, CLASSES, penalty_on=on),
            LOGITS,
            by_key("total_repetition_penalty"),
        )
        for on in ("targets", "model")
    ),
    Case(
        "immediate_repetition",
        lambda: unified.SequenceRepetitionDetector(penalty_on="model"),
        {"token_ids": "targets", "attention_mask": "attention_mask", "logits": "logits"},
        by_key("immediate_repetition_penalty"),
    ),
    Case(
        "deepseek",
        lambda: unified.DeepSeekLoss(CLASSES, HIDDEN, EXPERTS, eos_token_id=EOS),
        LOGITS
        | {
            "hidden_states": "hidden_states",
            "gate_logits": "gate_logits",
            "expert_indices": "expert_indices",
        },
        by_key("total_loss"),
        masked=("logits", "hidden_states", "gate_logits"),
    ),
    *end_to_end(),
]
BY_NAME = {case.name: case for case in CASES}
