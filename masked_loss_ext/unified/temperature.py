# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy at a temperature that follows the spread of its own recent values."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_number, refusal
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
)
from ._rows import Needs, Rows, check_logits, masked_sum, read, reduced, rows_of, smoothed_loss
from ._state import (
    KeepsState,
    advances,
    borrow,
    clear,
    give_back,
    has_data,
    is_recomputing,
    is_transformed,
    snapshot,
    store,
)
from .penalties import PenalisesEnds

_SLOTS = 100  # losses remembered
_ENOUGH = 10  # of them before the temperature moves
_HISTORY = ("loss_history", "history_ptr", "history_size")


@dataclass(eq=False, repr=False)
class TemperatureScaledCrossEntropy(PenalisesEnds, KeepsState):
    r"""Smoothed cross entropy of logits / T, with T adapted during training.

    .. math::
        \ell_{bs} = -(1 - \varepsilon) \log p_y
        - \tfrac{\varepsilon}{V - 1} \sum_{j \ne y} \log p_j, \quad
        p = \mathrm{softmax}(z_{bs} / T), \qquad
        L = \frac{\sum_{bs} a_{bs} \ell_{bs}}{\sum_{bs} a_{bs}}

    with a = attention_mask on and target not ignore_index. Smoothing spreads over the *other*
    classes: PyTorch's ``label_smoothing`` with :math:`\varepsilon V / (V - 1)`.

    >>> loss_fn = TemperatureScaledCrossEntropy(0.8, label_smoothing=0.1, vocab_size=7)
    >>> out = loss_fn(logits, labels, attention_mask)
    >>> a = attention_mask.bool()
    >>> expected = F.cross_entropy(logits[a] / 0.8, labels[a], label_smoothing=0.1 * 7 / 6)
    >>> torch.testing.assert_close(out["loss"], expected)

    **Temperature.** After each training call with reduction "mean" the loss is written into a ring
    of 100. From the tenth on, with :math:`c` the (unbiased) standard deviation of the remembered
    losses over their mean, T rises by adaptation_rate for :math:`c > 0.1`, falls by it for
    :math:`c < 0.05`, and is clamped to temperature_bounds. Losses that are not finite, and batches
    in which nothing counts, are not written and move nothing. A steady run walks T to its lower
    bound: T rescales the objective that it is measured by, and inference does not know it.
    Everything happens on the device. ``update_state=False`` (all micro-batches but one of a step)
    changes no buffer, nor do evaluation, torch.func and the recomputation of activation
    checkpointing, which sees the T of the last call before it. Leave the loss outside of what is
    checkpointed, as it keeps nothing but the logits: with other calls in between, or compiled
    inside, the gradient would be of another T.

    **EOS.** ``penalty_on="targets"`` adds eos_penalty_weight to rows whose target is eos_token_id
    and whose column is below min_sequence_length: a constant of the data, without gradient.
    ``penalty_on="model"`` penalises the model instead where the data goes on:
    weight times the mean over early valid rows with another target of
    :math:`-\log(1 - p_{eos})`, p at temperature 1.

    Args:
        initial_temperature: T > 0 at the start.
        adaptive_temperature: adapt it.
        label_smoothing: :math:`\varepsilon` in [0, 1].
        vocab_size: V; needed with label smoothing.
        temperature_bounds: (lowest, highest) T.
        adaptation_rate: what T moves by.
        eos_token_id: None for no penalty.
        min_sequence_length: columns in which an end is early.
        eos_penalty_weight: weight of that.
        ignore_index: targets that do not count.
        penalty_on: "targets" or "model".

    Buffers: ``temperature``, ``history_ptr`` and ``history_size``, [] each, ``loss_history``
    ``[100]``. They stay where the module is, whatever the inputs are on.

    **On several ranks** each has its own T, of the losses of its own batches, until
    ``sync_state``: T is then the mean of all, and so is each remembered loss, the newest with the
    newest (of those ranks that have one as old). With as many tokens on each rank and T unmoved
    that is the state of one process with all batches; T itself moves by the spread of a rank's
    losses, which is that of larger batches nowhere.
    """

    initial_temperature: Positive = 1.0
    adaptive_temperature: Flag = True
    label_smoothing: Share = 0.1
    vocab_size: Size | None = None
    temperature_bounds: tuple[float, float] = (0.5, 2.0)
    adaptation_rate: Number = 0.01
    eos_token_id: Token | None = None
    min_sequence_length: Length = 20
    eos_penalty_weight: NotNegative = 5.0
    _: KW_ONLY
    ignore_index: Token = -100
    penalty_on: PenaltyOn = "targets"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size is None and self.label_smoothing > 0:
            raise ValueError(
                f"{self.function}: vocab_size must be provided when label_smoothing > 0"
            )
        check_class(self.function, "eos_token_id", self.eos_token_id, self.vocab_size)
        bounds = self.temperature_bounds
        if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
            rule = "be (lowest, highest)"
            raise refusal(self.function, "temperature_bounds", rule, repr(bounds), TypeError)
        check_number(self.function, "temperature_bounds[0]", bounds[0], above=0)
        check_number(self.function, "temperature_bounds[1]", bounds[1], least=bounds[0])
        self.temperature_bounds = bounds[0], bounds[1]
        self.add_state("temperature", (), float(self.initial_temperature))
        self.add_state("loss_history", (_SLOTS,))
        self.add_state("history_ptr", (), 0, dtype=torch.int64)
        self.add_state("history_size", (), 0, dtype=torch.int64)
        # of the last forward, for its recomputation in the backward pass; in no checkpoint
        self.add_state("_last_temperature", (), float(self.initial_temperature), persistent=False)

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        attention_mask: Tensor | None = None,
        reduction: str = "mean",
        *,
        segment_ids: Tensor | None = None,
        update_state: bool = True,
    ) -> dict[str, Any]:
        """The loss and what it was made with.

        Args:
            logits, targets, attention_mask, update_state: as in ``UnifiedLoss``.
            reduction: "mean" over the rows that count, "sum", or "none" (``[B * S]``).
            segment_ids: as there; columns are counted anew in each document.

        Returns:
            dict: "loss" float32 (float64 for float64 logits), "temperature" [] after the update,
            "label_smoothing".
        """
        check_choice(self.function, "reduction", reduction, ("mean", "sum", "none"))
        rows = rows_of(self, targets, attention_mask, segment_ids)
        check_logits(self.function, logits, targets, self.vocab_size)
        rows = rows._replace(logits=logits)
        [found] = read(self, rows, [self.needs(rows)])
        loss = smoothed_loss(found.terms, self.label_smoothing, logits.shape[-1])
        loss = reduced(loss, rows.valid, reduction)
        loss = loss + self.end_penalty(rows, found, loss, reduction)
        if reduction == "mean" and advances(self, update_state):
            self.record(loss, rows.valid)
        return {
            "loss": loss.reshape(-1) if reduction == "none" else loss,
            "temperature": self.current_temperature(loss),
            "label_smoothing": self.label_smoothing,
        }

    def needs(self, rows: Rows) -> Needs:
        temperature = self._temperature_for(rows.logits)
        return Needs(scaled=True, temperature=temperature, classes=self.end_classes(rows))

    def _temperature_for(self, logits):
        """The T of this forward, a copy: the buffer moves on before backward runs."""
        moves = self.training and self.adaptive_temperature
        if moves and is_recomputing():
            return snapshot(borrow(self, ("_last_temperature",), logits)["_last_temperature"])
        temperature = snapshot(borrow(self, ("temperature",), logits)["temperature"])
        if moves and has_data(temperature) and not is_transformed():
            with torch.no_grad():
                self._last_temperature.copy_(temperature)
        return temperature

    def current_temperature(self, like: Tensor) -> Tensor:
        """A copy of T as it is now, beside ``like``."""
        return borrow(self, ("temperature",), like)["temperature"].detach().clone()

    @torch.no_grad()
    def record(self, loss, valid):
        """Remember the loss and move the temperature by the rule above."""
        if not self.adaptive_temperature:
            return
        state = borrow(self, ("temperature", *_HISTORY), loss)
        temperature, history, pointer, size = state.values()
        loss = loss.detach().to(history.dtype)
        counts = loss.isfinite() & valid.any()
        slot = torch.arange(_SLOTS, device=loss.device)
        history = torch.where((slot == pointer) & counts, loss, history)
        size = (size + counts).clamp(max=_SLOTS)
        pointer = (pointer + counts) % _SLOTS
        step = torch.where(counts & (size >= _ENOUGH), self._step(history, slot < size), 0.0)
        moved = (temperature + step).clamp(*self.temperature_bounds)
        temperature = torch.where(step == 0, temperature, moved)
        give_back(self, dict(zip(state, (temperature, history, pointer, size), strict=True)))

    def _step(self, history, used):
        count = used.sum()
        mean = masked_sum(history, used) / count.clamp(min=1)
        squares = masked_sum((history - mean).square(), used)
        spread = (squares / (count - 1).clamp(min=1)).sqrt() / mean
        # Not the rate where wide: of two numbers torch.where makes the default dtype.
        sign = (spread > 0.1).to(mean.dtype) - (spread < 0.05).to(mean.dtype)
        return torch.where(mean > 0, sign * self.adaptation_rate, 0.0)

    @torch.no_grad()
    def reset_history(self):
        """Forget the losses; the temperature stays."""
        clear(self, _HISTORY)

    def _shares(self):
        age = torch.arange(_SLOTS, device=self.loss_history.device)
        has = age < self.history_size
        newest_first = self.loss_history[(self.history_ptr - 1 - age) % _SLOTS]
        return [self.temperature, torch.where(has, newest_first, 0), has]

    def _take(self, sums, ranks):
        temperature, losses, having = sums
        slot = torch.arange(_SLOTS, device=losses.device)
        size = (having > 0).sum()
        oldest_first = (losses / having.clamp(min=1))[(size - 1 - slot) % _SLOTS]
        history = torch.where(slot < size, oldest_first, 0)
        new = (temperature / ranks, history, size % _SLOTS, size)
        store(self, dict(zip(("temperature", *_HISTORY), new, strict=True)))
