# SPDX-License-Identifier: BSD-3-Clause
"""Multi-token prediction: heads on hidden states, and heads that the model has itself."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_choice, check_device, check_rank, check_tensor, refusal, shape_text
from .._heads import weight_and_bias
from ..ops._autograd import is_autocast
from ._options import (
    Flag,
    LossModule,
    NotNegative,
    Number,
    Positive,
    Rule,
    Share,
    Size,
    Token,
    check_size,
    check_smoothing,
)
from ._rows import (
    Rows,
    check_features,
    check_list,
    check_logits,
    cross_entropy,
    linear_cross_entropy,
    masked_mean,
    may_be_on,
    of_one_document,
    rows_of,
    torch_smoothing,
    widened,
)
from ._state import KeepsState, advances, borrow, give_back

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
    ) -> dict[str, Any]:
        """The weighted loss and its parts.

        Args:
            hidden_states: ``[B, S, H]`` floating, of the model's last layer.
            target_ids: ``[B, S]`` integers.
            attention_mask, segment_ids: as in ``UnifiedLoss``.
            num_valid: an int that no head has more targets than (tokens that are not padding, say).
                Without it each head waits for a GPU to count them, once forward and once backward.

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
            rule = f"have the B and S of hidden_states {shape_text(hidden_states)}"
            raise refusal(name, target, rule, shape_text(target_ids))
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
            self._loss(target, hidden[:, :-k], layer, rows.targets[:, k:], on, num_valid)
            for (k, on), layer in zip(enumerate(counted, 1), self._layers(), strict=True)
        ]
        heads = max(min(self.num_future_tokens, length - 1), 1)
        return {
            "mtp_loss": self.mtp_weight * (torch.stack(losses).sum() / heads),
            "per_token_losses": [loss.detach() for loss in losses],
            "mtp_weight": self.mtp_weight,
        }

    def _loss(self, target, hidden, layer, targets, on, num_valid):
        """The mean of one head, of which no logits are kept."""
        options = {"ignore_index": self.ignore_index, "temperature": self.temperature}
        options["num_valid"] = num_valid
        head = self.function, target, hidden, layer, targets, on
        if self.inplace_backward:
            return linear_cross_entropy(*head, **options)
        # A mean has its gradients made in the forward, which are handed over once.
        return masked_mean(linear_cross_entropy(*head, reduction="none", **options), on)

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


def _counted(rows: Rows, sources, k):
    """[B, S - k]: where head k has a target (none in rows that are too short)."""
    on = rows.valid[:, k:]
    if rows.starts is not None:
        on = on & of_one_document(rows.starts, k)
    return on if sources is None else on & sources[:, :-k]


MultiTokenPredictionLoss = HiddenStateMTPLoss


_SMALLEST = 1e-7
_TOTALS = ("primary_loss", "additional_loss", "confidence_reg")
_SUMS = tuple(f"total_{name}" for name in _TOTALS)


@dataclass(eq=False, repr=False)
class AdaptiveMTPLoss(KeepsState):
    r"""Primary loss + confidence-weighted heads + a regulariser of the confidence.

    .. math::
        L = w\, \mathrm{CE}(z, y)
        + \beta\, \mathrm{clamp}(\bar c, 0, 1)\, \frac1K \sum_{i=0}^{K-1}
        \mathrm{CE}(z^{(i)}_{b,s},\ y_{b,s+i+1})
        + \lambda\, \overline{-\ln \max(|2c - 1|, 10^{-7})}

    CE is the mean over targets that count (mask on, not ignore_index), smoothed over the *other*
    classes (PyTorch's ``label_smoothing`` with :math:`\varepsilon V / (V - 1)`). Targets are
    aligned with the primary logits, so head i predicts i + 2 tokens on. Heads that reach past the
    end take no part; one whose targets are all masked is 0.

    >>> loss_fn = AdaptiveMTPLoss(vocab_size=7)
    >>> heads, confidence = [logits.flip(0)], torch.tensor([[0.9], [0.7]])
    >>> out = loss_fn(logits, labels, heads, confidence, attention_mask, mtp_active=True)
    >>> a = attention_mask.bool()
    >>> primary = F.cross_entropy(logits[a], labels[a])
    >>> head = F.cross_entropy(logits.flip(0)[:, :-1][a[:, 1:]], labels[:, 1:][a[:, 1:]])
    >>> torch.testing.assert_close(out["primary_loss"], primary)
    >>> torch.testing.assert_close(out["additional_loss"], 0.1 * 0.8 * head)

    The confidence weight gets a gradient, which is positive: lowering the confidence lowers the
    loss, and the regulariser is content with 0 as it is with 1. ``detach_confidence=True`` keeps
    the value and stops that gradient (not the regulariser's).

    Args:
        vocab_size: V.
        primary_loss_weight: w.
        additional_loss_base_weight: :math:`\beta`.
        confidence_reg_strength: :math:`\lambda`; 0 for none.
        use_confidence_weighting: without it, or without scores, :math:`\bar c = 1`.
        label_smoothing: :math:`\varepsilon` in [0, 1 - 1 / V].
        ignore_index: targets that do not count.
        detach_confidence: see above.

    Buffers: ``total_primary_loss``, ``total_additional_loss``, ``total_confidence_reg`` and
    ``loss_count``, [] each, of training calls whose loss is finite. They stay where the module is.

    **On several ranks** each counts its own calls until ``sync_state``. The averages are then those
    over the calls of all ranks, ``loss_count`` the mean number of calls (rounded up). With as many
    tokens on each rank in each call that is the state of one process with all batches.
    """

    vocab_size: Size
    primary_loss_weight: Number = 1.0
    additional_loss_base_weight: Number = 0.1
    confidence_reg_strength: NotNegative = 0.01
    use_confidence_weighting: Flag = True
    label_smoothing: Share = 0.0
    ignore_index: Token = -100
    _: KW_ONLY
    detach_confidence: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_smoothing(self.function, "label_smoothing", self.label_smoothing, self.vocab_size)
        for name in _SUMS:
            self.add_state(name)
        self.add_state("loss_count", (), 0, dtype=torch.int64)

    def forward(
        self,
        primary_logits: Tensor,
        targets: Tensor,
        additional_logits: Sequence[Tensor] | None = None,
        confidence_scores: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mtp_active: bool | Tensor = False,
        *,
        segment_ids: Tensor | None = None,
        update_state: bool = True,
    ) -> dict[str, Any]:
        """The loss and its parts.

        Args:
            primary_logits: ``[B, S, V]`` floating.
            targets: ``[B, S]`` integers, aligned with primary_logits.
            additional_logits: a list of K tensors ``[B, S, V]``.
            confidence_scores: floating in [0, 1], one per row (``[B]``, ``[B, 1]``) or position
                (``[B, S]``, ``[B, S, 1]``); what the mask excludes is left out of its mean. Any
                other shape is averaged as it is.
            mtp_active: whether the heads count; a bool, or a 0-d tensor.
            attention_mask, segment_ids, update_state: as in ``UnifiedLoss``.

        Returns:
            dict: "loss", "primary_loss", "additional_loss", "confidence_reg" (weighted),
            "avg_confidence", "effective_mtp_weight", [] each, and "mtp_active" as given.
        """
        rows = rows_of(self, targets, attention_mask, segment_ids)
        primary = self._cross_entropy("primary_logits", primary_logits, rows)
        heads = additional_logits, confidence_scores, mtp_active
        return self.from_primary(primary, rows, *heads, update_state=update_state)

    def from_primary(
        self,
        primary: Tensor,
        rows: Rows,
        additional_logits: Sequence[Tensor] | None,
        confidence_scores: Tensor | None,
        mtp_active: bool | Tensor,
        update_state: bool,
    ) -> dict[str, Any]:
        """As ``forward``, of the primary cross entropy [], not yet weighted."""
        if additional_logits is not None:  # active or not: a mask in its place would be lost
            check_list(self.function, "additional_logits", additional_logits)
        zero = primary.new_zeros(())
        average = regularizer = additional = weight = zero
        confidence = None
        if confidence_scores is not None:
            average, regularizer = self._confidence(confidence_scores, rows.valid)
            confidence = average.detach() if self.detach_confidence else average
        if may_be_on(self.function, mtp_active) and additional_logits is not None:
            additional = self._heads(additional_logits, rows, zero)
            weight = zero + self.additional_loss_base_weight
            if confidence is not None and self.use_confidence_weighting:
                weight = weight * confidence.clamp(0, 1)
            if isinstance(mtp_active, Tensor):
                weight = torch.where(mtp_active != 0, weight, 0)
        parts = {
            "primary_loss": self.primary_loss_weight * primary,
            "additional_loss": weight * additional,
            "confidence_reg": self.confidence_reg_strength * regularizer,
        }
        loss = parts["primary_loss"] + parts["additional_loss"] + parts["confidence_reg"]
        if advances(self, update_state):
            self._record(loss, parts)
        return {
            "loss": loss,
            **parts,
            "avg_confidence": average.detach(),
            "effective_mtp_weight": weight.detach(),
            "mtp_active": mtp_active,
        }

    def compute_cross_entropy(
        self,
        logits: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        *,
        shift: int = 0,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Smoothed mean cross entropy [] of logits ``[B, S, V]``; position s is scored against
        targets[:, s + shift], of the same segment."""
        rows = rows_of(self, targets, attention_mask, segment_ids)
        return self._cross_entropy("logits", logits, rows, shift)

    def _cross_entropy(self, argument, logits, rows, shift=0):
        check_logits(self.function, logits, rows.targets, self.vocab_size, argument)
        return cross_entropy(
            self.function,
            (argument, "targets"),
            logits,
            rows.targets,
            rows.valid,
            ignore_index=self.ignore_index,
            label_smoothing=torch_smoothing(self.label_smoothing, self.vocab_size),
            shift=shift,
            segment_ids=rows.starts,
        )

    def compute_confidence_regularization(
        self, confidence_scores: Tensor, target_mode: str = "binary", *, valid: Tensor | None = None
    ) -> Tensor:
        """Mean, not yet weighted, of what uncertain scores cost: :math:`-\\ln \\max(|2c - 1|,
        10^{-7})` ("binary") or :math:`-\\ln \\max(c, 10^{-7})` ("high"); of valid scores alone, a
        bool tensor of their shape."""
        modes = ("binary", "high")
        check_choice(self.function, "target_mode", target_mode, modes, "Unknown target_mode: ")
        check_tensor(self.function, "confidence_scores", confidence_scores)
        if valid is None:
            valid = torch.ones_like(confidence_scores, dtype=torch.bool)
        scores = torch.where(valid, widened(confidence_scores), 1)
        certainty = (2 * scores - 1).abs() if target_mode == "binary" else scores
        return masked_mean(-certainty.clamp(min=_SMALLEST).log(), valid)

    def _confidence(self, scores, valid):
        """The mean of the scores that belong to something that counts, and the regulariser."""
        check_features(self.function, "confidence_scores", scores)
        check_device(self.function, "confidence_scores", scores, "targets", valid)
        batch, length = valid.shape
        on = torch.ones_like(scores, dtype=torch.bool)
        if scores.shape in ((batch, length), (batch, length, 1)):
            on = valid.reshape(scores.shape)
        elif scores.shape in ((batch,), (batch, 1)):
            on = valid.any(1).reshape(scores.shape)
        average = masked_mean(scores, on)
        if self.confidence_reg_strength > 0:
            return average, self.compute_confidence_regularization(scores, valid=on)
        return average, average.new_zeros(())

    def _heads(self, additional_logits, rows, zero):
        """Mean over the heads that do not reach past the end."""
        if len(additional_logits) == 0:
            return zero
        losses = [
            self._cross_entropy(f"additional_logits[{i}]", logits, rows, i + 1)
            for i, logits in enumerate(additional_logits)
        ]  # 0, attached to the graph, of those that do
        return sum(losses) / max(min(len(losses), rows.targets.shape[1] - 1), 1)

    @torch.no_grad()
    def _record(self, loss, parts):
        state = borrow(self, (*_SUMS, "loss_count"), loss)
        counts = loss.isfinite()  # one NaN would spoil the sums for good
        for name in _TOTALS:
            total = state[f"total_{name}"]
            total.add_(torch.where(counts, parts[name].detach(), 0).to(total.dtype))
        state["loss_count"].add_(counts)
        give_back(self, state)

    def _shares(self):
        return [*(getattr(self, name) for name in _SUMS), self.loss_count]

    def _take(self, sums, ranks):
        *totals, count = sums
        calls = (count / ranks).ceil()
        for name, total in zip(_SUMS, totals, strict=True):
            getattr(self, name).copy_(total / count.clamp(min=1) * calls)
        self.loss_count.copy_(calls)

    def get_statistics(self) -> dict[str, Any]:
        """Averages over the recorded calls, as numbers: it waits for the device."""
        count = self.loss_count.item()
        averages = {
            f"avg_{name}": getattr(self, f"total_{name}").item() / max(count, 1) for name in _TOTALS
        }
        return {**averages, "total_computations": count}

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forget the recorded calls."""
        for name in (*_SUMS, "loss_count"):
            getattr(self, name).zero_()
