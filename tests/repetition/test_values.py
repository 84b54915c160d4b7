# SPDX-License-Identifier: BSD-3-Clause
"""repetition_counts and repetition_links: worked by hand, then against the definition."""

import doctest
import random
from collections import Counter

import pytest
import torch
from cases import MASK_DTYPES, stored_as
from hypothesis import given, settings
from hypothesis import strategies as st
from repetition_cases import (
    both,
    both_by_definition,
    colliding,
    periodic,
    random_case,
    same,
)

from masked_loss_ext.ops import repetition
from masked_loss_ext.ops.repetition import repetition_counts, repetition_links

LAYOUTS = ("contiguous", "transposed", "sliced", "row_gaps", "misaligned")


def counted(rows, valid=None, ngram_size=4):
    valid = None if valid is None else torch.tensor(valid)
    counts = repetition_counts(torch.tensor(rows), valid, ngram_size)
    assert all(count.dtype == torch.int64 for count in counts)
    return {name: count.tolist() for name, count in counts._asdict().items()}


def linked(rows, valid=None, ngram_size=4):
    valid = None if valid is None else torch.tensor(valid)
    links = repetition_links(torch.tensor(rows), valid, ngram_size)
    assert all(link.dtype == torch.int32 for link in links)
    return [link.tolist() for link in links]


# By hand


def test_three_of_four_windows_are_equal():
    assert counted([[1, 1, 1, 1, 2]], None, 2) == {
        "pairs": [3],  # {11, 11}, three times
        "windows": [4],
        "distinct": [2],
        "longest_run": [4],
    }


def test_rows_are_counted_apart():
    counts = counted([[1, 1, 1, 2], [3, 4, 5, 6]], None, 1)
    assert counts == {"pairs": [3, 0], "windows": [4, 4], "distinct": [2, 4], "longest_run": [3, 1]}


def test_a_masked_position_breaks_runs_and_windows():
    for middle in (9, 7):
        counts = counted([[7, 7, middle, 7, 7]], [[1, 1, 0, 1, 1]], 2)
        assert counts == {"pairs": [1], "windows": [2], "distinct": [1], "longest_run": [2]}
        counts = counted([[7, 7, middle, 7, 7]], [[1, 1, 0, 1, 1]], 3)
        assert counts == {"pairs": [0], "windows": [0], "distinct": [0], "longest_run": [2]}


def test_padding_counts_nowhere():
    row, padding = [5, 6, 5, 6, 5], [0, 0, 0]
    on, off = [True] * 5, [False] * 3
    expected = counted([row], None, 2)
    assert expected == {"pairs": [2], "windows": [4], "distinct": [2], "longest_run": [1]}
    assert counted([row + padding], [on + off], 2) == expected
    assert counted([padding + row], [off + on], 2) == expected
    # even where the padding is a token of the row
    assert counted([[5, 5, 5, *row]], [off + on], 2) == expected
    assert counted([padding], [off], 1) == {
        "pairs": [0],
        "windows": [0],
        "distinct": [0],
        "longest_run": [0],
    }


def test_links_of_a_row():
    #              0  1  2  3  4  5  6  7
    before, after = linked([[1, 2, 1, 2, 1, 3, 1, 2]], None, 2)
    # after a 1 at 0, 2, 4 and 6 came 2 2 3 2 at 1, 3, 5 and 7; after a 2 at 1 and 3 came a 1
    assert before == [[-1, -1, -1, -1, -1, 3, -1, 5]]
    # 12 ends at 1, 3 and 7; 21 at 2 and 4; 13 and 31 once
    assert after == [[8, 3, 4, 7, 8, 8, 8, 8]]


def test_links_without_context():
    assert linked([[4, 5, 4, 6]], [[1, 0, 1, 1]], 1) == [[[-1, -1, -1, 2]], [[2, 4, 4, 4]]]


def test_links_across_a_masked_position():
    # the 2 at 1 is masked: no window ends at 1 or 2, and 12 is first seen at 4
    before, after = linked([[1, 2, 1, 1, 2, 1, 2]], [[1, 0, 1, 1, 1, 1, 1]], 2)
    assert before == [[-1, -1, -1, -1, 3, -1, 3]]
    assert after == [[7, 7, 7, 7, 6, 7, 7]]


def test_a_row_shorter_than_a_window():
    for n in (4, 5, 2**40, 2**63 - 1):
        counts = counted([[1, 1, 2]], None, n)
        assert counts == {"pairs": [0], "windows": [0], "distinct": [0], "longest_run": [2]}
        assert linked([[1, 1, 2]], None, n) == [[[-1] * 3], [[3] * 3]]


def test_docstring_examples():
    runner = doctest.DocTestRunner(verbose=False)
    names = {**vars(repetition), "Counter": Counter}
    for test in doctest.DocTestFinder().find(repetition, globs=names):
        runner.run(test)
    assert runner.summarize().attempted >= 7 and runner.failures == 0


# Against the definition


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_empty(shape):
    for valid in (None, torch.zeros(shape, dtype=torch.bool)):
        for n in (1, 2, 4):
            tokens = torch.zeros(shape, dtype=torch.int64)
            same(both(tokens, valid, n), both_by_definition(tokens, valid, n))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_the_chain_holds_each_earlier_follower_of_the_context_once(seed):
    tokens, valid, n = random_case(random.Random(seed), rows=1)
    before, after = (link[0].tolist() for link in repetition_links(tokens, valid, n))
    on = [True] * tokens.shape[1] if valid is None else valid[0].tolist()
    row = tokens[0].tolist()
    ends = [t for t in range(n - 1, len(row)) if all(on[t - n + 1 : t + 1])]
    for t in ends:
        context = row[t - n + 1 : t]
        followers = {row[u] for u in ends if u < t and row[u - n + 1 : u] == context}
        walked, u = [], before[t]
        while u >= 0:
            if after[u] >= t:
                walked.append(row[u])
            u = before[u]
        assert len(walked) == len(set(walked))
        assert set(walked) - {row[t]} == followers - {row[t]}


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 17, 64, 299, 300])
def test_long_windows(n):
    for tokens in (torch.zeros(1, 300), periodic(300, 7), periodic(300, 150), periodic(300, 300)):
        tokens = tokens.long()
        same(both(tokens, None, n), both_by_definition(tokens, None, n))


def test_tokens_of_one_hash():
    tokens = torch.tensor([colliding(40)])
    assert repetition_counts(tokens, None, 1).distinct.tolist() == [40]
    again = tokens.repeat(2, 2)
    for n in (1, 3):
        same(both(again, None, n), both_by_definition(again, None, n))


def test_windows_are_compared_to_their_last_token():
    row = list(range(100)) + [500] + list(range(100)) + [501]
    assert counted([row], None, 101)["distinct"] == [102]
    assert counted([row], None, 100)["pairs"] == [1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_token_dtypes(dtype):
    limits = torch.iinfo(dtype)
    tokens = torch.tensor([[limits.max, limits.min, limits.max, limits.min, 5, limits.max]] * 2)
    expected = both_by_definition(tokens, None, 2)
    assert expected[0].tolist() == [1, 1]
    for layout in LAYOUTS:
        same(both(stored_as(tokens.to(dtype), layout), None, 2), expected)


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_valid_dtypes(dtype):
    tokens, _, n = random_case(random.Random(3), size=40)
    valid = torch.rand(tokens.shape) < 0.8
    expected = both_by_definition(tokens, valid, n)
    for layout in LAYOUTS:
        same(both(tokens, stored_as(valid.to(dtype), layout), n), expected)
    # one row for all, and any number that is not 0
    row = valid[:1].expand_as(tokens)
    stored = (valid[:1].to(dtype) * (1 if dtype == torch.bool else 2)).expand_as(tokens)
    same(both(tokens, stored, n), both_by_definition(tokens, row, n))


def test_masks_of_small_and_strange_numbers():
    tokens = torch.full((1, 5), 3)
    valid = torch.tensor([[6e-8, -0.0, 0.5, 300.0, float("inf")]])
    expected = both_by_definition(tokens, torch.tensor([[1, 0, 1, 1, 1]]), 2)
    for dtype in (torch.float16, torch.float32, torch.float64):
        same(both(tokens, valid.to(dtype), 2), expected)
    for wrong in (float("nan"), -1.0):
        valid[0, 3] = wrong
        with pytest.raises(ValueError, match="valid must be on where it is not 0, got (NaN|neg)"):
            both(tokens, valid, 2)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_runs_change_nothing(threads):
    torch.set_num_threads(threads)
    tokens = torch.randint(3, (50, 60))
    valid = torch.rand(50, 60) < 0.95
    expected = both_by_definition(tokens, valid, 3)
    for _ in range(3):
        same(both(tokens, valid, 3), expected)


def test_many_tokens():
    # closed forms: the definition would compare 10^9 windows
    size, n = 30_000, 1000
    windows = size - n + 1
    constant = repetition_counts(torch.zeros(1, size, dtype=torch.int64), None, n)
    pairs = windows * (windows - 1) // 2
    assert [int(c) for c in constant] == [pairs, windows, 1, size]
    distinct = repetition_counts(torch.arange(size)[None], None, n)
    assert [int(c) for c in distinct] == [0, windows, windows, 1]
    before, after = repetition_links(periodic(size, 5000), None, n)
    t = torch.arange(size)
    assert (before == -1).all()  # the same token follows each time
    assert torch.equal(repetition_links(periodic(size, 5000), None, 1)[0][0], (t - 1).int())
    repeats = (t >= n - 1) & (t + 5000 < size)
    assert torch.equal(after[0], torch.where(repeats, t + 5000, size).int())


def steps(before):
    """Of the walks from all positions of a row."""
    steps = []
    for u in before[0].tolist():
        steps.append(0 if u < 0 else 1 + steps[u])
    return sum(steps)


@pytest.mark.parametrize("size", [1000, 4000])
def test_walks_over_repeated_tokens_are_short(size):
    """A walk over every earlier window with the same context would take size^2 / 2 steps."""
    half = (torch.arange(size) * 2 // size)[None]
    for tokens, n in ((half * 0, 1), (half * 0, 4), (half, 1), (half, 3), (periodic(size, 5), 4)):
        assert steps(repetition_links(tokens, None, n)[0]) <= size


@pytest.mark.parametrize("length", [65534, 65535, 65536])
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_rows_at_the_border_of_short_names(length, n):
    """Below 65535 tokens a name takes 16 bits. Here almost all tokens differ, so names are as large
    as they get; the last n are those at the front once more."""
    tokens = torch.arange(length)
    tokens[-n:] = tokens[:n]
    found = repetition_counts(tokens[None], None, n)
    assert [int(x) for x in found] == [1, length - n + 1, length - n, 1]
    tokens[-1] = length
    found = repetition_counts(tokens[None], None, n)
    assert [int(x) for x in found] == [0, length - n + 1, length - n + 1, 1]
