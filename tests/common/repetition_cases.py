# SPDX-License-Identifier: BSD-3-Clause
"""Rows of tokens that repeat, and what the repetition operators must say of them."""

from collections import Counter

import torch

from masked_loss_ext.ops import repetition
from masked_loss_ext.reference import repetition as reference

MASK = 2**64 - 1


def random_case(rng, rows=4, size=40):
    """(tokens, valid, ngram_size) of few different tokens, so that much of it repeats."""
    shape = rng.randint(1, rows), rng.randint(1, size)
    tokens = rng.choice([1, 2, 3, 10]) * 2 ** rng.choice([0, 0, 40])
    tokens *= torch.tensor([[rng.randint(-1, 1) for _ in range(shape[1])] for _ in range(shape[0])])
    on = rng.choice([0.5, 0.9, 1.0])
    valid = torch.tensor([[rng.random() < on for _ in range(shape[1])] for _ in range(shape[0])])
    return tokens, rng.choice([None, valid, valid]), rng.randint(1, 7)


def periodic(size, period):
    return torch.arange(size)[None] % period


def colliding(count):
    """Different tokens that the table looks for in one and the same slot, the last of any table.

    What first_slot() of csrc/repetition/formula.h does to a token, undone.
    """
    tokens = []
    for number in range(count):
        key = number << 32 | 0xFFFFFFFF
        key ^= key >> 32
        key = key * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK
        key ^= key >> 29 ^ key >> 58
        key = key * pow(0x9E3779B97F4A7C15, -1, 2**64) & MASK
        key ^= key >> 32
        tokens.append(key - 2**64 if key >= 2**63 else key)
    return tokens


def python_counts(tokens, valid, ngram_size):
    """The counts of one row as a loop over its tokens finds them; lists in, four ints out."""
    seen, run, longest = Counter(), 0, 0
    for t, token in enumerate(tokens):
        again = t > 0 and valid[t - 1] and tokens[t - 1] == token
        run = (run + 1 if again else 1) if valid[t] else 0
        longest = max(longest, run)
        if t >= ngram_size - 1 and all(valid[t - ngram_size + 1 : t + 1]):
            seen[tuple(tokens[t - ngram_size + 1 : t + 1])] += 1
    pairs = sum(c * (c - 1) // 2 for c in seen.values())
    return pairs, sum(seen.values()), len(seen), longest


def same(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def both(tokens, valid=None, ngram_size=4):
    """All that the operators return."""
    counts = repetition.repetition_counts(tokens, valid, ngram_size)
    return *counts, *repetition.repetition_links(tokens, valid, ngram_size)


def both_by_definition(tokens, valid=None, ngram_size=4):
    counts = reference.repetition_counts(tokens, valid, ngram_size)
    return *counts, *reference.repetition_links(tokens, valid, ngram_size)
