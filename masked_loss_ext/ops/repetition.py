# SPDX-License-Identifier: BSD-3-Clause
"""repetition_counts and repetition_links: exact n-gram and run statistics of rows of tokens.

The schemas are in csrc/schemas.cpp, the way it is done in csrc/repetition/formula.h. All is
integer: there is no derivative.
"""

from typing import NamedTuple

import torch

from .._checks import (
    CONVERTED_INTEGERS,
    as_integers,
    as_mask,
    check_device,
    check_integers,
    check_length,
    check_tensor,
    refusal,
    shape_text,
)

LONGEST_WINDOW = 2**63 - 1
LONGEST_ROW = 2**30  # kMaxRowLength of csrc/repetition/formula.h

_counts_op = torch.ops.masked_loss_ext.repetition_counts.default
_links_op = torch.ops.masked_loss_ext.repetition_links.default


class RepetitionCounts(NamedTuple):
    """What repeats in each row, four tensors ``[B]`` int64."""

    pairs: torch.Tensor
    windows: torch.Tensor
    distinct: torch.Tensor
    longest_run: torch.Tensor


def repetition_counts(
    tokens: torch.Tensor, valid: torch.Tensor | None = None, ngram_size: int = 4
) -> RepetitionCounts:
    r"""How often n-grams recur in each row, and how long its longest run of one token is.

    With :math:`W` the windows of n consecutive positions that are all valid,

    .. math:: \text{pairs} = \#\{\{u, v\} \subseteq W : u \ne v,\ \text{tokens equal}\}
              = \sum_{\text{distinct}} c (c - 1) / 2

    where c is how often an n-gram occurs. Exact: tokens are compared, a hash never decides alone.
    Without ``valid``, ``Counter(zip(*(row[i:] for i in range(n))))`` of a row's list holds the c.

    Args:
        tokens: ``[B, S]`` integers, any strides, S up to 2^30.
        valid: ``[B, S]`` of any dtype, on where ``!= 0``; None: all are. A position that is off is
            not read, and no window and no run reaches across it.
        ngram_size: n, from 1 to 2^63 - 1. Where no window fits, the first three counts are 0.

    Returns:
        RepetitionCounts: ``pairs``, ``windows`` (how many are in W), ``distinct`` (n-grams among
        them) and ``longest_run`` (equal valid tokens side by side; 0 with none valid), ``[B]``
        int64.

    Raises:
        ValueError: tokens that are not integers or not ``[B, S]``, valid of another shape or
            device, or with negative entries, ngram_size out of range.
        TypeError: no tensors, or an ngram_size that is no int.

    Example:
        >>> tokens = torch.tensor([[1, 1, 1, 1, 2]])
        >>> [count.item() for count in repetition_counts(tokens, ngram_size=2)]
        [3, 4, 2, 4]
        >>> row = tokens[0].tolist()
        >>> seen = Counter(zip(*(row[i:] for i in range(2))))
        >>> sum(c * (c - 1) // 2 for c in seen.values()), sum(seen.values()), len(seen)
        (3, 4, 2)
    """
    tokens, valid = _operands("repetition_counts", tokens, valid, ngram_size)
    return RepetitionCounts(*_counts_op(tokens, valid, ngram_size))


def repetition_links(
    tokens: torch.Tensor, valid: torch.Tensor | None = None, ngram_size: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each token, where its context was followed by another, and where its n-gram stands next.

    The windows are those of ``repetition_counts``. Following ``context_before`` from t
    leads to earlier windows with the n - 1 tokens before t, latest first: their last tokens are
    those that would repeat an n-gram at t. Taking only those u with ``ngram_after[u] >= t`` gives
    each of them that differs from the token at t once. The walk has as many steps as the token
    after these n - 1 changed before t: none in a row of one token, however long.

    Args:
        tokens, valid, ngram_size: as in ``repetition_counts``.

    Returns:
        (context_before, ngram_after), ``[B, S]`` int32. For t at which a full valid window ends:
        the latest ``u < t`` at which one ends whose first n - 1 tokens are equal and whose last
        one is not, -1 if there is none; and the earliest ``u > t`` at which one ends that is equal,
        S if there is none. -1 and S for every other t.

    Raises:
        ValueError, TypeError: as ``repetition_counts``.

    Example:
        >>> tokens = torch.tensor([[7, 8, 7, 9, 7, 8]])
        >>> context_before, ngram_after = repetition_links(tokens, ngram_size=2)
        >>> context_before  # before 9 and the last 8 stood a 7, as before the 8 at 1 and the 9
        tensor([[-1, -1, -1,  1, -1,  3]], dtype=torch.int32)
        >>> ngram_after  # 7 8 ends at 1 and at 5
        tensor([[6, 5, 6, 6, 6, 6]], dtype=torch.int32)
    """
    tokens, valid = _operands("repetition_links", tokens, valid, ngram_size)
    return _links_op(tokens, valid, ngram_size)


def _operands(function, tokens, valid, ngram_size):
    """What the dispatcher would refuse in words of its own; the operator checks the rest."""
    if type(ngram_size) is not int or ngram_size > LONGEST_WINDOW:
        check_length(function, "ngram_size", ngram_size, 1, LONGEST_WINDOW)
    if type(tokens) is not torch.Tensor or tokens.layout != torch.strided:
        check_tensor(function, "tokens", tokens)
    if tokens.dtype in CONVERTED_INTEGERS:
        tokens = as_integers(tokens)
    if valid is not None and (type(valid) is not torch.Tensor or valid.dtype != torch.bool):
        check_tensor(function, "valid", valid)
        valid = as_mask(function, "valid", valid)
    return tokens, valid


def _check_fake(function, tokens, valid, ngram_size):
    """As checked_rows() of csrc/repetition/call.h; symbolic sizes are not looked at."""
    check_integers(function, "tokens", tokens)
    shape = shape_text(tokens)
    if tokens.dim() != 2:
        raise refusal(function, "tokens", "be [B, S]", shape)
    if isinstance(tokens.shape[1], int) and tokens.shape[1] > LONGEST_ROW:
        raise refusal(function, "tokens", f"have at most {LONGEST_ROW} positions per row", shape)
    if valid is not None:
        if valid.is_complex():
            raise refusal(function, "valid", "be bool, integer or floating", valid.dtype)
        differs = [m != n for m, n in zip(valid.shape, tokens.shape, strict=False)]
        if valid.dim() != 2 or any(differ is True for differ in differs):
            raise refusal(function, "valid", f"have the shape of tokens {shape}", shape_text(valid))
        check_device(function, "valid", valid, "tokens", tokens)
    if isinstance(ngram_size, int) and not 1 <= ngram_size <= LONGEST_WINDOW:
        raise refusal(function, "ngram_size", f"be in [1, {LONGEST_WINDOW}]", ngram_size)


@torch.library.register_fake("masked_loss_ext::repetition_counts")
def _counts_fake(tokens, valid=None, ngram_size=4):
    _check_fake("repetition_counts", tokens, valid, ngram_size)
    return tuple(tokens.new_empty(tokens.shape[:1], dtype=torch.int64) for _ in range(4))


@torch.library.register_fake("masked_loss_ext::repetition_links")
def _links_fake(tokens, valid=None, ngram_size=4):
    _check_fake("repetition_links", tokens, valid, ngram_size)
    return tuple(tokens.new_empty(tokens.shape, dtype=torch.int32) for _ in range(2))
