# SPDX-License-Identifier: BSD-3-Clause
"""Several heads that predict the next tokens: one logits tensor, or classifier, per distance."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from .._aggregate import per_head
from .._checks import (
    ArgumentError,
    check_beside,
    check_floating,
    check_int,
    check_label_rows,
    check_length,
    check_number,
    check_rank,
    check_same_device,
    check_tensor,
    refusal,
    shape_text,
)
from .._heads import Head, check_layer, weight_and_bias
from ..ops.linear_cross_entropy import masked_linear_cross_entropy
from ..ops.masked_cross_entropy import masked_cross_entropy

_NAME = "MultiTokenPredictionLoss"


class MultiTokenPredictionLoss(torch.nn.Module):
    r"""Cross entropy of n heads, of which head i predicts the token i + 1 positions on.

    .. math::
        L_i = \frac{1}{|V_i|} \sum_{(b, t) \in V_i}
        -\log \mathrm{softmax}(x^i_{bt})_{y_{b,t+i+1}}, \qquad
        V_i = \{(b, t) : a_{b,t+i+1} \text{ on},\ y_{b,t+i+1} \ne \text{ignore\_index}\}, \qquad
        L = \sum_{i=0}^{n-1} \hat w_i L_i,\quad \hat w_i = w_i / \sum_j w_j

    labels are not shifted: they are the input's own tokens. The mask is the target's.

    >>> loss_fn = MultiTokenPredictionLoss(2, (3.0, 1.0))
    >>> total, loss_dict = loss_fn(logits_list, labels, attention_mask)
    >>> y = labels.masked_fill(attention_mask == 0, -100)
    >>> one = F.cross_entropy(logits_list[0][:, :-1].flatten(0, 1), y[:, 1:].flatten())
    >>> two = F.cross_entropy(logits_list[1][:, :-2].flatten(0, 1), y[:, 2:].flatten())
    >>> torch.testing.assert_close(total, 0.75 * one + 0.25 * two)
    >>> torch.testing.assert_close(loss_dict["loss_t2"], two)
    >>> list(loss_dict)
    ['loss_t1', 'loss_t2', 'total_multitoken_loss']

    With ``heads``, the classifiers, the first argument are hidden states, and no logits are kept:
    each head is a ``masked_linear_cross_entropy``, to which rows without a target cost nothing.

    >>> heads = [torch.nn.Linear(4, 7), torch.nn.Linear(4, 7, bias=False)]
    >>> expected, _ = loss_fn([head(hidden) for head in heads], labels, attention_mask)
    >>> found, _ = loss_fn(hidden, labels, attention_mask, heads=heads)
    >>> torch.testing.assert_close(found, expected)

    No head's logits are copied, and nothing waits for a GPU (with heads: where ``num_valid``
    is given). A head without a target (every row is
    shorter than its distance, or masked) has loss 0, attached to the graph, with gradient 0, where
    the lines above give NaN; its weight stays.

    An untrained model over V tokens is near :math:`\ln V`: 10.825 for 50257. The mean of the token
    means of micro-batches is not the token mean of all their tokens, unless each has as many;
    with ``normalizer`` it is:

    >>> counts = sum(loss_fn.count_targets(y, a) for y, a in zip(labels[:, None],
    ...                                                          attention_mask[:, None]))
    >>> parts = [loss_fn([x[b : b + 1] for x in logits_list], labels[b : b + 1],
    ...                  attention_mask[b : b + 1], normalizer=counts)[0] for b in range(2)]
    >>> torch.testing.assert_close(sum(parts), total)

    Args:
        n_pred_tokens: n, the number of heads.
        aux_loss_weights: n numbers, none negative, with a positive sum. The attribute of this name
            holds them divided by it.
        ignore_index: targets with this label do not count.
        mask_sources: let a position predict only where its own mask is on, too. It makes a
            difference where padding comes first: its last position predicts the first token.
        renormalize_empty_heads: give the weight of heads without a target to the others. Without
            one in this call, or in the whole step where ``normalizer`` has one entry per head.
        inplace_backward: write gradients over the logits; each head needs memory of its own. Not
            with heads, of which no logits are kept.

    Raises:
        ValueError: shapes, dtypes or weights that do not fit. For a number of weights or heads
            other than n the error is an AssertionError as well.
    """

    def __init__(
        self,
        n_pred_tokens: int = 4,
        aux_loss_weights: Iterable[float] | torch.Tensor = (1.0, 0.5, 0.3, 0.2),
        ignore_index: int = -100,
        *,
        mask_sources: bool = False,
        renormalize_empty_heads: bool = False,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__()
        check_length(_NAME, "n_pred_tokens", n_pred_tokens)
        check_int(_NAME, "ignore_index", ignore_index)
        weights = _numbers(aux_loss_weights)
        if len(weights) != n_pred_tokens:
            rule = f"have one entry per head, n_pred_tokens {n_pred_tokens}"
            raise refusal(_NAME, "aux_loss_weights", rule, len(weights), ArgumentError)
        total = sum(weights)
        if not (total > 0 and math.isfinite(total)):
            raise refusal(_NAME, "aux_loss_weights", "have a positive, finite sum", weights)
        self.n_pred_tokens = n_pred_tokens
        self.aux_loss_weights = tuple(weight / total for weight in weights)
        self.ignore_index = ignore_index
        self.mask_sources = mask_sources
        self.renormalize_empty_heads = renormalize_empty_heads
        self.inplace_backward = inplace_backward

    def forward(
        self,
        logits_list: Sequence[torch.Tensor] | torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        heads: Sequence[Head] | None = None,
        segment_ids: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
        num_valid: int | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum and a dict of its parts.

        Args:
            logits_list: n tensors ``[B, S, V]`` floating, the head of the next token first. With
                heads hidden states instead: one tensor ``[B, S, D]`` for all heads, or n of them.
            labels: ``[B, S]`` integers, not shifted.
            attention_mask: ``[B, S]`` any dtype, a target counts where it is not 0. None: all.
                ``[1, S]`` is for the whole batch, as with segment_ids.
            heads: n classifiers, each a ``torch.nn.Linear``, a weight ``[V, D]`` or (weight, bias).
                They may be the same, and are not called. As in ``masked_linear_cross_entropy``
                there is one backward, and a frozen one takes no product for its gradient.
            segment_ids: ``[B, S]`` integers, for packed documents: no head predicts a token of
                another segment.
            normalizer: what is divided by instead of each head's own count: a number or 0-d tensor
                for all heads, or one entry per head ``[n]``: the sum of ``count_targets`` over
                micro-batches, over ranks ``torch.stack([global_token_count(masks, shift=i + 1)
                for i in range(n)])``.
            num_valid: with heads, an int that no head has more targets than (tokens that are not
                padding, say), as in ``masked_linear_cross_entropy``.

        Returns:
            total ``[]``, float32 (float64 for float64 logits), and a dict of n + 1 detached 0-d
            tensors: ``loss_t1`` ... ``loss_tn`` (without weights) and ``total_multitoken_loss``.
            They become numbers where they are printed (``f"{value:.3f}"``), and only then wait for
            the device.
        """
        attention_mask, segments = self._rows(labels, attention_mask, segment_ids)
        if heads is None:
            calls = self._of_logits(logits_list, labels, num_valid)
        else:
            calls = self._of_hidden(logits_list, heads, labels, num_valid)
        divisors = per_head(_NAME, normalizer, self.n_pred_tokens)
        losses = [
            call(
                labels,
                attention_mask,
                ignore_index=self.ignore_index,
                shift=i + 1,
                segment_ids=segments,
                normalizer=divisor,
            )
            for i, (call, divisor) in enumerate(zip(calls, divisors, strict=True))
        ]
        total = losses[0] * self.aux_loss_weights[0]
        for w, loss in zip(self.aux_loss_weights[1:], losses[1:], strict=True):
            total = torch.add(total, loss, alpha=w)
        if self.renormalize_empty_heads:
            counts = divisors
            if not _is_per_head(normalizer):
                counts = self._counts(labels, attention_mask, segments)
            # 1 / the share of the weights that heads with targets have; on the device.
            weighted = zip(self.aux_loss_weights, counts, strict=True)
            kept = sum((count != 0).double() * w for w, count in weighted)
            total = total * (1 / torch.where(kept > 0, kept, 1.0)).to(total.dtype)
        loss_dict = {f"loss_t{i + 1}": loss.detach() for i, loss in enumerate(losses)}
        # Its own memory: a caller may scale the total in place.
        loss_dict["total_multitoken_loss"] = total.detach().clone()
        return total, loss_dict

    def count_targets(
        self,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        segment_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """How many targets each head has, ``[n]`` int64: add them up over the micro-batches of a
        step and give the sum as ``normalizer``. Arguments as in ``forward``."""
        rows = self._rows(labels, attention_mask, segment_ids)
        return torch.stack(self._counts(labels, *rows))

    def _rows(self, labels, attention_mask, segment_ids):
        """The mask and the segments, ``[B, S]``; a position that may not predict is in a segment
        that has no target."""
        check_label_rows(_NAME, "labels", labels, attention_mask, segment_ids, broadcast=True)
        if attention_mask is not None:
            attention_mask = attention_mask.expand(labels.shape)
        if segment_ids is not None:
            segment_ids = segment_ids.expand(labels.shape)
        if self.mask_sources and attention_mask is not None:
            off = (attention_mask == 0).long()
            segment_ids = off if segment_ids is None else 2 * segment_ids.long() + off
        return attention_mask, segment_ids

    def _counts(self, labels, attention_mask, segments):
        on = labels.long() != self.ignore_index  # -100 and uint8 156 would be equal
        if attention_mask is not None:
            on = on & (attention_mask != 0)
        counts = []
        for k in range(1, self.n_pred_tokens + 1):
            targets = on[:, k:]
            if segments is not None:
                targets = targets & (segments[:, k:] == segments[:, :-k])
            counts.append(targets.sum())
        return counts

    def _of_logits(self, logits_list, labels, num_valid) -> list[Callable[..., torch.Tensor]]:
        """The cross entropy of each head, of which rows and labels are still to be given."""
        if num_valid is not None:
            raise refusal(_NAME, "num_valid", "be None without heads", num_valid)
        if isinstance(logits_list, torch.Tensor):
            got = "Tensor (hidden states? Then give heads)"
            raise refusal(_NAME, "logits_list", "be a list of tensors", got, TypeError)
        self._check_per_head("logits_list", logits_list, "tensor")
        _check_states("logits_list", logits_list, labels, "[B, S, V]")
        over = self.inplace_backward
        return [partial(masked_cross_entropy, x, inplace_backward=over) for x in logits_list]

    def _of_hidden(self, hidden, heads, labels, num_valid) -> list[Callable[..., torch.Tensor]]:
        if self.inplace_backward:
            rule = "be False with heads, of which no logits are kept"
            raise refusal(_NAME, "inplace_backward", rule, True)
        self._check_per_head("heads", heads, "classifier")
        several = not isinstance(hidden, torch.Tensor)
        if several:
            self._check_per_head("hidden", hidden, "tensor")
        _check_states("hidden", hidden if several else [hidden], labels, "[B, S, D]", several)
        calls: list[Callable[..., torch.Tensor]] = []
        for i, head in enumerate(heads):
            name, one = f"heads[{i}]", hidden[i] if several else hidden
            weight, bias = weight_and_bias(_NAME, name, head)
            names = f"hidden[{i}]" if several else "hidden", f"{name} weight", f"{name} bias"
            check_layer(_NAME, one, weight, bias, names)
            layer = {"bias": bias, "num_valid": num_valid}
            calls.append(partial(masked_linear_cross_entropy, one, weight, **layer))
        return calls

    def _check_per_head(self, name, values, what):
        if not isinstance(values, (list, tuple, torch.nn.ModuleList)):
            got = type(values).__name__
            raise refusal(_NAME, name, f"be a list of {what}s", got, TypeError)
        if len(values) != self.n_pred_tokens:
            rule = f"have one {what} per head, n_pred_tokens {self.n_pred_tokens}"
            raise refusal(_NAME, name, rule, len(values), ArgumentError)

    def extra_repr(self) -> str:
        weights = ", ".join([f"{weight:.4g}" for weight in self.aux_loss_weights])
        text = f"n_pred_tokens={self.n_pred_tokens}, aux_loss_weights=({weights})"
        if self.ignore_index != -100:
            text += f", ignore_index={self.ignore_index}"
        for name in ("mask_sources", "renormalize_empty_heads", "inplace_backward"):
            text += f", {name}=True" if getattr(self, name) else ""
        return text


def _check_states(name, tensors, labels, layout, several=True):
    """Logits or hidden states of the labels' B and S."""
    for i, tensor in enumerate(tensors):
        one = f"{name}[{i}]" if several else name
        check_tensor(_NAME, one, tensor)
        check_rank(_NAME, one, tensor, 3, layout)
        check_floating(_NAME, one, tensor)
        if tensor.shape[:2] != labels.shape:
            rule = f"have the B and S of labels {shape_text(labels)}"
            raise refusal(_NAME, one, rule, shape_text(tensor))
        check_same_device(_NAME, one, tensor, "labels", labels)
        check_beside(_NAME, "labels", labels, one, tensor)


def _numbers(weights):
    """The heads' weights as floats; a tensor of them is read once, here."""
    if isinstance(weights, torch.Tensor):
        check_tensor(_NAME, "aux_loss_weights", weights)
        check_rank(_NAME, "aux_loss_weights", weights, 1, "[n_pred_tokens]")
        weights = weights.tolist()
    if isinstance(weights, str) or not hasattr(weights, "__iter__"):
        got = type(weights).__name__
        raise refusal(_NAME, "aux_loss_weights", "be a list of numbers", got, TypeError)
    weights = list(weights)
    for i, weight in enumerate(weights):
        check_number(_NAME, f"aux_loss_weights[{i}]", weight, least=0)
    return [float(weight) for weight in weights]


def _is_per_head(normalizer):
    return isinstance(normalizer, torch.Tensor) and normalizer.dim() > 0
