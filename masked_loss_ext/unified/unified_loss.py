# SPDX-License-Identifier: BSD-3-Clause
"""UnifiedLoss: every component of a language-model loss, from one read of the logits."""

import inspect
from collections.abc import Mapping

from .._checks import check_flags
from . import _build, _components
from ._arguments import check_logits, check_segments, check_targets
from ._read import read
from ._state import SyncsState
from .adaptive_mtp import AdaptiveMTPLoss
from .temperature import TemperatureScaledCrossEntropy

_NAME = "UnifiedLoss"


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
    copied and resumed with the module. ``update_state=False`` leaves them alone. On several ranks
    they are each rank's own until ``sync_state``: temperature and remembered losses become the mean
    of all, averages those over all, counts those of an average rank, as is said at
    ``TemperatureScaledCrossEntropy``, ``AdaptiveMTPLoss`` and ``AuxiliaryFreeMoEBalancer``.

    A number that a schedule moves (a weight, ``label_smoothing``, ``focal_loss.gamma``) costs
    torch.compile a second graph at its second value, and none after that. A weight may be put there
    as a 0-d tensor instead and filled between steps: one graph.

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

    def __init__(
        self,
        vocab_size,
        hidden_size=None,
        primary_loss_type="deepseek",
        ignore_index=-100,
        initial_temperature=1.0,
        adaptive_temperature=True,
        label_smoothing=0.1,
        use_mtp=False,
        num_future_tokens=3,
        mtp_weight=0.1,
        mtp_type="deepseek",
        use_confidence_weighting=True,
        confidence_reg_strength=0.01,
        use_ngram_penalty=True,
        ngram_size=4,
        ngram_penalty_weight=0.1,
        use_immediate_repetition_penalty=True,
        immediate_repetition_weight=0.5,
        eos_token_id=None,
        pad_token_id=None,
        min_sequence_length=20,
        eos_penalty_weight=0.05,
        num_experts=None,
        use_moe_balancing=False,
        gradient_balance_weight=0.1,
        use_focal_loss=False,
        focal_alpha=1.0,
        focal_gamma=2.0,
        use_diversity_loss=False,
        diversity_weight=0.01,
        use_auxiliary_loss=False,
        load_balancing_weight=0.0001,
        router_z_weight=0.001,
        *,
        focal_mode="replace",
        penalty_on="targets",
        shift_labels=False,
        clamp_router_z=False,
        normalize_topk=False,
        detach_confidence=False,
    ):
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        for name, value in options.items():
            setattr(self, name, value)
        _build.check_options(_NAME, self)
        self.main_loss = _build.main_loss(self)
        self.mtp_loss = _build.mtp_loss(self)
        self.ngram_penalty = _build.ngram_penalty(self)
        self.immediate_repetition_detector = _build.repetition_detector(self)
        self.moe_balancer = _build.moe_balancer(self)
        self.focal_loss = _build.focal_loss(self)
        self.diversity_loss = _build.diversity_loss(self)
        self.auxiliary_loss = _build.auxiliary_loss(self)

    def forward(
        self,
        logits,
        targets,
        attention_mask=None,
        hidden_states=None,
        primary_logits=None,
        additional_logits=None,
        confidence_scores=None,
        mtp_active=False,
        gate_logits=None,
        expert_indices=None,
        expert_outputs=None,
        return_detailed=False,
        *,
        segment_ids=None,
        update_state=True,
    ):
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
        check_flags(_NAME, {"return_detailed": return_detailed, "update_state": update_state})
        heads = _components.Heads(additional_logits, confidence_scores, mtp_active)
        experts = _components.Experts(gate_logits, expert_indices, expert_outputs)
        _components.check_inputs(self, heads, experts)
        check_targets(_NAME, targets, attention_mask)
        check_logits(_NAME, logits, targets, self.vocab_size)
        check_segments(_NAME, segment_ids, targets)
        if self.primary_loss_type != "adaptive_mtp" or primary_logits is logits:
            primary_logits = None  # one read gives everything
        batch = read(_NAME, self, logits, targets, attention_mask, segment_ids, primary_logits)
        out = {"total_loss": None, "main_loss": None}
        total = _components.main(self, out, batch, primary_logits, heads, update_state)
        total = total + _components.mtp(self, out, batch, hidden_states, heads, update_state)
        total = total + _components.repetition(self, out, batch)
        total = total + _components.experts(self, out, batch, experts, update_state)
        out["total_loss"] = total
        return out if return_detailed else total

    def get_loss_statistics(self):
        """What was counted so far, as numbers; it waits for the device.

        Returns:
            dict: "adaptive_mtp", the statistics of ``AdaptiveMTPLoss``, where there is one;
            "moe_balancing", lists "expert_counts" and "expert_scores" ``[E]`` and the number
            "total_tokens", where experts are balanced.
        """
        statistics = {}
        for part in (self.main_loss, self.mtp_loss):
            if isinstance(part, AdaptiveMTPLoss):
                statistics["adaptive_mtp"] = part.get_statistics()
        if self.moe_balancer is not None:
            statistics["moe_balancing"] = self.moe_balancer.get_statistics()
        return statistics

    def reset_statistics(self, *, experts=True, history=True):
        """Forget what was counted: adaptive MTP's sums, the experts' counts, the loss history. The
        temperature itself stays, and so does what ``experts`` or ``history`` is False for."""
        for part in (self.main_loss, self.mtp_loss):
            if isinstance(part, AdaptiveMTPLoss):
                part.reset_statistics()
        if experts and self.moe_balancer is not None:
            self.moe_balancer.reset_statistics()
        if history and isinstance(self.main_loss, TemperatureScaledCrossEntropy):
            self.main_loss.reset_history()

    def extra_repr(self):
        return (
            f"vocab_size={self.vocab_size}, primary_loss_type={self.primary_loss_type!r}, "
            f"penalty_on={self.penalty_on!r}"
        )


def create_unified_loss(config):
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
        raise TypeError(
            f"create_unified_loss: config must be a mapping, got {type(config).__name__}"
        )
    known = inspect.signature(UnifiedLoss).parameters
    unknown = [name for name in config if name not in known]
    if unknown:
        raise ValueError(f"create_unified_loss: config has unknown options {unknown}")
    if "vocab_size" not in config:
        raise ValueError("create_unified_loss: config must have vocab_size")
    return UnifiedLoss(**config)
