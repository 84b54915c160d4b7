# SPDX-License-Identifier: BSD-3-Clause
"""UnifiedLoss: every component of a language-model loss, from one read of the logits."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .._checks import check_flags, check_number, check_rank, check_tensor, refusal, shape_text
from ._components import COMPONENTS, Call, Component, of_options, put_option
from ._options import (
    Flag,
    Length,
    NotNegative,
    Number,
    PenaltyOn,
    Positive,
    Share,
    Size,
    Token,
    check_class,
    check_smoothing,
    one_of,
)
from ._rows import Rows, check_logits, of_one_document, read, rows_of
from ._state import SyncsState
from .experts import AuxiliaryFreeMoEBalancer
from .multi_token import AdaptiveMTPLoss
from .temperature import TemperatureScaledCrossEntropy

_PLACES = tuple(dict.fromkeys(cls.at for cls in COMPONENTS))


@dataclass(eq=False, repr=False)
class UnifiedLoss(SyncsState):
    r"""Every component of a language-model loss, from one read of the logits.

    .. math::
        L = L_{\text{main}} + L_{\text{mtp}} + L_{\text{n-gram, diversity}} + L_{\text{immediate}}
        + L_{\text{balancing}} + L_{\text{experts}} + \sum L_{\text{auxiliary}}

    **Targets are aligned**: position s of the logits is scored against ``targets[:, s]``, the token
    that it predicts. For labels that are the input's own tokens pass ``shift_labels=True``.

    >>> loss_fn = UnifiedLoss(vocab_size=7, primary_loss_type="standard", label_smoothing=0.0,
    ...                       use_ngram_penalty=False, use_immediate_repetition_penalty=False)
    >>> a = attention_mask.bool()
    >>> expected = F.cross_entropy(logits[a], labels[a])
    >>> torch.testing.assert_close(loss_fn(logits, labels, attention_mask), expected)

    A row counts where attention_mask is on and its target is not ignore_index, in every component;
    means are over rows that count, and 0, attached to the graph, where there are none. Main loss,
    smoothing, focal loss, diversity, EOS and repetition probabilities come from one forward and one
    backward of ``cross_entropy_terms``. The main loss of "deepseek" sees logits / T, the others
    the logits. Half precision is summed in float32, in which the losses are.

    With ``return_detailed=True`` forward returns a dict, of these keys:

    ================================ ==============================================================
    total_loss, main_loss            their sum, to call backward on; main loss, EOS penalty included
    main_temperature                 "deepseek": T after this call
    main_primary_loss,               "adaptive_mtp": as ``AdaptiveMTPLoss`` returns them
    main_additional_loss,
    main_confidence_reg,
    main_avg_confidence,
    main_effective_mtp_weight,
    main_mtp_active
    mtp_loss, mtp_per_token_losses   use_mtp with mtp_type "deepseek": weighted; list, unweighted
    mtp_warning                      text, in place of these two, where hidden_states is None
    adaptive_mtp_loss,               use_mtp with mtp_type "adaptive": the fields of
    adaptive_mtp_<field>             ``AdaptiveMTPLoss`` with primary weight 0
    ngram_penalty                    n-gram and diversity penalty together
    ngram_penalty_breakdown          a dict of these two: ngram, diversity
    immediate_repetition_penalty
    moe_balancing_term               what enters the total
    moe_balance_loss                 0; it does not enter the total
    moe_expert_balance_ratio, moe_cv ``[E]``, and spread over mean of the experts' counts
    focal_loss                       see focal_mode
    diversity_loss                   of expert_outputs
    aux_load_balancing, aux_router_z as ``AuxiliaryLoss`` returns them, weighted. With
    aux_expert_diversity             use_diversity_loss the experts' similarity counts twice, at
                                     diversity_weight and at 1e-4
    ================================ ==============================================================

    Temperature, loss history, adaptive MTP's sums and the experts' counts are buffers: saved,
    copied and resumed with the module. ``update_state=False`` leaves them alone.

    **On several ranks** they are each rank's own until ``sync_state``: temperature and remembered
    losses become the mean of all, averages those over all, counts those of an average rank, as is
    said at ``TemperatureScaledCrossEntropy``, ``AdaptiveMTPLoss`` and ``AuxiliaryFreeMoEBalancer``.
    In the forward of a model that DDP wraps, DDP has to be told: see
    ``distributed.keep_state_local``. The total is a sum of means over this batch's rows, so there
    is no normalizer; weigh it by its share of what counts on all ranks and in all micro-batches:
    ``loss * (attention_mask.sum() / global_token_count(masks))``. What is a mean over rows is then
    that of one process; the rest (heads, counts of repetition, experts) is averaged by rows.

    A number that a schedule moves is set here by its name, or at its component
    (``focal_loss.gamma``). It costs torch.compile a second graph at its second value, and none
    after that. A weight may be put there as a 0-d tensor instead and filled between steps: one
    graph.

    Args:
        vocab_size: V, the logits' last dimension.
        hidden_size: H; needed for use_mtp and for "adaptive_mtp".
        primary_loss_type: "deepseek" (``TemperatureScaledCrossEntropy``), "standard" (smoothed
            cross entropy) or "adaptive_mtp" (``AdaptiveMTPLoss``).
        ignore_index: targets that do not count.
        initial_temperature, adaptive_temperature: of "deepseek".
        label_smoothing: of the main loss, spread over the other V - 1 classes.
        use_mtp, num_future_tokens, mtp_weight, mtp_type: multi-token prediction from hidden_states
            ("deepseek", with trained projections: give this module's parameters to the optimiser)
            or from additional_logits ("adaptive"). "adaptive_mtp" has its own heads and no second.
        use_confidence_weighting, confidence_reg_strength: of adaptive heads.
        use_ngram_penalty, ngram_size, ngram_penalty_weight: ``NGramRepetitionPenalty``.
        use_immediate_repetition_penalty, immediate_repetition_weight:
            ``SequenceRepetitionDetector``.
        eos_token_id, min_sequence_length, eos_penalty_weight: EOS in a column before
            min_sequence_length is penalised, for every primary_loss_type.
        pad_token_id: tokens that take no part in the two repetition penalties, unless they are
            eos_token_id.
        num_experts, use_moe_balancing, gradient_balance_weight: ``AuxiliaryFreeMoEBalancer``.
        use_focal_loss, focal_alpha, focal_gamma: ``FocalLoss``, at T = 1 and unsmoothed.
        use_diversity_loss, diversity_weight: ``DiversityLoss`` of expert_outputs.
        use_auxiliary_loss, load_balancing_weight, router_z_weight: ``AuxiliaryLoss``.
        focal_mode: the focal loss stands in the total in place of the cross entropy ("replace"),
            beside it ("add") or not at all ("report"). main_loss is the cross entropy's in all.
        penalty_on: "targets": repetition and EOS penalties are statistics of the data, constant in
            the model and without gradient, added to the total all the same. "model": they are
            unlikelihood terms that train: the mean of :math:`-\log(1 - p_t(c))` over what the model
            should not say at t.
        shift_labels: targets are the input's own tokens; position s is scored against s + 1.
        clamp_router_z, normalize_topk: of ``AuxiliaryLoss``.
        detach_confidence: of ``AdaptiveMTPLoss``.

    Raises:
        ValueError: options that do not fit each other, a vocabulary that differs from the logits',
            an enabled component without its inputs (but hidden_states: mtp_warning).
    """

    vocab_size: Size
    hidden_size: Size | None = None
    primary_loss_type: Annotated[
        str, one_of("standard", "deepseek", "adaptive_mtp", label="unknown primary_loss_type: ")
    ] = "deepseek"
    ignore_index: Token = -100
    initial_temperature: Positive = 1.0
    adaptive_temperature: Flag = True
    label_smoothing: Share = 0.1
    use_mtp: Flag = False
    num_future_tokens: Size = 3
    mtp_weight: Number = 0.1
    mtp_type: Annotated[str, one_of("deepseek", "adaptive", label="unknown mtp_type: ")] = (
        "deepseek"
    )
    use_confidence_weighting: Flag = True
    confidence_reg_strength: NotNegative = 0.01
    use_ngram_penalty: Flag = True
    ngram_size: Size = 4
    ngram_penalty_weight: Number = 0.1
    use_immediate_repetition_penalty: Flag = True
    immediate_repetition_weight: Number = 0.5
    eos_token_id: Token | None = None
    pad_token_id: Token | None = None
    min_sequence_length: Length = 20
    eos_penalty_weight: NotNegative = 0.05
    num_experts: Size | None = None
    use_moe_balancing: Flag = False
    gradient_balance_weight: Number = 0.1
    use_focal_loss: Flag = False
    focal_alpha: float | Tensor = 1.0
    focal_gamma: NotNegative = 2.0
    use_diversity_loss: Flag = False
    diversity_weight: Number = 0.01
    use_auxiliary_loss: Flag = False
    load_balancing_weight: Number = 0.0001
    router_z_weight: Number = 0.001
    _: KW_ONLY
    focal_mode: Annotated[str, one_of("replace", "add", "report")] = "replace"
    penalty_on: PenaltyOn = "targets"
    shift_labels: Flag = False
    clamp_router_z: Flag = False
    normalize_topk: Flag = False
    detach_confidence: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_options()
        for cls in COMPONENTS:
            if cls.applies(self):
                setattr(self, cls.at, of_options(self, cls))
            elif not hasattr(self, cls.at):
                setattr(self, cls.at, None)

    def _check_options(self) -> None:
        """What no rule of one option says."""
        name = self.function
        if self.primary_loss_type != "deepseek":
            check_smoothing(name, "label_smoothing", self.label_smoothing, max(self.vocab_size, 2))
        check_class(name, "eos_token_id", self.eos_token_id, self.vocab_size)
        for option, for_what, needed in (
            ("hidden_size", "multi-token prediction", self.use_mtp),
            ("hidden_size", "adaptive_mtp loss", self.primary_loss_type == "adaptive_mtp"),
            ("num_experts", "MoE balancing", self.use_moe_balancing),
        ):
            if needed and getattr(self, option) is None:
                raise ValueError(f"{name}: {option} required for {for_what}: pass {option}")
        if not isinstance(self.focal_alpha, Tensor):
            check_number(name, "focal_alpha", self.focal_alpha, least=0)
        elif self.focal_alpha.numel() != self.vocab_size:
            rule = f"be a number or [vocab_size] = [{self.vocab_size}]"
            raise refusal(name, "focal_alpha", rule, shape_text(self.focal_alpha))

    def __setattr__(self, name: str, value: Any) -> None:
        """An option that a schedule moves here is its component's, too."""
        super().__setattr__(name, value)
        for component in self.__dict__.get("_modules", {}).values():
            if isinstance(component, Component) and component is not value:
                put_option(component, name, value)

    def components(self) -> list[Any]:
        """Those that are on, in the order of COMPONENTS."""
        return [component for component in map(self._modules.get, _PLACES) if component is not None]

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        primary_logits: Tensor | None = None,
        additional_logits: Sequence[Tensor] | None = None,
        confidence_scores: Tensor | None = None,
        mtp_active: bool | Tensor = False,
        gate_logits: Tensor | None = None,
        expert_indices: Tensor | None = None,
        expert_outputs: Sequence[Tensor] | Tensor | None = None,
        return_detailed: bool = False,
        *,
        segment_ids: Tensor | None = None,
        update_state: bool = True,
    ) -> Tensor | dict[str, Any]:
        """The total loss [], float32 (float64 for float64 logits), or a dict (see above).

        Args:
            logits: ``[B, S, V]`` floating.
            targets: ``[B, S]`` integers.
            attention_mask: ``[B, S]`` any dtype, a target counts where it is not 0. None: all.
            hidden_states: ``[B, S, H]`` floating, for use_mtp.
            primary_logits: ``[B, S, V]``, of "adaptive_mtp"; None: logits.
            additional_logits: list of ``[B, S, V]``; head i predicts targets[:, s + i + 1].
            confidence_scores: floating in [0, 1], one per row or position.
            mtp_active: whether the additional heads count.
            gate_logits: ``[N, E]`` floating; what the mask excludes does not count if N is B * S.
            expert_indices: ``[N, k]`` integers.
            expert_outputs: list of ``[N, H]`` floating.
            return_detailed: return the dict.
            segment_ids: ``[B, S]`` (or ``[1, S]``) integers, for packed documents: a change begins
                one, which is then treated as a row of its own: no head, and with shift_labels no
                logits, predict a token of another, nothing repeats across a border, columns are
                counted anew, and runs are averaged over documents.
            update_state: let a training call change temperature and statistics: False for all
                micro-batches of a step but one.
        """
        name, components = self.function, self.components()
        check_flags(name, {"return_detailed": return_detailed, "update_state": update_state})
        rows = rows_of(self, targets, attention_mask, segment_ids)
        check_logits(name, logits, targets, self.vocab_size)
        if self.primary_loss_type != "adaptive_mtp" or primary_logits is logits:
            primary_logits = None  # one read gives everything
        call = Call(
            self._aligned(rows)._replace(logits=logits),
            None,
            primary_logits,
            hidden_states,
            additional_logits,
            confidence_scores,
            mtp_active,
            gate_logits,
            expert_indices,
            expert_outputs,
            update_state,
            any(component.replaces_cross_entropy for component in components),
            {},
        )
        self._check_inputs(call)
        needs = [component.needs(call.rows) for component in components]
        if primary_logits is not None:
            needs[0] = needs[0]._replace(scaled=False)
        total: Any = None
        out: dict[str, Any] = {"total_loss": None, "main_loss": None}
        for component, found in zip(components, read(self, call.rows, needs), strict=True):
            term, report = component.term(call._replace(found=found))
            out.update(report)
            if term is not None:
                total = term if total is None else total + term
        out["total_loss"] = total
        return out if return_detailed else total

    def _aligned(self, rows: Rows) -> Rows:
        """Moved one position back if labels are unshifted: the first of a document is then nobody's
        target. Padding takes no part in repetition."""
        targets, valid, starts = rows.targets, rows.valid, rows.starts
        if self.shift_labels:
            end = torch.full_like(targets[:, :1], self.ignore_index)
            targets = torch.cat([targets[:, 1:], end], 1)
            following = valid[:, 1:]
            if starts is not None:
                following = following & of_one_document(starts, 1)
            valid = torch.cat([following, torch.zeros_like(valid[:, :1])], 1)
        said = valid
        if self.pad_token_id is not None and self.pad_token_id != self.eos_token_id:
            said = valid & (targets != self.pad_token_id)
        return Rows(targets, valid, said, starts)

    def _check_inputs(self, call: Call) -> None:
        """What enabled components cannot do without, and that it is of the right kind."""
        name = self.function
        for component in self.components():
            missing = component.missing(call)
            if missing is not None:
                raise refusal(name, missing[0], f"be passed to forward for {missing[1]}", "None")
        for argument in ("gate_logits", "expert_indices", "expert_outputs"):
            value = getattr(call, argument)
            if argument == "expert_outputs" and isinstance(value, (list, tuple)):
                for i, output in enumerate(value):
                    check_tensor(name, f"{argument}[{i}]", output)
            elif value is not None:
                check_tensor(name, argument, value)
                if argument == "expert_outputs":
                    check_rank(name, argument, value, 3, "[E, N, H]")

    def get_loss_statistics(self) -> dict[str, Any]:
        """What was counted so far, as numbers; it waits for the device.

        Returns:
            dict: "adaptive_mtp", the statistics of ``AdaptiveMTPLoss``, where there is one;
            "moe_balancing", lists "expert_counts" and "expert_scores" ``[E]`` and the number
            "total_tokens", where experts are balanced.
        """
        names: dict[Any, str] = {
            AdaptiveMTPLoss: "adaptive_mtp",
            AuxiliaryFreeMoEBalancer: "moe_balancing",
        }
        return {
            name: component.get_statistics()
            for component in self.components()
            for cls, name in names.items()
            if isinstance(component, cls)
        }

    def reset_statistics(self, *, experts: bool = True, history: bool = True) -> None:
        """Forget what was counted: adaptive MTP's sums, the experts' counts, the loss history. The
        temperature itself stays, and so does what ``experts`` or ``history`` is False for."""
        for component in self.components():
            counts = experts and isinstance(component, AuxiliaryFreeMoEBalancer)
            if counts or isinstance(component, AdaptiveMTPLoss):
                component.reset_statistics()
            if history and isinstance(component, TemperatureScaledCrossEntropy):
                component.reset_history()

    def extra_repr(self) -> str:
        return (
            f"vocab_size={self.vocab_size}, primary_loss_type={self.primary_loss_type!r}, "
            f"penalty_on={self.penalty_on!r}"
        )


def create_unified_loss(config: Mapping[str, Any]) -> UnifiedLoss:
    """A ``UnifiedLoss`` of a dict of its arguments, which is left as it is.

    >>> loss_fn = create_unified_loss({"vocab_size": 7, "primary_loss_type": "standard"})
    >>> loss = loss_fn(logits, labels, attention_mask)  # logits ``[B, S, V]``, labels ``[B, S]``

    Args:
        config: a mapping of argument names of ``UnifiedLoss`` to values.

    Returns:
        UnifiedLoss.

    Raises:
        ValueError: a name that is no argument, or what ``UnifiedLoss`` refuses.
    """
    if not isinstance(config, Mapping):
        got = type(config).__name__
        raise refusal("create_unified_loss", "config", "be a mapping", got, TypeError)
    known = inspect.signature(UnifiedLoss).parameters
    unknown = [name for name in config if name not in known]
    if unknown:
        raise ValueError(f"create_unified_loss: config has unknown options {unknown}")
    if "vocab_size" not in config:
        raise ValueError("create_unified_loss: config must have vocab_size")
    return UnifiedLoss(**config)
