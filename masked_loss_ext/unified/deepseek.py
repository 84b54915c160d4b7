# SPDX-License-Identifier: BSD-3-Clause
"""DeepSeekLoss: temperature-scaled cross entropy, multi-token prediction, balanced experts."""

import warnings

import torch

from .._checks import check_flags, check_tensor
from ._arguments import (
    as_part,
    check_ignore_index,
    check_segments,
    check_size,
    check_targets,
    check_weights,
)
from ._rows import valid_rows
from ._state import SyncsState, advances
from .hidden_state_mtp import MultiTokenPredictionLoss
from .moe import AuxiliaryFreeMoEBalancer
from .temperature import TemperatureScaledCrossEntropy

_NAME = "DeepSeekLoss"
_NO_HIDDEN_STATES = (
    "DeepSeekLoss: use_mtp is on but hidden_states is None: pass hidden_states [B, S, hidden_size] "
    "or use_mtp=False; there is no multi-token prediction loss in this call"
)


class DeepSeekLoss(SyncsState):
    r"""Main loss + multi-token prediction + balancing of experts, reported part by part.

    .. math:: L = L_{\text{main}} + L_{\text{mtp}} + L_{\text{balancing}}

    of ``TemperatureScaledCrossEntropy``, ``MultiTokenPredictionLoss`` (of hidden states, with
    projections that are trained) and ``AuxiliaryFreeMoEBalancer``. It returns a **dict**; note
    where attention_mask stands. ``UnifiedLoss`` has all of it and more.

    >>> loss_fn = DeepSeekLoss(vocab_size=7, hidden_size=4)
    >>> out = loss_fn(logits, labels, model_pred, attention_mask)
    >>> torch.testing.assert_close(out["total_loss"], out["main_loss"] + out["mtp_mtp_loss"])

    On several ranks temperature and counts are each rank's own until ``sync_state``, which does
    what is said at the three.

    Args:
        vocab_size, hidden_size: V, H.
        num_experts: E; None: no balancing.
        use_mtp, num_future_tokens, mtp_weight: of ``MultiTokenPredictionLoss``.
        initial_temperature, adaptive_temperature, label_smoothing, eos_token_id,
            min_sequence_length, eos_penalty_weight: of ``TemperatureScaledCrossEntropy``.
        use_moe_balancing, gradient_balance_weight: of ``AuxiliaryFreeMoEBalancer``.
        ignore_index: targets that do not count.
        penalty_on: "targets" or "model", of the EOS penalty.
    """

    def __init__(
        self,
        vocab_size,
        hidden_size,
        num_experts=None,
        use_mtp=True,
        num_future_tokens=3,
        mtp_weight=0.1,
        initial_temperature=1.0,
        adaptive_temperature=True,
        label_smoothing=0.1,
        use_moe_balancing=True,
        gradient_balance_weight=0.1,
        eos_token_id=None,
        min_sequence_length=20,
        eos_penalty_weight=5.0,
        *,
        ignore_index=-100,
        penalty_on="targets",
    ):
        super().__init__()
        check_size(_NAME, "vocab_size", vocab_size)
        check_ignore_index(_NAME, ignore_index)
        check_flags(_NAME, {"use_mtp": use_mtp, "use_moe_balancing": use_moe_balancing})
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.use_mtp = use_mtp
        self.use_moe_balancing = use_moe_balancing and num_experts is not None
        self.ignore_index = ignore_index
        for argument, size in (("hidden_size", hidden_size), ("num_experts", num_experts)):
            if size is not None:
                check_size(_NAME, argument, size)
        check_size(_NAME, "num_future_tokens", num_future_tokens)
        weights = {"mtp_weight": mtp_weight, "gradient_balance_weight": gradient_balance_weight}
        check_weights(_NAME, weights)
        self.main_loss = as_part(
            _NAME,
            TemperatureScaledCrossEntropy,
            initial_temperature,
            adaptive_temperature,
            label_smoothing,
            vocab_size,
            eos_token_id=eos_token_id,
            min_sequence_length=min_sequence_length,
            eos_penalty_weight=eos_penalty_weight,
            ignore_index=ignore_index,
            penalty_on=penalty_on,
        )
        self.mtp_loss = self.moe_balancer = None
        if use_mtp:
            if hidden_size is None:
                raise ValueError(f"{_NAME}: hidden_size required for multi-token prediction")
            sizes = vocab_size, hidden_size, num_future_tokens
            self.mtp_loss = as_part(
                _NAME, MultiTokenPredictionLoss, *sizes, mtp_weight, ignore_index=ignore_index
            )
        if self.use_moe_balancing:
            self.moe_balancer = as_part(
                _NAME,
                AuxiliaryFreeMoEBalancer,
                num_experts,
                gradient_balance_weight=gradient_balance_weight,
            )

    def forward(
        self,
        logits,
        targets,
        hidden_states=None,
        attention_mask=None,
        gate_logits=None,
        expert_indices=None,
        *,
        segment_ids=None,
        update_state=True,
    ):
        """The parts and their sum.

        Args:
            logits: ``[B, S, V]`` floating.
            targets: ``[B, S]`` integers, aligned with the logits.
            hidden_states: ``[B, S, H]`` floating, for use_mtp.
            attention_mask: ``[B, S]`` any dtype, a target counts where it is not 0. None: all.
            gate_logits: ``[N, E]`` floating; what the mask excludes does not count if N is B * S.
            expert_indices: ``[N, k]`` integers.
            segment_ids: ``[B, S]`` (or ``[1, S]``) integers, for packed documents: a change begins
                one. No head predicts a token of another, and columns are counted anew.
            update_state: let a training call change temperature and counts.

        Returns:
            dict: "total_loss", "main_loss", "main_temperature", "main_label_smoothing"; with
            hidden_states "mtp_mtp_loss", "mtp_per_token_losses", "mtp_mtp_weight" (without, the
            text "mtp_warning"); with experts "moe_" and the fields of the balancer.
        """
        if self.use_moe_balancing and (gate_logits is None or expert_indices is None):
            raise ValueError(
                f"{_NAME}: gate_logits and expert_indices must be passed to forward for num_experts"
            )
        check_targets(_NAME, targets, attention_mask)
        check_segments(_NAME, segment_ids, targets)
        options = dict(segment_ids=segment_ids, update_state=update_state)
        main = as_part(_NAME, self.main_loss, logits, targets, attention_mask, **options)
        losses = {f"main_{name}": value for name, value in main.items()}
        total = main["loss"]
        valid = valid_rows(targets, attention_mask, self.ignore_index)
        if self.use_mtp and hidden_states is None:
            losses["mtp_warning"] = _NO_HIDDEN_STATES
            if not torch.compiler.is_compiling():
                warnings.warn(_NO_HIDDEN_STATES, stacklevel=4)
        elif self.use_mtp:
            mtp = as_part(
                _NAME, self.mtp_loss, hidden_states, targets, valid, segment_ids=segment_ids
            )
            losses.update({f"mtp_{name}": value for name, value in mtp.items()})
            total = total + mtp["mtp_loss"]
        if self.use_moe_balancing:
            moe = self._balancing(gate_logits, expert_indices, valid, update_state)
            losses.update({f"moe_{name}": value for name, value in moe.items()})
            total = total + moe["balancing_term"]
        losses["total_loss"] = total
        return losses

    def _balancing(self, gate_logits, expert_indices, valid, update_state):
        check_tensor(_NAME, "gate_logits", gate_logits)
        per_token = gate_logits.shape[:-1].numel() == valid.numel()
        return as_part(
            _NAME,
            self.moe_balancer,
            gate_logits,
            expert_indices,
            attention_mask=valid.reshape(-1) if per_token else None,
            update_state=advances(self.moe_balancer, update_state),
        )

    def extra_repr(self):
        return f"vocab_size={self.vocab_size}, hidden_size={self.hidden_size}"
