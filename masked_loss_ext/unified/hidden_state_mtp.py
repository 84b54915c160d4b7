# SPDX-License-Identifier: BSD-3-Clause
"""Multi-token prediction by heads on hidden states, which are trained with the loss."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._aggregate import as_divisor, over, per_head
from .._checks import check_device, check_rank, refusal, shape_text
from .._heads import weight_and_bias
from ..ops._autograd import is_autocast
from ._options import Flag, LossModule, Number, Positive, Rule, Size, Token, check_size
from ._rows import (
    Rows,
    check_features,
    linear_cross_entropy,
    masked_mean,
    masked_sum,
    of_one_document,
    rows_of,
)

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

    Logits are made a chunk of rows at a time, of those that have a target alone
    (``masked_linear_cross_entropy``); the backward makes them a second time. Hidden states from
    which nothing is predicted are selected away, with a gradient of 0. They are read, though, by
    the LayerNorm. The projections are read, not called: hooks on them are refused.

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
        inplace_backward: make the heads' gradients together with their loss, over its logits,
            which are then not made a second time: three products and not four. A second backward
            through the same graph is refused.
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
            rule = f"be at most {_MOST_WEIGHTS} weights"
            got = f"{classes} * {width} * {heads}"
            raise refusal(self.function, "vocab_size * hidden_size * num_future_tokens", rule, got)
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
        num_valid: int | None = None,
        normalizer: float | Tensor | None = None,
    ) -> dict[str, Any]:
        """The weighted loss and its parts.

        Args:
            hidden_states: ``[B, S, H]`` floating, of the model's last layer.
            target_ids: ``[B, S]`` integers.
            attention_mask, segment_ids: as in ``UnifiedLoss``.
            num_valid: an int that no head has more targets than (tokens that are not padding, say).
                Without it each head waits for a GPU to count them, once forward and once backward.
            normalizer: what is divided by instead of each head's own count of targets (of all
                micro-batches and ranks): a number or 0-d tensor for all heads, or one entry per
                head ``[K]`` (see ``count_targets``; over ranks ``global_token_count`` with
                shift = 1 ... K). The sum over heads is then divided by K, however long rows are.

        Returns:
            dict: ``mtp_loss`` ``[]``, float32 (float64 for float64 parameters);
            ``per_token_losses``, K detached 0-d tensors without weight; the number ``mtp_weight``.
        """
        name, target = self.function, self._target_name()
        check_features(name, "hidden_states", hidden_states, self.hidden_size, "hidden_size")
        check_rank(name, "hidden_states", hidden_states, 3, "[B, S, H]")
        rows = rows_of(self, target_ids, attention_mask, segment_ids, target)
        check_device(name, target, target_ids, "hidden_states", hidden_states)
        if target_ids.shape != hidden_states.shape[:2]:
            rule = f"have the B and S of hidden_states {shape_text(hidden_states)}"
            raise refusal(name, target, rule, shape_text(target_ids))
        divisors = per_head(name, normalizer, self.num_future_tokens)
        length = target_ids.shape[1]
        counted = self._counted(rows, attention_mask)
        # Zeroed before the projections: they multiply all rows, and in the gradient of their
        # weights 0 * NaN would be NaN.
        padded = [F.pad(on, (0, length - on.shape[1])) for on in counted]
        hidden = torch.where(torch.stack(padded).any(0).unsqueeze(-1), hidden_states, 0)
        if not is_autocast(hidden.device):
            hidden = hidden.to(self.layer_norm.weight.dtype)
        hidden = self.layer_norm(hidden)
        losses = [
            self._loss(target, hidden[:, :-k], layer, rows.targets[:, k:], on, num_valid, divisor)
            for k, (on, layer, divisor) in enumerate(
                zip(counted, self._layers(), divisors, strict=True), 1
            )
        ]
        heads = self.num_future_tokens
        if normalizer is None:
            heads = max(min(heads, length - 1), 1)
        return {
            "mtp_loss": self.mtp_weight * (torch.stack(losses).sum() / heads),
            "per_token_losses": [loss.detach() for loss in losses],
            "mtp_weight": self.mtp_weight,
        }

    def count_targets(
        self,
        target_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """How many targets each head has, ``[K]`` int64: add them up over micro-batches and ranks
        and give the sum as ``normalizer``. Arguments as in ``forward``."""
        rows = rows_of(self, target_ids, attention_mask, segment_ids, self._target_name())
        return torch.stack([on.sum() for on in self._counted(rows, attention_mask)])

    def _target_name(self):
        return "targets" if self.owner else "target_ids"

    def _counted(self, rows: Rows, attention_mask):
        """[B, S - k] of each head k: where it has a target (none in rows that are too short)."""
        sources = None
        if self.mask_sources and attention_mask is not None:
            sources = (attention_mask != 0).expand(rows.targets.shape)
        counted = []
        for k in range(1, self.num_future_tokens + 1):
            on = rows.valid[:, k:]
            if rows.starts is not None:
                on = on & of_one_document(rows.starts, k)
            counted.append(on if sources is None else on & sources[:, :-k])
        return counted

    def _loss(self, target, hidden, layer, targets, on, num_valid, divisor):
        """The mean of one head, of which no logits are kept."""
        options = {"ignore_index": self.ignore_index, "temperature": self.temperature}
        options["num_valid"] = num_valid
        head = self.function, target, hidden, layer, targets, on
        if self.inplace_backward:
            return linear_cross_entropy(*head, normalizer=divisor, **options)
        # A mean has its gradients made in the forward, which are handed over once.
        losses = linear_cross_entropy(*head, reduction="none", **options)
        if divisor is None:
            return masked_mean(losses, on)
        divisor = as_divisor(self.function, divisor, losses)
        return over(masked_sum(losses, on).double(), divisor).to(losses.dtype)

    def _layers(self):
        """Weight and bias of each head. Those of a shared projection are views: nobody multiplies
        the other heads', and one gradient is made of them."""
        if not self.shared_projection:
            return [
                weight_and_bias(self.function, f"projections[{i}]", head)
                for i, head in enumerate(self.projections)
            ]
        weight, bias = weight_and_bias(self.function, "projection", self.projection)
        sizes = self.num_future_tokens, self.vocab_size
        biases = [None] * sizes[0] if bias is None else bias.unflatten(0, sizes).unbind()
        return list(zip(weight.unflatten(0, sizes).unbind(), biases, strict=True))


MultiTokenPredictionLoss = HiddenStateMTPLoss
