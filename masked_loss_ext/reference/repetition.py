# SPDX-License-Identifier: BSD-3-Clause
"""Repetition in rows of tokens by definition: each window of a row is compared with every other."""

import torch


def repetition_counts(tokens, valid=None, ngram_size=4):
    """(pairs, windows, distinct, longest_run), each ``[B]`` int64, of tokens ``[B, S]``."""
    equal, full = equal_windows(tokens, valid, ngram_size)
    earlier = torch.tril(equal, diagonal=-1)
    repeated = earlier.any(-1)
    return earlier.sum((1, 2)), full.sum(1), (full & ~repeated).sum(1), longest_run(tokens, valid)


def repetition_links(tokens, valid=None, ngram_size=4):
    """(context_before, ngram_after), each ``[B, S]`` int32, of tokens ``[B, S]``.

    Both are -1 and S at positions where no full valid window ends.
    """
    size = tokens.shape[1]
    position = torch.arange(size, device=tokens.device)
    same_ngram, full = equal_windows(tokens, valid, ngram_size)
    same_context = _equal(_windows(tokens, ngram_size)[..., :-1], full)
    # windows are numbered by their first token, links by their last
    first = min(ngram_size - 1, size)
    ends = position[first:]
    before = torch.where(torch.tril(same_context & ~same_ngram, diagonal=-1), ends, -1)
    after = torch.where(torch.triu(same_ngram, diagonal=1), ends, size)
    context_before = torch.full_like(tokens, -1, dtype=torch.int32)
    ngram_after = torch.full_like(tokens, size, dtype=torch.int32)
    if ends.numel() > 0:
        context_before[:, first:] = before.amax(-1).to(torch.int32)
        ngram_after[:, first:] = after.amin(-1).to(torch.int32)
    return context_before, ngram_after


def equal_windows(tokens, valid, ngram_size):
    """``[B, W, W]``: are two windows of a row both full and equal? ``[B, W]``: is a window full?

    Full: all its positions are valid. W is ``S - ngram_size + 1``, or 0.
    """
    full = _windows(_valid(tokens, valid), ngram_size).all(-1)
    return _equal(_windows(tokens, ngram_size), full), full


def longest_run(tokens, valid):
    """Most equal valid tokens side by side, ``[B]`` int64; 0 in a row with none that is valid."""
    valid = _valid(tokens, valid)
    if tokens.shape[1] == 0:
        return valid.sum(1)
    continues = torch.zeros_like(valid)
    continues[:, 1:] = valid[:, 1:] & valid[:, :-1] & (tokens[:, 1:] == tokens[:, :-1])
    position = torch.arange(tokens.shape[1], device=tokens.device)
    start = torch.where(continues, 0, position).cummax(1).values
    return torch.where(valid, position - start + 1, 0).amax(1)


def _valid(tokens, valid):
    return torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid != 0


def _windows(rows, ngram_size):
    """``[B, S]`` -> ``[B, W, ngram_size]``."""
    if rows.shape[1] < ngram_size:
        return rows.new_zeros(rows.shape[0], 0, ngram_size)
    return rows.unfold(1, ngram_size, 1)


def _equal(windows, full):
    equal = (windows[:, :, None] == windows[:, None, :]).all(-1)
    return equal & full[:, :, None] & full[:, None, :]
