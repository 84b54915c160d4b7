# SPDX-License-Identifier: BSD-3-Clause
"""From one loss per token to one number: the ways of counting that trainers argue about.

All of it works on a number per token, never on anything of the logits' size. Sums are taken in
float64, counts are exact; nothing is read on the host and no shape depends on data.
"""

import math

import torch

from ._checks import (
    ArgumentError,
    as_integers,
    as_mask,
    as_number,
    check_choice,
    check_constant,
    check_device,
    check_floating,
    check_integers,
    check_like,
    check_number,
    check_tensor,
    is_dtensor,
    is_readable,
    refusal,
    shape_text,
)
from .reference.squared_error import accumulate_dtype, select

AGGREGATIONS = ("sequence_mean", "sequence_sum", "weighted_mean")
REDUCTIONS = ("mean", "sum", "none", *AGGREGATIONS)


def aggregate_tokens(
    loss: torch.Tensor,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    *,
    token_weight: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Losses of tokens to one number, counted as ``reduction`` says.

    For losses that you build per token yourself (from ``row_statistics``, say);
    ``masked_cross_entropy`` and the token losses take the same words as their ``reduction``. With
    :math:`\ell_t` the losses of the tokens that the mask keeps, :math:`\omega_t` their token_weight
    (1 without), N their number, :math:`N_s` those of sequence s and S the number of sequences that
    have any:

    ================= ======================================================= ====================
    reduction                                                                 normalizer replaces
    ================= ======================================================= ====================
    "mean"            :math:`\sum_t \omega_t \ell_t / N`                      N
    "sequence_mean"   :math:`\frac1S \sum_s \frac1{N_s}
                      \sum_{t \in s} \omega_t \ell_t`                         S
    "sequence_sum"    :math:`\frac1S \sum_s \sum_{t \in s} \omega_t \ell_t`   S
    "weighted_mean"   :math:`\sum_t \omega_t \ell_t / \sum_t \omega_t`        the sum of weights
    "sum"             :math:`\sum_t \omega_t \ell_t`
    "none"            :math:`\omega_t \ell_t`, 0 where the mask is off
    ================= ======================================================= ====================

    Who wants which:

    - "mean", each token alike: pretraining and most fine-tuning; DAPO (arXiv 2503.14476), "token-
      mean" in verl.
    - "sequence_mean", each sequence alike: GRPO as published (DeepSeekMath, arXiv 2402.03300;
      verl#957, trl#2995), "seq-mean-token-mean" in verl; fine-tuning on packed rows where a sample
      shall count as it did unpacked (LongAlign, arXiv 2401.18058; Liger-Kernel#329).
    - "sequence_sum", no length in any denominator: Dr. GRPO (arXiv 2503.20783; trl#3256), with
      ``normalizer`` = sequences * the longest completion that is allowed; without it "seq-mean-
      token-sum" of verl, LUSPO (trl#4988).
    - "weighted_mean", the weights of a grey mask in both sums, so that a darker mask makes no
      smaller loss: masked training of image models (sd-scripts#236), ``F.mse_loss(weight=)``.

    >>> per_token = -row_statistics(logits, labels).log_prob
    >>> a = attention_mask.float()
    >>> expected = ((per_token * a).sum(-1) / a.sum(-1)).mean()
    >>> torch.testing.assert_close(
    ...     aggregate_tokens(per_token, attention_mask, "sequence_mean"), expected)

    A token that the mask excludes changes nothing, whatever its loss and weight are. Where the
    denominator is 0 (nothing is kept) the result is 0, attached to the graph.

    Args:
        loss: ``[..., S]`` floating; a sequence is the last dimension.
        mask: ``[..., S]`` any dtype, a token counts where it is not 0. None keeps all.
        reduction: see above.
        token_weight: ``[..., S]`` floating, may be fractional, negative or need a gradient.
        segment_ids: ``[..., S]`` integers, for packed rows: each run of one id is a sequence.
        normalizer: a number or a 0-d tensor to divide by instead of what this batch has: the
            tokens, sequences or weights of all micro-batches of a step, over all ranks.

        Dimensions of size 1 of mask, token_weight and segment_ids are expanded.

    Returns:
        ``[]`` (``[..., S]`` for "none"), float32 (float64 for float64 losses). Differentiable in
        loss and token_weight.
    """
    name = "aggregate_tokens"
    if is_dtensor(loss):
        from .distributed import _dtensor

        given = {"mask": mask, "token_weight": token_weight, "segment_ids": segment_ids}
        return _dtensor.tokens(name, loss, given, reduction, normalizer)
    mask, token_weight, segment_ids = _checked(
        name, loss, mask, reduction, token_weight, segment_ids
    )
    if normalizer is not None:
        check_normalizer(name, normalizer, reduction)
    on = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask != 0
    loss = select(on, loss).to(accumulate_dtype(loss, loss))
    share = on
    if token_weight is not None:
        weight = select(on, token_weight).to(loss.dtype)
        loss = loss * weight
        share = weight if reduction == "weighted_mean" else on
    divisor = as_divisor(name, normalizer, loss)
    return reduce_tokens(loss, on, share, reduction, segment_ids, divisor)


def reduce_tokens(loss, on, share, reduction, segment_ids=None, divisor=None):
    """loss, on, share: ``[..., S]``, 0 and False where a token does not count; share is what a
    token adds to the denominators that go by tokens. divisor: a 0-d tensor, or None."""
    if reduction == "none":
        return loss
    terms = loss.double()
    if reduction == "sum":
        return terms.sum().to(loss.dtype)
    # Counts in int64, so that the order in which a GPU adds them does not matter.
    share = share.double() if share.is_floating_point() else share.long()
    runs = None if segment_ids is None else _runs(segment_ids)
    if reduction == "sequence_mean":
        totals = _per_sequence(share, runs)
        terms = over(terms, totals if runs is None else totals.gather(-1, runs))
    if divisor is None:
        divisor = _denominator(on, share, reduction, runs)
    return over(terms.sum(), divisor).to(loss.dtype)


def denominator(on, share, reduction, segment_ids=None):
    """What reduce_tokens divides by where it is given nothing else, a 0-d tensor."""
    share = share.double() if share.is_floating_point() else share
    return _denominator(on, share, reduction, None if segment_ids is None else _runs(segment_ids))


def _denominator(on, share, reduction, runs):
    if reduction in ("mean", "weighted_mean"):
        return share.sum()
    return (_per_sequence(on.long(), runs) > 0).sum()


def _runs(segment_ids):
    """Which run of equal ids a token is in: 0, 1, 2 ... along the last dimension."""
    begins = segment_ids[..., 1:] != segment_ids[..., :-1]
    first = torch.zeros_like(segment_ids[..., :1], dtype=torch.int64)
    return torch.cat([first, begins.cumsum(-1)], -1)


def _per_sequence(values, runs):
    """Sums, ``[..., 1]``, or with runs ``[..., S]``, one in the place of each run and then 0."""
    if runs is None:
        return values.sum(-1, keepdim=True)
    return torch.zeros_like(values).scatter_add(-1, runs, values)


def over(total, denominator):
    """The quotient; 0 where the denominator is."""
    nothing = denominator == 0
    return torch.where(nothing, 0.0, total / torch.where(nothing, 1, denominator))


def check_normalizer(name, normalizer, reduction):
    """A Python number; a tensor is not looked at."""
    if reduction in ("sum", "none"):
        rule = f'be None for reduction {reduction!r}: only means and "sequence_sum" divide'
        raise refusal(name, "normalizer", rule, type(normalizer).__name__)
    if type(normalizer) in (int, float) and 0 <= normalizer < 2**63:  # those of training
        return
    if isinstance(normalizer, torch.Tensor):
        _check_exact(name, normalizer)
    else:
        check_number(name, "normalizer", normalizer, least=0)


def _check_exact(name, normalizer):
    """Mixed precision casts what a wrapped model is given, and with it the count of a step."""
    if normalizer.dtype in (torch.float16, torch.bfloat16):
        rule = "not be of half precision, which rounds counts above 256 or 2048"
        got = f"{normalizer.dtype} (cast with the inputs of a model? Keep it out of them, in an "
        got += "attribute, say)"
        raise refusal(name, "normalizer", rule, got, TypeError)


def as_divisor(name, normalizer, like):
    """A 0-d tensor; None stays None."""
    if normalizer is None:
        return None
    if not isinstance(normalizer, torch.Tensor):
        return as_number(normalizer, like.device)
    if normalizer.dim() != 0:
        raise refusal(name, "normalizer", "be a number []", shape_text(normalizer))
    check_device(name, "normalizer", normalizer, "the loss", like)
    check_constant(name, "normalizer", normalizer)
    if normalizer.is_complex():
        raise refusal(name, "normalizer", "be a real number", normalizer.dtype)
    if is_readable(normalizer) and not 0 <= normalizer.item() < math.inf:
        rule = "be finite and not negative"
        raise refusal(name, "normalizer", rule, f"{normalizer.item():g}")
    return normalizer.double()


def per_head(name, normalizer, heads):
    """What each of several heads is divided by: the same, or one entry of a tensor each."""
    if isinstance(normalizer, torch.Tensor) and normalizer.dim() > 0:
        if normalizer.shape != (heads,):
            rule = f"be a number or have one entry per head [{heads}]"
            raise refusal(name, "normalizer", rule, shape_text(normalizer), ArgumentError)
        _check_exact(name, normalizer)
        return list(normalizer.unbind())
    if normalizer is not None:
        check_normalizer(name, normalizer, "mean")
    return [normalizer] * heads


def check_weighted(name, reduction, token_weight):
    if reduction == "weighted_mean" and token_weight is None:
        rule = (
            "be given for reduction weighted_mean, which weights and divides by it (a grey mask "
            "goes there, too)"
        )
        raise refusal(name, "token_weight", rule, token_weight)


def _checked(name, loss, mask, reduction, token_weight, segment_ids):
    """mask, token_weight and segment_ids, expanded to the loss."""
    check_tensor(name, "loss", loss)
    check_floating(name, "loss", loss)
    check_choice(name, "reduction", reduction, REDUCTIONS)
    check_weighted(name, reduction, token_weight)
    if loss.dim() == 0 and reduction.startswith("sequence"):
        raise refusal(name, "loss", f"be [..., S] for reduction {reduction}", "[]")
    if token_weight is not None:
        check_tensor(name, "token_weight", token_weight)
        check_floating(name, "token_weight", token_weight)
    if segment_ids is not None:
        check_integers(name, "segment_ids", segment_ids)
    if mask is not None:
        check_tensor(name, "mask", mask)
    given = {
        "mask": as_mask(name, "mask", mask),
        "token_weight": token_weight,
        "segment_ids": as_integers(segment_ids),
    }
    for argument, tensor in given.items():
        if tensor is not None:
            check_like(name, argument, tensor, "loss", loss, broadcast=True)
    return [None if tensor is None else tensor.expand(loss.shape) for tensor in given.values()]
