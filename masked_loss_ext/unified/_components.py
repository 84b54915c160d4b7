# SPDX-License-Identifier: BSD-3-Clause
"""The components of a UnifiedLoss. One more is one more class here and its place in COMPONENTS (and
its arguments in the signature and documentation of UnifiedLoss).
"""

import warnings
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ._options import LossModule, part_of
from ._rows import Needs, Rows, masked_mean, may_be_on, per_token, smoothed_loss
from ._state import advances
from .experts import AuxiliaryFreeMoEBalancer, AuxiliaryLoss, DiversityLoss
from .hidden_state_mtp import HiddenStateMTPLoss
from .multi_token import AdaptiveMTPLoss
from .penalties import NGramRepetitionPenalty, PenalisesEnds, SequenceRepetitionDetector
from .simple import FocalLoss, LabelSmoothingLoss
from .temperature import TemperatureScaledCrossEntropy


class Call(NamedTuple):
    """One forward of UnifiedLoss, as a component sees it."""

    rows: Rows
    found: Any  # the Read of what the component has asked for
    primary_logits: Tensor | None  # None where they are the logits
    hidden_states: Tensor | None
    additional_logits: Any
    confidence_scores: Tensor | None
    mtp_active: bool | Tensor
    gate_logits: Tensor | None
    expert_indices: Tensor | None
    expert_outputs: Any
    update_state: bool
    replaced: bool  # another loss stands in the total in place of the cross entropy
    memo: dict[str, Tensor]  # what one component has computed and another uses


Term = tuple[Any, dict[str, Any]]  # what joins the total, what is reported


class Component:
    """What makes a loss a summand of UnifiedLoss: its arguments and state are those of the loss."""

    at: ClassVar[str]  # the attribute of UnifiedLoss at which it stands
    switch: ClassVar[str] = ""  # the option that it is on by
    requires: ClassVar[tuple[str, ...]] = ()  # inputs that it cannot do without
    renamed: ClassVar[dict[str, str]] = {}  # its arguments that UnifiedLoss calls otherwise
    replaces_cross_entropy = False

    @classmethod
    def applies(cls, loss: Any) -> bool:
        return bool(getattr(loss, cls.switch))

    def missing(self, call: Call) -> tuple[str, str] | None:
        """An input that there must be, and the option that it is for."""
        for name in self.requires:
            if getattr(call, name) is None:
                return name, self.switch
        return None

    def needs(self, rows: Rows) -> Needs:
        return Needs()

    def term(self, call: Call) -> Term:
        raise NotImplementedError


def of_options(owner: LossModule, cls: type, **given: Any) -> Any:
    """``cls`` as a part of ``owner``, with those of its arguments that are options of it."""
    options = {field.name for field in fields(owner)}
    for name in (field.name for field in fields(cls)):
        option = getattr(cls, "renamed", {}).get(name, name)
        if option in options and name not in given:
            given[name] = getattr(owner, option)
    return part_of(owner.function, cls, **given)


def put_option(component: Any, option: str, value: Any) -> None:
    """A new value of an option of the owner."""
    for name in (field.name for field in fields(component)):
        if component.renamed.get(name, name) == option:
            setattr(component, name, value)


# --- the main loss -------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class _Main(PenalisesEnds, Component):
    """Cross entropy and EOS penalty."""

    eos_token_id: int | None = None
    min_sequence_length: int = 20
    eos_penalty_weight: float = 0.05
    penalty_on: str = "targets"

    at = "main_loss"
    primary_loss_type: ClassVar[str]

    @classmethod
    def applies(cls, loss: Any) -> bool:
        return loss.primary_loss_type == cls.primary_loss_type

    def needs(self, rows: Rows) -> Needs:
        return Needs(scaled=True, classes=self.end_classes(rows))

    def of_terms(self, call: Call, smoothing: float, classes: Any) -> Tensor:
        losses = smoothed_loss(call.found.terms, smoothing, classes)
        return masked_mean(losses, call.rows.valid)

    def joined(self, call: Call, cross_entropy: Tensor, *more: Tensor) -> Term:
        rest = self.end_penalty(call.rows, call.found, cross_entropy)
        for part in more:
            rest = rest + part
        main = cross_entropy + rest
        return rest if call.replaced else main, {"main_loss": main}


@dataclass(eq=False, repr=False)
class Standard(_Main, LabelSmoothingLoss):
    primary_loss_type = "standard"
    renamed = {"num_classes": "vocab_size", "smoothing": "label_smoothing"}

    def term(self, call: Call) -> Term:
        return self.joined(call, self.of_terms(call, self.smoothing, self.num_classes))


@dataclass(eq=False, repr=False)
class DeepSeek(_Main, TemperatureScaledCrossEntropy):
    primary_loss_type = "deepseek"
    needs = TemperatureScaledCrossEntropy.needs

    def term(self, call: Call) -> Term:
        cross_entropy = self.of_terms(call, self.label_smoothing, self.vocab_size)
        term, report = self.joined(call, cross_entropy)
        main = report["main_loss"]
        if advances(self, call.update_state):
            self.record(main, call.rows.valid)
        return term, report | {"main_temperature": self.current_temperature(main)}


class _Heads(Component, AdaptiveMTPLoss):
    renamed = {"additional_loss_base_weight": "mtp_weight"}

    def missing(self, call: Call) -> tuple[str, str] | None:
        if may_be_on(self.function, call.mtp_active) and call.additional_logits is None:
            return "additional_logits", "mtp_active"
        return None

    def heads(self, cross_entropy: Tensor, call: Call) -> dict[str, Any]:
        heads = call.additional_logits, call.confidence_scores, call.mtp_active
        return self.from_primary(cross_entropy, call.rows, *heads, call.update_state)


@dataclass(eq=False, repr=False)
class Adaptive(_Main, _Heads):
    primary_loss_type = "adaptive_mtp"

    def term(self, call: Call) -> Term:
        if call.primary_logits is None:
            cross_entropy = self.of_terms(call, self.label_smoothing, self.vocab_size)
        else:
            cross_entropy = self._cross_entropy("primary_logits", call.primary_logits, call.rows)
        parts = self.heads(cross_entropy, call)
        more = parts["additional_loss"], parts["confidence_reg"]
        term, report = self.joined(call, cross_entropy, *more)
        return term, report | {f"main_{k}": v for k, v in parts.items() if k != "loss"}


@dataclass(eq=False, repr=False)
class Focal(Component, FocalLoss):
    focal_mode: str = "replace"

    at, switch = "focal_loss", "use_focal_loss"
    renamed = {name: f"focal_{name}" for name in ("alpha", "gamma")}

    @property
    def replaces_cross_entropy(self) -> bool:  # type: ignore[override]
        return self.focal_mode == "replace"

    def needs(self, rows: Rows) -> Needs:
        return Needs(unscaled=True)

    def term(self, call: Call) -> Term:
        focal = self.from_log_prob(call.found.terms.log_prob, call.rows.targets, call.rows.valid)
        return None if self.focal_mode == "report" else focal, {"focal_loss": focal}


# --- multi-token prediction ----------------------------------------------------------------------


class _Further(Component):
    """Tokens after the next, where the main loss has no heads of its own."""

    at = "mtp_loss"
    mtp_type: ClassVar[str]

    @classmethod
    def applies(cls, loss: Any) -> bool:
        own_heads = loss.primary_loss_type == "adaptive_mtp"
        return loss.use_mtp and not own_heads and loss.mtp_type == cls.mtp_type


class HiddenStates(_Further, HiddenStateMTPLoss):
    mtp_type = "deepseek"

    def term(self, call: Call) -> Term:
        if call.hidden_states is None:
            return None, {"mtp_warning": warn_of_hidden_states(self.function, stacklevel=6)}
        parts = self(
            call.hidden_states, call.rows.targets, call.rows.valid, segment_ids=call.rows.starts
        )
        per_token_losses = parts["per_token_losses"]
        report = {"mtp_loss": parts["mtp_loss"], "mtp_per_token_losses": per_token_losses}
        return parts["mtp_loss"], report


def warn_of_hidden_states(function: str, instead: str = "", stacklevel: int = 5) -> str:
    text = (
        f"{function}: use_mtp is on but hidden_states is None: pass hidden_states [B, S, "
        f"hidden_size]{instead}; there is no multi-token prediction loss in this call"
    )
    if not torch.compiler.is_compiling():
        warnings.warn(text, stacklevel=stacklevel)
    return text


@dataclass(eq=False, repr=False)
class SecondHeads(_Further, _Heads):
    primary_loss_weight: float = 0.0

    mtp_type = "adaptive"

    def term(self, call: Call) -> Term:
        parts = self.heads(call.found.terms.scaled_log_prob.new_zeros(()), call)
        loss = parts.pop("loss")
        report = {f"adaptive_mtp_{k}": v for k, v in parts.items()}
        return loss, {"adaptive_mtp_loss": loss, **report}


# --- repetition ----------------------------------------------------------------------------------


class NGrams(Component, NGramRepetitionPenalty):
    at, switch = "ngram_penalty", "use_ngram_penalty"
    renamed = {"penalty_weight": "ngram_penalty_weight"}
    needs = NGramRepetitionPenalty.needs

    def term(self, call: Call) -> Term:
        parts = self.from_read(call.found, call.rows.valid)
        total = parts["total_repetition_penalty"]
        breakdown = {"ngram": parts["ngram_penalty"], "diversity": parts["diversity_penalty"]}
        return total, {"ngram_penalty": total, "ngram_penalty_breakdown": breakdown}


class Immediate(Component, SequenceRepetitionDetector):
    at, switch = "immediate_repetition_detector", "use_immediate_repetition_penalty"
    renamed = {"penalty_weight": "immediate_repetition_weight"}
    needs = SequenceRepetitionDetector.needs

    def term(self, call: Call) -> Term:
        double = call.rows.logits.dtype == torch.float64
        penalty = self.from_read(call.found, torch.float64 if double else torch.float32)
        return penalty, {"immediate_repetition_penalty": penalty}


# --- mixtures of experts -------------------------------------------------------------------------


class Balancing(Component, AuxiliaryFreeMoEBalancer):
    at, switch = "moe_balancer", "use_moe_balancing"
    requires = ("gate_logits", "expert_indices")

    def term(self, call: Call) -> Term:
        parts = self(
            call.gate_logits,
            call.expert_indices,
            attention_mask=per_token(call.rows.valid, call.gate_logits),
            update_state=advances(self, call.update_state),
        )
        return parts["balancing_term"], {
            "moe_balancing_term": parts["balancing_term"],
            "moe_balance_loss": parts["balance_loss"],
            "moe_expert_balance_ratio": parts["expert_balance_ratio"],
            "moe_cv": parts["coefficient_of_variation"],
        }


def _similarity(loss: DiversityLoss, call: Call) -> Tensor:
    """Computed once: it costs as much as all that is not the read of the logits together."""
    outputs = call.expert_outputs
    if "similarity" not in call.memo:
        mask = per_token(call.rows.valid, outputs[0]) if len(outputs) else None
        call.memo["similarity"] = loss.similarity(outputs, mask)
    return call.memo["similarity"]


class Diversity(Component, DiversityLoss):
    at, switch = "diversity_loss", "use_diversity_loss"
    requires = ("expert_outputs",)

    def term(self, call: Call) -> Term:
        loss = self.diversity_weight * _similarity(self, call)
        return loss, {"diversity_loss": loss}


@dataclass(eq=False, repr=False)
class Auxiliary(Component, AuxiliaryLoss):
    num_experts: int | None = None

    at, switch = "auxiliary_loss", "use_auxiliary_loss"

    def missing(self, call: Call) -> tuple[str, str] | None:
        if call.gate_logits is None and call.expert_outputs is None:
            return "gate_logits (with expert_indices) or expert_outputs", self.switch
        return None

    def term(self, call: Call) -> Term:
        """In two parts: gate and outputs may differ in rows, and so in their masks."""
        losses = {}
        if call.gate_logits is not None:
            losses = self(
                call.gate_logits,
                call.expert_indices,
                num_experts=self.num_experts or call.gate_logits.shape[-1],
                attention_mask=per_token(call.rows.valid, call.gate_logits),
            )
        if call.expert_outputs is not None:
            similarity = _similarity(self.diversity, call)
            losses["expert_diversity"] = self.expert_diversity_weight * similarity
        return sum(losses.values()), {f"aux_{name}": loss for name, loss in losses.items()}


# In the order of their terms and reports; of those at one attribute at most one applies.
COMPONENTS: tuple[type[Component], ...] = (
    *(Standard, DeepSeek, Adaptive, Focal, HiddenStates, SecondHeads, NGrams, Immediate),
    *(Balancing, Diversity, Auxiliary),
)
