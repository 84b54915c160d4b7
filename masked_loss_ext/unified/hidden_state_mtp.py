# SPDX-License-Identifier: BSD-3-Clause
"""Multi-token prediction from hidden states: a module that owns the projections of its heads."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_device, check_rank, shape_text
from ._options import Flag, LossModule, Number, Positive, Rule, Size, Token, check_size
from ._rows import check_features, is_autocast
from ._tokens import Rows, cross_entropy, of_one_document, rows_of

_MOST_WEIGHTS = 2**40  # 4 TB of float32


@dataclass(eq=False, repr=False)
class HiddenStateMTPLoss(LossModule):
    r"""Cross entropy of K heads on hidden states, of which head k looks k targets further.

    .. math::
        h = \mathrm{LayerNorm}(\text{hidden}), \qquad
        L_k = \operatorname{mean}_{(b, s):\, a_{b,s+k}}
        -\log \mathrm{softmax}\big((W_k h_{bs} + c_k) / \tau\big)_{y_{b,s+k}}, \qquad
        \text{mtp\_loss} = \frac{w}{\min(K, S - 1)} \sum_{k=1}^{K} L_k

    The targets are those of the main loss: where they stand one position on already (position s
    predicts ``target_ids[:, s]``), head k predicts the token k + 1 positions on.

    >>> loss_fn = HiddenStateMTPLoss(vocab_size=7, hidden_size=4, num_future_tokens=1)
    >>> out = loss_fn(model_pred, labels)
    >>> head = loss_fn.projections[0](loss_fn.layer_norm(model_pred))[:, :-1]
    >>> expected = 0.1 * F.cross_entropy(head.flatten(0, 1), labels[:, 1:].flatten())
    >>> torch.testing.assert_close(out["mtp_loss"], expected)

    A head without a target has loss 0, attached to the graph. **The projections are trained**:
    give the optimiser the parameters of this module, too: ``loss_fn.parameters()``.
    They are large: 116 million for 50257 tokens, hidden size 768 and three heads.

    Hidden states from which nothing is predicted are selected away: their NaN reaches neither value
    nor gradient, and their gradient is 0. They are read, though: "never read" is what the row
    operators promise, and what holds for the heads' logits.

    Args:
        vocab_size: V.
        hidden_size: H.
        num_future_tokens: K, at most 1024; K V H is at most 2^40 (how long the rows will be is not
            known here: heads that reach past the end are 0).
        mtp_weight: w.
        shared_projection: one ``projection`` of H to V * K (head k has rows (k - 1) V to k V)
            instead of K ``projections`` of H to V; the parameters' names differ, nothing else.
        temperature: :math:`\tau > 0`.
        ignore_index: targets with this label do not count.
        mask_sources: let a position predict only where its own mask is on, too. It makes a
            difference where padding comes first: its last position predicts a token.
        inplace_backward: write gradients over the heads' logits. Saves their memory again; a second
            backward through the same graph is refused by PyTorch.
    """

    vocab_size: Size
    hidden_size: Size
    num_future_tokens: Annotated[int, Rule("1 to 1024", check_size, most=1024)] = 3
    mtp_weight: Number = 0.1
    shared_projection: Flag = False
    temperature: Positive = 1.0
    _: KW_ONLY
    ignore_index: Token = -100
    mask_sources: Flag = False
    inplace_backward: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        classes, width, heads = self.vocab_size, self.hidden_size, self.num_future_tokens
        if classes * width * heads > _MOST_WEIGHTS:
            raise ValueError(
                f"{self.function}: vocab_size * hidden_size * num_future_tokens must be at most "
                f"{_MOST_WEIGHTS} weights, got {classes} * {width} * {heads}"
            )
        if self.shared_projection:
            self.projection = torch.nn.Linear(width, classes * heads)
        else:
            self.projections = torch.nn.ModuleList(
                torch.nn.Linear(width, classes) for _ in range(heads)
            )
        self.layer_norm = torch.nn.LayerNorm(width)

    def forward(
        self,
        hidden_states: Tensor,
        target_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """The weighted loss and its parts.

        Args:
            hidden_states: ``[B, S, H]`` floating, of the model's last layer.
            target_ids: ``[B, S]`` integers.
            attention_mask, segment_ids: as in ``UnifiedLoss``.

        Returns:
            dict: ``mtp_loss`` ``[]``, float32 (float64 for float64 parameters);
            ``per_token_losses``, K detached 0-d tensors without weight; the number ``mtp_weight``.
        """
        name = self.function
        target = "targets" if self.owner else "target_ids"
        check_features(name, "hidden_states", hidden_states, self.hidden_size, "hidden_size")
        check_rank(name, "hidden_states", hidden_states, 3, "[B, S, H]")
        rows = rows_of(self, target_ids, attention_mask, segment_ids, target)
        check_device(name, target, target_ids, "hidden_states", hidden_states)
        if target_ids.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"{name}: {target} must have the B and S of hidden_states "
                f"{shape_text(hidden_states)}, got {shape_text(target_ids)}"
            )
        sources = None
        if self.mask_sources and attention_mask is not None:
            sources = (attention_mask != 0).expand(target_ids.shape)
        length = target_ids.shape[1]
        counted = [_counted(rows, sources, k) for k in range(1, self.num_future_tokens + 1)]
        # Zeroed before the projections: they multiply all rows, and in the gradient of their
        # weights 0 * NaN would be NaN.
        padded = [F.pad(on, (0, length - on.shape[1])) for on in counted]
        hidden = torch.where(torch.stack(padded).any(0).unsqueeze(-1), hidden_states, 0)
        if not is_autocast(hidden.device):
            hidden = hidden.to(self.layer_norm.weight.dtype)
        hidden = self.layer_norm(hidden)
        losses = [
            cross_entropy(
                name,
                ("logits", target),
                # As a matrix: of a slice of three dimensions F.linear adds the bias in a pass of
                # its own over the logits, and under a compiler or tensor subclass to a copy.
                self._logits(hidden[:, :-k].flatten(0, 1), k),
                rows.targets[:, k:].flatten(),
                on.flatten(),
                ignore_index=self.ignore_index,
                temperature=self.temperature,
                inplace_backward=self.inplace_backward,
            )
            for k, on in enumerate(counted, 1)
        ]
        heads = max(min(self.num_future_tokens, length - 1), 1)
        return {
            "mtp_loss": self.mtp_weight * (torch.stack(losses).sum() / heads),
            "per_token_losses": [loss.detach() for loss in losses],
            "mtp_weight": self.mtp_weight,
        }

    def _logits(self, hidden, k):
        """Of head k. A slice of the shared weight is a view: nobody multiplies the other heads'."""
        if not self.shared_projection:
            return self.projections[k - 1](hidden)
        rows = slice((k - 1) * self.vocab_size, k * self.vocab_size)
        return F.linear(hidden, self.projection.weight[rows], self.projection.bias[rows])


def _counted(rows: Rows, sources, k):
    """[B, S - k]: where head k has a target (none in rows that are too short)."""
    on = rows.valid[:, k:]
    if rows.starts is not None:
        on = on & of_one_document(rows.starts, k)
    return on if sources is None else on & sources[:, :-k]


MultiTokenPredictionLoss = HiddenStateMTPLoss
