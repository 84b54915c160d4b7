# SPDX-License-Identifier: BSD-3-Clause
"""DeepSeekLoss: temperature-scaled cross entropy, multi-token prediction, balanced experts."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from .._checks import check_tensor
from ._components import of_options, warn_of_hidden_states
from ._options import Flag, Number, PenaltyOn, Size, Token
from ._rows import per_token, rows_of
from ._state import SyncsState, advances
from .experts import AuxiliaryFreeMoEBalancer
from .hidden_state_mtp import HiddenStateMTPLoss
from .temperature import TemperatureScaledCrossEntropy


@dataclass(eq=False, repr=False)
class DeepSeekLoss(SyncsState):
    r"""Main loss + multi-token prediction + balancing of experts, reported part by part.

    .. math:: L = L_{\text{main}} + L_{\text{mtp}} + L_{\text{balancing}}

    of ``TemperatureScaledCrossEntropy``, ``HiddenStateMTPLoss`` (projections that are trained) and
    ``AuxiliaryFreeMoEBalancer``. It returns a **dict**; note where attention_mask stands.
    ``UnifiedLoss`` has all of it and more.

    >>> loss_fn = DeepSeekLoss(vocab_size=7, hidden_size=4)
    >>> out = loss_fn(logits, labels, model_pred, attention_mask)
    >>> torch.testing.assert_close(out["total_loss"], out["main_loss"] + out["mtp_mtp_loss"])

    On several ranks temperature and counts are each rank's own until ``sync_state``, which does
    what is said at the three; the total is one of means, see ``UnifiedLoss``.

    Args:
        vocab_size, hidden_size: V, H.
        num_experts: E; None: no balancing.
        use_mtp, num_future_tokens, mtp_weight: of ``HiddenStateMTPLoss``.
        initial_temperature, adaptive_temperature, label_smoothing, eos_token_id,
            min_sequence_length, eos_penalty_weight: of ``TemperatureScaledCrossEntropy``.
        use_moe_balancing, gradient_balance_weight: of ``AuxiliaryFreeMoEBalancer``.
        ignore_index: targets that do not count.
        penalty_on: "targets" or "model", of the EOS penalty.
    """

    vocab_size: Size
    hidden_size: Size | None
    num_experts: Size | None = None
    use_mtp: Flag = True
    num_future_tokens: Size = 3
    mtp_weight: Number = 0.1
    initial_temperature: float = 1.0
    adaptive_temperature: bool = True
    label_smoothing: float = 0.1
    use_moe_balancing: Flag = True
    gradient_balance_weight: Number = 0.1
    eos_token_id: int | None = None
    min_sequence_length: int = 20
    eos_penalty_weight: float = 5.0
    _: KW_ONLY
    ignore_index: Token = -100
    penalty_on: PenaltyOn = "targets"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_mtp and self.hidden_size is None:
            raise ValueError(f"{self.function}: hidden_size required for multi-token prediction")
        self.use_moe_balancing = self.use_moe_balancing and self.num_experts is not None
        self.main_loss = of_options(self, TemperatureScaledCrossEntropy)
        self.mtp_loss: Any = of_options(self, HiddenStateMTPLoss) if self.use_mtp else None
        balancer = AuxiliaryFreeMoEBalancer
        self.moe_balancer: Any = of_options(self, balancer) if self.use_moe_balancing else None

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        gate_logits: Tensor | None = None,
        expert_indices: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
        update_state: bool = True,
    ) -> dict[str, Any]:
        """The parts and their sum.

        Args:
            logits, targets, hidden_states, attention_mask, gate_logits, expert_indices,
                segment_ids, update_state: as in ``UnifiedLoss``, but for the order.

        Returns:
            dict: "total_loss", "main_loss", "main_temperature", "main_label_smoothing"; with
            hidden_states "mtp_mtp_loss", "mtp_per_token_losses", "mtp_mtp_weight" (without, the
            text "mtp_warning"); with experts ``moe_`` and the fields of the balancer.
        """
        name = self.function
        if self.use_moe_balancing and (gate_logits is None or expert_indices is None):
            raise ValueError(
                f"{name}: gate_logits and expert_indices must be passed to forward for num_experts"
            )
        options = dict(segment_ids=segment_ids, update_state=update_state)
        main = self.main_loss(logits, targets, attention_mask, **options)
        losses = {f"main_{key}": value for key, value in main.items()}
        total = main["loss"]
        rows = rows_of(self, targets, attention_mask, segment_ids)
        if self.use_mtp and hidden_states is None:
            losses["mtp_warning"] = warn_of_hidden_states(name, " or use_mtp=False")
        elif self.use_mtp:
            mtp = self.mtp_loss(hidden_states, targets, rows.valid, segment_ids=segment_ids)
            losses.update({f"mtp_{key}": value for key, value in mtp.items()})
            total = total + mtp["mtp_loss"]
        if self.use_moe_balancing:
            check_tensor(name, "gate_logits", gate_logits)
            moe = self.moe_balancer(
                gate_logits,
                expert_indices,
                attention_mask=per_token(rows.valid, gate_logits),
                update_state=advances(self.moe_balancer, update_state),
            )
            losses.update({f"moe_{key}": value for key, value in moe.items()})
            total = total + moe["balancing_term"]
        losses["total_loss"] = total
        return losses
