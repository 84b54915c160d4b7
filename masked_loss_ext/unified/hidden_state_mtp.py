# SPDX-License-Identifier: BSD-3-Clause
"""Multi-token prediction from hidden states: a module that owns the projections of its heads."""

import torch
import torch.nn.functional as F

from .._checks import (
    check_device,
    check_flags,
    check_integers,
    check_mask,
    check_number,
    check_rank,
    shape_text,
)
from ._arguments import check_ignore_index, check_segments, check_size
from ._documents import document_starts, of_one_document
from ._operators import cross_entropy
from ._rows import check_floating, is_autocast, valid_rows

_NAME = "MultiTokenPredictionLoss"
_MOST_HEADS = 1024
_MOST_WEIGHTS = 2**40  # 4 TB of float32


class MultiTokenPredictionLoss(torch.nn.Module):
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

    def __init__(
        self,
        vocab_size,
        hidden_size,
        num_future_tokens=3,
        mtp_weight=0.1,
        shared_projection=False,
        temperature=1.0,
        *,
        ignore_index=-100,
        mask_sources=False,
        inplace_backward=False,
    ):
        super().__init__()
        check_size(_NAME, "vocab_size", vocab_size)
        check_size(_NAME, "hidden_size", hidden_size)
        check_size(_NAME, "num_future_tokens", num_future_tokens, 1, _MOST_HEADS)
        if vocab_size * hidden_size * num_future_tokens > _MOST_WEIGHTS:
            raise ValueError(
                f"{_NAME}: vocab_size * hidden_size * num_future_tokens must be at most "
                f"{_MOST_WEIGHTS} weights, got {vocab_size} * {hidden_size} * {num_future_tokens}"
            )
        check_number(_NAME, "mtp_weight", mtp_weight)
        check_number(_NAME, "temperature", temperature, above=0)
        check_ignore_index(_NAME, ignore_index)
        flags = {"shared_projection": shared_projection, "mask_sources": mask_sources}
        check_flags(_NAME, flags | {"inplace_backward": inplace_backward})
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_future_tokens = num_future_tokens
        self.mtp_weight = mtp_weight
        self.shared_projection = shared_projection
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.mask_sources = mask_sources
        self.inplace_backward = inplace_backward
        if shared_projection:
            self.projection = torch.nn.Linear(hidden_size, vocab_size * num_future_tokens)
        else:
            self.projections = torch.nn.ModuleList(
                torch.nn.Linear(hidden_size, vocab_size) for _ in range(num_future_tokens)
            )
        self.layer_norm = torch.nn.LayerNorm(hidden_size)

    def forward(self, hidden_states, target_ids, attention_mask=None, *, segment_ids=None):
        """The weighted loss and its parts.

        Args:
            hidden_states: ``[B, S, H]`` floating, of the model's last layer.
            target_ids: ``[B, S]`` integers.
            attention_mask: ``[B, S]``, a target counts where it is not 0. None: all.
            segment_ids: ``[B, S]`` (or ``[1, S]``) integers, for packed documents: a change begins
                one, and no head predicts a token of another.

        Returns:
            dict: ``mtp_loss`` ``[]``, float32 (float64 for float64 parameters);
            ``per_token_losses``, K detached 0-d tensors without weight; the number ``mtp_weight``.
        """
        self._check(hidden_states, target_ids, attention_mask)
        check_segments(_NAME, segment_ids, target_ids, "target_ids")
        starts = document_starts(segment_ids, target_ids)
        length = target_ids.shape[1]
        counted = [
            self._counted(target_ids, attention_mask, starts, k)
            for k in range(1, self.num_future_tokens + 1)
        ]
        # Zeroed before the projections: they multiply all rows, and in the gradient of their
        # weights 0 * NaN would be NaN.
        needed = _sources(counted, length)
        hidden = torch.where(needed.unsqueeze(-1), hidden_states, 0)
        if not is_autocast(hidden.device):
            hidden = hidden.to(self.layer_norm.weight.dtype)
        hidden = self.layer_norm(hidden)
        losses = [
            cross_entropy(
                _NAME,
                ("logits", "target_ids"),
                # As a matrix: of a slice of three dimensions F.linear adds the bias in a pass of
                # its own over the logits, and under a compiler or tensor subclass to a copy.
                self._logits(hidden[:, :-k].flatten(0, 1), k),
                target_ids[:, k:].flatten(),
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

    def _counted(self, target_ids, attention_mask, starts, k):
        """[B, S - k]: where head k has a target (none in rows that are too short)."""
        mask = None if attention_mask is None else attention_mask[:, k:]
        on = valid_rows(target_ids[:, k:], mask, self.ignore_index)
        if starts is not None:
            on = on & of_one_document(starts, k)
        if self.mask_sources and attention_mask is not None:
            on = on & (attention_mask[:, :-k] != 0)
        return on

    def _check(self, hidden_states, target_ids, attention_mask):
        check_floating(_NAME, "hidden_states", hidden_states, self.hidden_size, "hidden_size")
        check_rank(_NAME, "hidden_states", hidden_states, 3, "[B, S, H]")
        check_integers(_NAME, "target_ids", target_ids)
        check_device(_NAME, "target_ids", target_ids, "hidden_states", hidden_states)
        if target_ids.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"{_NAME}: target_ids must have the B and S of hidden_states "
                f"{shape_text(hidden_states)}, got {shape_text(target_ids)}"
            )
        check_mask(_NAME, "attention_mask", attention_mask, "target_ids", target_ids, 2)

    def extra_repr(self):
        return (
            f"vocab_size={self.vocab_size}, hidden_size={self.hidden_size}, "
            f"num_future_tokens={self.num_future_tokens}, mtp_weight={self.mtp_weight}, "
            f"temperature={self.temperature}"
        )


def _sources(counted, length):
    """[B, S]: which positions any head predicts from."""
    padded = [F.pad(on, (0, length - on.shape[1])) for on in counted]
    return torch.stack(padded).any(0)
