# SPDX-License-Identifier: BSD-3-Clause
"""interval_block_lists, packed_rows, nested_dropout_plan: what they compute, on CPU."""

import random

import pytest
import torch
from block_masks import (
    FIELDS,
    PACKED_CASES,
    assert_lists,
    intervals_of,
    offsets_of,
    packed_arguments,
    random_intervals,
    random_packed,
    visible_pairs,
)
from torch.nn.attention.flex_attention import create_block_mask

from masked_loss_ext.ops import block_mask as layer


def rows(*intervals):
    """lo, hi [1, R, S] from R lists of (lo, hi), one per row."""
    table = torch.tensor(intervals, dtype=torch.int32)
    return table[None, ..., 0].contiguous(), table[None, ..., 1].contiguous()


# By hand


def test_six_rows_in_blocks_of_two():
    # kv:    01 23 45
    # q 0    ## ## ..     blocks of q 0-1: full, partial (row 1 sees only 2), empty
    # q 1    ## #. ..
    # q 2    .. .. ..     blocks of q 2-3: empty, partial, full?  row 2 sees nothing: partial
    # q 3    .. .# ##
    # q 4    ## ## ##     blocks of q 4-5: all full
    # q 5    ## ## ##
    lo, hi = rows([(0, 4), (0, 3), (0, 0), (3, 6), (0, 6), (0, 6)])
    lists = dict(zip(FIELDS, layer.interval_block_lists(lo, hi, 6, 2, 2), strict=True))
    assert lists["kv_num_blocks"].tolist() == [[[1, 2, 0]]]
    assert lists["kv_indices"].tolist() == [[[[1, 0, 2], [1, 2, 0], [0, 1, 2]]]]
    assert lists["full_kv_num_blocks"].tolist() == [[[1, 0, 3]]]
    assert lists["full_kv_indices"].tolist() == [[[[0, 1, 2], [0, 1, 2], [0, 1, 2]]]]
    assert lists["q_num_blocks"].tolist() == [[[0, 2, 1]]]
    assert lists["q_indices"].tolist() == [[[[0, 1, 2], [0, 1, 2], [1, 0, 2]]]]
    assert lists["full_q_num_blocks"].tolist() == [[[2, 1, 1]]]
    assert lists["full_q_indices"].tolist() == [[[[0, 2, 1], [2, 0, 1], [2, 0, 1]]]]
    assert all(tensor.dtype == torch.int32 for tensor in lists.values())


def test_intervals_that_touch_cover_a_block_together():
    # neither [0, 3) nor [3, 4) covers the block of 4; the second row has them overlap, unsorted
    lo, hi = rows([(0, 4), (2, 4)], [(3, 4), (0, 3)])
    lo[0, 0, 0], hi[0, 0, 0] = 0, 3
    counts = layer.interval_block_lists(lo, hi, 4, 2, 4)
    assert counts[0].tolist() == [[[0]]] and counts[2].tolist() == [[[1]]]


def test_a_ragged_last_block_is_never_full():
    lo, hi = rows([(0, 5)] * 5)
    lists = layer.interval_block_lists(lo, hi, 5, 4, 4)
    assert lists[2].tolist() == [[[1, 0]]] and lists[0].tolist() == [[[1, 2]]]


def test_nested_dropout_of_two_samples():
    # segments of 2 patches and 3 registers, of which 1 and 3 are kept; one row of padding
    offsets, kept = torch.tensor([0, 2, 5, 7, 10]), torch.tensor([[2, 1], [2, 3]])
    lo, hi = layer.packed_rows(offsets, kept, 11)
    assert lo.tolist() == [[0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 0], [0] * 11]
    assert hi.tolist() == [[3, 3, 3, 0, 0, 10, 10, 10, 10, 10, 0], [0] * 11]
    hi = layer.packed_rows(offsets, kept, 11, "causal")[1]
    assert hi[0].tolist() == [1, 2, 3, 0, 0, 6, 7, 8, 9, 10, 0]
    hi = layer.packed_rows(offsets, kept, 11, "causal_last")[1]
    assert hi[0].tolist() == [2, 2, 3, 0, 0, 7, 7, 8, 9, 10, 0]
    hi = layer.packed_rows(offsets, kept, 11, "prefix", prefix=torch.tensor([0, 4]))[1]
    assert hi[0].tolist() == [1, 2, 3, 0, 0, 9, 9, 9, 9, 10, 0]
    lo, hi = layer.packed_rows(offsets, kept, 11, dropped="self")
    assert lo[0, 3:5].tolist() == [3, 4] and hi[0, 3:5].tolist() == [4, 5]
    lo, hi = layer.packed_rows(offsets, kept, 11, dropped="attend")
    assert lo[0, 3:5].tolist() == [0, 0] and hi[0, 3:5].tolist() == [3, 3]
    assert hi[0, 10] == 0  # padding attends to nothing


def test_holes_windows_and_sinks():
    # tokens 2 and 3 of the first segment are dropped, so two runs: [0, 2) and [4, 8)
    offsets, kept = torch.tensor([0, 4, 8]), torch.tensor([[2, 4]])
    lo, hi = layer.packed_rows(offsets, kept, 8)
    assert lo[:, 0].tolist() == [0, 4] and hi[:, 0].tolist() == [2, 8]
    # window of 1 to the left, 1 sink: row 6 sees 0, 5, 6; row 1 has both in one piece
    lo, hi = layer.packed_rows(offsets, kept, 8, "causal", 1, None, None, 1)
    assert lo.shape == (4, 8)
    assert lo[:, 6].tolist() == [0, 5, 0, 0] and hi[:, 6].tolist() == [1, 7, 0, 0]
    assert lo[:, 1].tolist() == [0] * 4 and hi[:, 1].tolist() == [2, 0, 0, 0]
    # sinks are no way around causality: row 4 sees neither 5 nor 6 of the first 7 tokens
    hi = layer.packed_rows(offsets, kept, 8, "causal_last", 0, None, None, 7)[1]
    assert hi[:, 4].tolist() == [2, 5, 0, 0]


def test_kept_is_clamped():
    offsets = torch.tensor([0, 4, 8])
    none = layer.packed_rows(offsets, torch.tensor([[-3], [-(2**62)]]), 8)
    everything = layer.packed_rows(offsets, torch.tensor([[5], [2**62]]), 8)
    assert none[1].tolist() == [[0] * 8]
    assert everything[1].tolist() == [[4] * 4 + [8] * 4]


# Against create_block_mask


def expected_lists(lo, hi, kv_len, block):
    columns = list(zip(lo.unbind(1), hi.unbind(1), strict=True))
    batch, size = lo.shape[0], lo.shape[2]

    def mask_mod(b, h, q, kv):
        allowed = q < 0
        if 0 in (size, kv_len):  # no pair to look up
            return allowed
        for low, high in columns:
            allowed = allowed | ((kv >= low[b, q]) & (kv < high[b, q]))
        return allowed

    return create_block_mask(mask_mod, batch, None, size, kv_len, "cpu", BLOCK_SIZE=block)


def check_against_create_block_mask(lo, hi, kv_len, block):
    expected = expected_lists(lo, hi, kv_len, block)
    lists = layer.interval_block_lists(lo, hi, kv_len, *block)
    assert_lists(lists, [getattr(expected, field) for field in FIELDS])
    short = layer.interval_block_lists(lo, hi, kv_len, *block, transposes=False)
    assert_lists(short[:4], lists[:4])
    assert all(tensor.shape == (0,) for tensor in short[4:])


@pytest.mark.parametrize("seed", range(40))
def test_bit_equal_to_create_block_mask(seed):
    rng = random.Random(seed)
    for _ in range(3):
        check_against_create_block_mask(*random_intervals(rng))


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 500])
@pytest.mark.parametrize("kv_len", [0, 1, 128, 300])
def test_lengths_around_a_block(size, kv_len):
    q = torch.arange(size, dtype=torch.int32)
    lo, hi = (q - 40).clamp(min=0), q + 1
    check_against_create_block_mask(lo[None, None], hi[None, None], kv_len, (128, 128))


def test_intervals_beyond_the_keys_are_cut():
    lo = torch.full((1, 1, 256), -(2**31), dtype=torch.int32)
    hi = torch.full((1, 1, 256), 2**31 - 1, dtype=torch.int32)
    check_against_create_block_mask(lo, hi, 384, (128, 128))
    assert_lists(layer.interval_block_lists(hi, lo, 384), layer.interval_block_lists(lo, lo, 384))


@pytest.mark.parametrize("shape", [(1, 1, 0), (0, 2, 5), (2, 0, 5)])
def test_without_rows_batch_or_intervals(shape):
    lo = torch.zeros(shape, dtype=torch.int32)
    lists = layer.interval_block_lists(lo, lo + 1, 4, 2, 2)
    batch, nq = shape[0], (shape[2] + 1) // 2
    assert [tuple(t.shape) for t in lists[:2]] == [(batch, 1, nq), (batch, 1, nq, 2)]
    assert [tuple(t.shape) for t in lists[4:6]] == [(batch, 1, 2), (batch, 1, 2, nq)]
    assert all(int(t.sum()) == 0 for t in lists[::2])
    no_keys = layer.interval_block_lists(lo, lo + 1, 0, 2, 2)
    assert no_keys[1].shape == (batch, 1, nq, 0) and int(no_keys[0].sum()) == 0


def test_any_strides():
    rng = random.Random(5)
    lo, hi, kv_len, block = random_intervals(rng, batch=2, intervals=3)
    expected = layer.interval_block_lists(lo, hi, kv_len, *block)
    strided = lo.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    gaps = torch.stack([hi, lo], -1)[..., 0]
    assert not strided.is_contiguous() and not gaps.is_contiguous()
    assert_lists(layer.interval_block_lists(strided, gaps, kv_len, *block), expected)
    one = lo[:1].expand(4, -1, -1), hi[:1].expand(4, -1, -1)
    lists = layer.interval_block_lists(*one, kv_len, *block)
    assert_lists([t[3:] for t in lists], [t[:1] for t in expected])


# Packed rows against ids, positions and visibility, pair by pair


@pytest.mark.parametrize("case", PACKED_CASES, ids=lambda c: c["name"])
def test_packed_rows_by_definition(case):
    check_packed(case)


@pytest.mark.parametrize("seed", range(40))
def test_random_packed_rows_by_definition(seed):
    rng = random.Random(seed)
    for _ in range(4):
        check_packed(random_packed(rng))


def check_packed(case):
    arguments = packed_arguments(case)
    lo, hi = layer.packed_rows(*arguments)
    expected = intervals_of(visible_pairs(case), slots=lo.shape[0])
    assert (lo.dtype, hi.dtype) == (torch.int32, torch.int32)
    assert list(zip(lo.T.tolist(), hi.T.tolist(), strict=True)) == expected, case


@pytest.mark.parametrize("seed", range(20))
def test_plan_is_the_two_in_sequence(seed):
    rng = random.Random(seed)
    case = random_packed(rng, scale=20)
    block = rng.choice([(128, 128), (64, 128), (32, 16)])
    arguments = packed_arguments(case)
    lo, hi, *lists = layer.nested_dropout_plan(*arguments, *block)
    assert_lists([lo, hi], layer.packed_rows(*arguments))
    size = lo.shape[1]
    assert_lists(lists, layer.interval_block_lists(lo[None], hi[None], size, *block))


@pytest.mark.parametrize("mode", ["full", "causal", "causal_last"])
def test_any_number_of_threads_gives_the_same_bits(mode):
    # large enough for several chunks in each of the loops
    offsets = offsets_of([[1024, 256]] * 40)
    kept = torch.stack([torch.full((40,), 1024), torch.arange(40) * 7], 1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        plan = layer.nested_dropout_plan(offsets, kept, 51200 + 77, mode, q_block=32, kv_block=40)
        batch = [plan[0].expand(3, -1, -1), plan[1].expand(3, -1, -1)]
        results.append([*plan, *layer.interval_block_lists(*batch, 51200, 64, 32)])
    for other in results[1:]:
        assert_lists(other, results[0])


def test_strided_lengths():
    offsets, kept = torch.tensor([0, 2, 5, 7, 10]), torch.tensor([[2, 1], [2, 3]])
    prefix = torch.tensor([1, 3])
    expected = layer.packed_rows(offsets, kept, 12, "prefix", prefix=prefix)
    apart = [torch.stack([t, t - 9], -1)[..., 0] for t in (offsets, kept, prefix)]
    assert_lists(layer.packed_rows(*apart[:2], 12, "prefix", prefix=apart[2]), expected)
