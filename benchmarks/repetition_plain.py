# SPDX-License-Identifier: BSD-3-Clause
"""Repetition in rows of tokens without the library: a Python loop, and vectorised PyTorch.

Letters: B rows, S tokens, n of an n-gram, W = S - n + 1 windows of n tokens in a row.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor


def looped_counts(tokens: Tensor, valid: Tensor, ngram_size: int) -> tuple[Tensor, ...]:
    """pairs, windows, distinct and longest run, each [B]: lists and a Counter for each row."""
    rows = []
    for row, on in zip(tokens.tolist(), valid.tolist(), strict=True):
        row = [token if counts else None for token, counts in zip(row, on, strict=True)]
        grams = Counter(zip(*(row[i:] for i in range(ngram_size)), strict=False))
        grams = {gram: count for gram, count in grams.items() if None not in gram}
        pairs = sum(count * (count - 1) // 2 for count in grams.values())
        rows.append((pairs, sum(grams.values()), len(grams), looped_run(row)))
    return tuple(torch.tensor(rows).unbind(1))


def looped_run(row: list[int | None]) -> int:
    longest = length = 0
    before = None
    for token in row:
        length = 0 if token is None else length + 1 if token == before else 1
        longest, before = max(longest, length), token
    return longest


def sorted_runs(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: the order that sorts it, where a run of equal keys starts, place in the run."""
    ordered, order = keys.sort(dim=1, stable=True)
    starts = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    position = torch.arange(keys.shape[1], device=keys.device)
    return order, starts, position - torch.where(starts, position, 0).cummax(dim=1).values


def ranks(keys: Tensor) -> Tensor:
    """[B, S] numbers below S, equal exactly where the keys of a row are."""
    order, starts, _ = sorted_runs(keys)
    return torch.empty_like(order).scatter_(1, order, starts.long().cumsum(1) - 1)


def window_ranks(tokens: Tensor, valid: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[B, W] numbers, equal exactly where windows of a row are; which hold valid tokens alone.

    Sorted token by token: no hash to collide, and shapes that depend on no data.
    """
    length = tokens.shape[1]
    single = ranks(tokens)
    found = single
    for i in range(1, size):
        found = ranks(found[:, :-1] * length + single[:, i:])
    return found, valid.unfold(1, size, 1).all(-1)


def run_lengths(tokens: Tensor, valid: Tensor) -> Tensor:
    """[B, S] how many equal tokens stand side by side up to here; 0 where not valid."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    goes_on = torch.zeros_like(valid)
    goes_on[:, 1:] = (tokens[:, 1:] == tokens[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    start = torch.where(goes_on, 0, position).cummax(dim=1).values
    return torch.where(valid, position - start + 1, 0)


def sorted_counts(tokens: Tensor, valid: Tensor, ngram_size: int) -> tuple[Tensor, ...]:
    """What ``looped_counts`` gives."""
    same, full = window_ranks(tokens, valid, ngram_size)
    # Windows that do not count are each alone, before all others.
    position = torch.arange(same.shape[1], device=same.device)
    _, starts, place = sorted_runs(torch.where(full, same, -1 - position))
    windows, off = full.sum(1), (~full).sum(1)
    longest = run_lengths(tokens, valid).amax(1)
    return place.sum(1), windows, starts.sum(1) - off, longest


def repeated_ngram_candidates(tokens: Tensor, valid: Tensor, ngram_size: int) -> Tensor:
    """[B, S, S] bool: at [t, u] the token at u, put at t, would repeat the n-gram that ends at u.

    Each token once for each t, at its last place, and never the token that does stand at t.
    """
    first = ngram_size - 1
    ngram, full = window_ranks(tokens, valid, ngram_size)
    windows = ngram.shape[1]
    both = (full[:, :, None] & full[:, None, :]).tril(-1)
    if first:
        context, _ = window_ranks(tokens, valid, first)
        context = context[:, :windows]
        both &= context[:, :, None] == context[:, None, :]
    # The n-gram of u stands again before t: then u is not the last place.
    ngram = torch.where(full, ngram, -1)
    order, _, _ = sorted_runs(ngram)
    follows = ngram.gather(1, order)
    again = F.pad(follows[:, 1:] == follows[:, :-1], (0, 1))
    after = torch.where(again, order.roll(-1, dims=1), windows)
    after = torch.empty_like(after).scatter_(1, order, after)
    position = torch.arange(windows, device=tokens.device)
    both &= (after[:, None, :] >= position[:, None]) & (ngram[:, :, None] != ngram[:, None, :])
    return F.pad(both, (first, 0, first, 0))
