# SPDX-License-Identifier: BSD-3-Clause
"""Several documents in one row: where each begins, and what repeats within each.

``starts`` ``[B, S]`` int64 is for each position the column in which its document begins; None
where a row is one document. A change of the segment id begins one.
"""

import torch

from ..ops.repetition import RepetitionCounts, repetition_counts, repetition_links


def document_starts(segment_ids, like):
    """Of ids ``[B, S]`` or ``[1, S]`` for targets ``like`` ``[B, S]``; None of None."""
    if segment_ids is None:
        return None
    ids = segment_ids.long().expand(like.shape)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins = torch.cat([begins[:, :1], ids[:, 1:] != ids[:, :-1]], 1)
    return torch.where(begins, columns(ids), 0).cummax(-1).values


def columns(like):
    return torch.arange(like.shape[-1], device=like.device)


def of_one_document(starts, distance):
    """``[B, S - distance]``: whether a position and the one ``distance`` >= 1 on share one."""
    return starts[:, distance:] == starts[:, :-distance]


def document_links(targets, valid, ngram_size, starts=None):
    """``repetition_links`` of which none leaves its document."""
    before, after = repetition_links(targets, valid, ngram_size)
    if starts is None:
        return before, after
    # A window of the same document ends n - 1 behind its beginning, at the least. One that ends
    # in the document but begins before it finds none that does: a later document is later.
    return torch.where(before >= starts + (ngram_size - 1), before, -1), after


def document_counts(targets, valid, ngram_size, starts=None):
    """``repetition_counts`` of documents: ``pairs`` and ``windows`` ``[B]``, summed over those of a
    row, ``longest_run`` ``[B, S]``, in the column in which a document begins and 0 elsewhere."""
    if starts is None:
        return repetition_counts(targets, valid, ngram_size)
    # A token of another document is another token. Windows that cross a border are then equal to
    # none, so that only their number has to be corrected.
    named = (starts << 32) + targets
    pairs = repetition_counts(named, valid, ngram_size).pairs
    column = columns(targets)
    off = torch.where(valid, -1, column).cummax(-1).values
    windows = column - (ngram_size - 1) > torch.maximum(off, starts - 1)
    same = valid[:, 1:] & valid[:, :-1] & (named[:, 1:] == named[:, :-1])
    goes_on = torch.cat([torch.zeros_like(valid[:, :1]), same], 1)
    run = column - torch.where(goes_on, 0, column).cummax(-1).values + 1
    run = torch.where(valid, run, 0)
    longest = torch.zeros_like(run).scatter_reduce(1, starts, run, "amax")
    return RepetitionCounts(pairs, windows.sum(-1), None, longest)
