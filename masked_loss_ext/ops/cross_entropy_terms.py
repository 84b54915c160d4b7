# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy_terms: the public function.

The schema is in csrc/schemas.cpp, the formulas in csrc/cross_entropy_terms/formula.h; what leads to
the operator, and its derivatives, in _autograd.py. The operator checks shapes, dtypes and labels.
"""

from collections.abc import Iterator

import torch

from .. import reference
from .._checks import (
    REFUSALS,
    as_integers,
    as_mask,
    check_integers,
    check_tensor,
    check_whole,
    refusal,
    shape_text,
)
from ..reference import CrossEntropyTerms
from ._autograd import Differentiable, Like, is_transformed
from .masked_cross_entropy import temperature_tensor, with_adjacent_classes
from .masked_cross_entropy_checks import check_rows

_NAME = "cross_entropy_terms"


def cross_entropy_terms(
    logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor | None = None,
    classes: torch.Tensor | None = None,
    links: tuple[torch.Tensor, torch.Tensor] | None = None,
    ignore_index: int = -100,
    unscaled: bool = True,
) -> CrossEntropyTerms:
    r"""What language-model losses are made of, per row, from one read of the logits.

    A row counts where ``mask`` is on and its label :math:`y` is not ``ignore_index``; the others
    are not read, all their terms are 0 and so is their gradient. With
    :math:`p = \mathrm{softmax}(z)` of the logits and :math:`q = \mathrm{softmax}(z / T)`:

    ==========================  ================================================================
    ``scaled_log_prob``         :math:`\ln q_y`
    ``scaled_mean_log_prob``    :math:`\frac{1}{V} \sum_j \ln q_j`, for label smoothing
    ``log_prob``                :math:`\ln p_y`
    ``entropy``                 :math:`-\sum_j p_j \ln p_j`, nats
    ``class_log_prob``          :math:`\ln p_c` at each of ``classes``, 0 where one is negative
    ``unlikelihood``            :math:`\sum_c -\ln(1 - p_c)` over the n-gram candidates
    ``candidates``              how many they are; no gradient
    ==========================  ================================================================

    A candidate of position t is the label of u = context_before[t], context_before[u], ... until
    -1, where it is not that of t and ngram_after[u] >= t: a class that would repeat an n-gram of
    the same sequence. In :math:`-\ln(1 - p_c)` a log-probability above -2^-24 is taken for it, so
    that it is at most 24 ln 2; there it is constant, with gradient 0.

    >>> terms = cross_entropy_terms(logits, labels, temperature=0.8)
    >>> log_q = (logits / 0.8).log_softmax(-1)
    >>> torch.testing.assert_close(
    ...     terms.scaled_log_prob, log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    >>> torch.testing.assert_close(terms.scaled_mean_log_prob, log_q.mean(-1))

    Args:
        logits: ``[..., V]`` float16, bfloat16, float32 or float64; any strides, but where the last
            dimension is not contiguous they are copied. A logit of -inf (a banned class) has
            probability and gradient exactly 0; one of +inf makes all of its row NaN.
        target: ``[...]`` int64, int32, int16, int8 or uint8.
        mask: ``[...]`` any dtype, on where not 0. None keeps all.
        temperature: T > 0, a number or a 0-d tensor (that may change without recompilation); gets
            no gradient. None: 1.
        classes: ``[..., K]`` integers; negative where none is asked for.
        links: (context_before, ngram_after), each ``[..., S]`` int32, as ``repetition_links``
            returns them; the last dimension of target is then S.
        ignore_index: label of rows that do not count.
        unscaled: False leaves out all but the first two; classes and links must then be None.

    Returns:
        CrossEntropyTerms of tensors ``[...]`` (class_log_prob ``[..., K]``), float32 (float64 for
        float64 logits); None what was not asked for.

    Raises:
        IndexError: a label outside [0, V) that is not ignore_index, or a class not below V (CPU; on
            CUDA the terms of that row, or that class_log_prob, are NaN).
        ValueError: a shape, dtype, device or option that does not fit.
    """
    try:
        if logits.dim() > 0 and logits.stride(-1) != 1:
            logits = with_adjacent_classes(logits)
        mask = as_mask(_NAME, "mask", mask)
        context_before, ngram_after = (None, None) if links is None else links
        args = (
            logits,
            as_integers(target),
            mask,
            None if temperature is None else temperature_tensor(_NAME, temperature, logits),
            classes,
            context_before,
            ngram_after,
            ignore_index,
            unscaled,
        )
        if is_transformed():
            _check_traced(operator.forward.arguments(*args))
        results = operator.call(args, 7)
    except REFUSALS as error:  # a list has no .stride(), and what else there is
        failure = error
    else:
        asked = (True, True, unscaled, unscaled, classes is not None, *(links is not None,) * 2)
        return CrossEntropyTerms._make(
            term if there else None for term, there in zip(results, asked, strict=True)
        )
    try:
        _check_types(logits, target, mask, classes, links)
        raise failure
    finally:
        del failure  # its traceback holds this frame: a cycle that would keep the logits


def _check_types(logits, target, mask, classes, links):
    check_whole(_NAME, "logits", logits)
    check_whole(_NAME, "target", target)
    for argument, tensor in {"mask": mask, "classes": classes}.items():
        if tensor is not None:
            check_whole(_NAME, argument, tensor)
    if links is None:
        return
    if not isinstance(links, (tuple, list)) or len(links) != 2:
        got = type(links).__name__
        raise refusal(_NAME, "links", "be a pair (context_before, ngram_after)", got, TypeError)
    for argument, tensor in zip(("context_before", "ngram_after"), links, strict=True):
        check_tensor(_NAME, argument, tensor)


def _check_traced(a):
    """Under torch.func plain PyTorch stands in for the operator, which checks all of it."""
    check_rows(
        _NAME,
        a.logits,
        {
            "target": a.target,
            "mask": a.mask,
            "context_before": a.context_before,
            "ngram_after": a.ngram_after,
        },
    )
    check_integers(_NAME, "target", a.target)
    if a.temperature is not None and a.temperature.dim() > 0:
        raise refusal(_NAME, "temperature", "be a number []", shape_text(a.temperature))
    if a.classes is not None and a.classes.shape[:-1] != a.logits.shape[:-1]:
        rule = f"be [..., K] with the leading dimensions of logits {shape_text(a.logits)}"
        raise refusal(_NAME, "classes", rule, shape_text(a.classes))
    if not a.unscaled and (a.classes is not None or a.context_before is not None):
        raise ValueError(f"{_NAME}: classes and links must be None where unscaled is False")


def _likes(a) -> Iterator[Like]:
    rows, dtype = a.logits.shape[:-1], reference.accumulate_dtype(a.logits, a.logits)
    linked = rows if a.context_before is not None else None
    yield rows, dtype
    yield rows, dtype
    yield rows if a.unscaled else None, dtype
    yield rows if a.unscaled else None, dtype
    yield None if a.classes is None else (*rows, a.classes.shape[-1]), dtype
    yield linked, dtype
    yield linked, dtype
    yield (*rows, 4), torch.float64


def _plain(a) -> CrossEntropyTerms:
    options = a._asdict()
    links = (options.pop("context_before"), options.pop("ngram_after"))
    return reference.cross_entropy_terms(**options, links=None if links[0] is None else links)


operator = Differentiable("cross_entropy_terms", _likes, _plain)
