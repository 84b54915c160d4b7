# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA block-mask operators under the simulator, and on a GPU: the same bits as on CPU."""

import random

import pytest
import torch
from block_masks import (
    PACKED_CASES,
    assert_lists,
    offsets_of,
    packed_arguments,
    random_intervals,
    random_packed,
)
from cuda_sim import ORDERS
from cuda_sim.build import compiler
from gpu_device import DEVICES, device_named

from masked_loss_ext.ops import block_mask as layer

if compiler() is None:
    pytest.skip("the CUDA simulator needs a C++ compiler", allow_module_level=True)

from simulated_block_mask import simulated_block_mask  # noqa: E402

TILE = 2048  # kv-blocks that one block of threads counts at a time


@pytest.fixture(scope="module", params=DEVICES)
def op(request):
    return simulated_block_mask(device_named(request.param))


@pytest.fixture(autouse=True)
def fresh_memory(op):
    op.sim.reset()


@pytest.mark.parametrize("seed", range(16))
def test_lists_of_random_intervals(op, seed):
    rng = random.Random(seed)
    lo, hi, kv_len, block = random_intervals(rng)
    expected = layer.interval_block_lists(lo, hi, kv_len, *block)
    order = ORDERS[seed % len(ORDERS)]
    assert_lists(op("interval_block_lists", lo, hi, kv_len, *block, order=order), expected)
    short = op("interval_block_lists", lo, hi, kv_len, *block, False, order=order)
    assert_lists(short, [*expected[:4], *[torch.zeros(0, dtype=torch.int32)] * 4])


@pytest.mark.parametrize("order", ORDERS)
def test_more_kv_blocks_than_a_tile(op, order):
    # begins and ends on both sides of the tiles' borders, and intervals across a whole tile
    starts = [0, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1, 5, 4 * TILE + 3]
    stops = [2 * TILE, 2 * TILE + 2, 4 * TILE, 5 * TILE, 5 * TILE, 4 * TILE + 5]
    lo = torch.tensor(starts, dtype=torch.int32)[None, None]
    hi = torch.tensor(stops, dtype=torch.int32)[None, None]
    expected = layer.interval_block_lists(lo, hi, 5 * TILE, 1, 2)
    assert_lists(op("interval_block_lists", lo, hi, 5 * TILE, 1, 2, order=order), expected)


@pytest.mark.parametrize("size", [255, 256, 257, 700])
def test_q_blocks_longer_than_a_block_of_threads(op, size):
    q = torch.arange(size, dtype=torch.int32)
    lo, hi = (q - 300).clamp(min=0)[None, None], (q + 1)[None, None]
    for q_block in (256, 512, 1024):
        expected = layer.interval_block_lists(lo, hi, size, q_block, 16)
        assert_lists(op("interval_block_lists", lo, hi, size, q_block, 16), expected)


@pytest.mark.parametrize("shape", [(1, 1, 0), (0, 2, 5), (2, 0, 5)])
@pytest.mark.parametrize("kv_len", [0, 4])
def test_without_rows_batch_intervals_or_keys(op, shape, kv_len):
    lo = torch.zeros(shape, dtype=torch.int32)
    expected = layer.interval_block_lists(lo, lo + 1, kv_len, 2, 2)
    assert_lists(op("interval_block_lists", lo, lo + 1, kv_len, 2, 2), expected)


def test_any_strides(op):
    lo, hi, kv_len, block = random_intervals(random.Random(5), batch=2, intervals=3)
    expected = layer.interval_block_lists(lo, hi, kv_len, *block)
    lo = lo.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    hi = torch.stack([hi, lo], -1)[..., 0]
    assert_lists(op("interval_block_lists", lo, hi, kv_len, *block), expected)


@pytest.mark.parametrize("case", PACKED_CASES, ids=lambda c: c["name"])
def test_packed_rows(op, case):
    arguments = packed_arguments(case)
    order = ORDERS[len(case["name"]) % len(ORDERS)]
    assert_lists(op("packed_rows", *arguments, order=order), layer.packed_rows(*arguments))


@pytest.mark.parametrize("seed", range(12))
def test_plan(op, seed):
    rng = random.Random(seed)
    arguments = packed_arguments(random_packed(rng, scale=rng.choice([1, 20])))
    block = rng.choice([(128, 128), (64, 32), (16, 48)])
    expected = layer.nested_dropout_plan(*arguments, *block)
    assert_lists(op("nested_dropout_plan", *arguments, *block), expected)


def test_plan_at_full_size(op):
    offsets = offsets_of([[1024, 256]] * 3)
    kept = torch.tensor([[1024, 1], [1024, 200], [1024, 256]])
    for mode in ("full", "causal_last"):
        expected = layer.nested_dropout_plan(offsets, kept, 3968, mode)
        assert_lists(op("nested_dropout_plan", offsets, kept, 3968, mode), expected)


@pytest.mark.parametrize("mode", ["full", "causal", "causal_last", "prefix"])
def test_wrong_offsets_stay_inside(op, mode):
    # Nobody looks at them here: the intervals may be wrong, but are within the rows, and whatever
    # is written beyond an output ends the process.
    wrong = [[9, 3, 7, 0, 2], [0, 90, 4, -5, 70], [2**62, -(2**62), 2**62, 5, 2**40], [7] * 5]
    prefix = torch.tensor([2**62, -3]) if mode == "prefix" else None
    for offsets in wrong:
        kept = torch.tensor([[2**62, 3], [-(2**62), 4]])
        for window in ((None, None), (2**48, 3)):
            arguments = (torch.tensor(offsets), kept, 12, mode, *window, prefix, 2**48, "attend")
            lo, hi, *lists = op("nested_dropout_plan", *arguments, 4, 4)
            assert ((lo >= 0) & (lo <= 12) & (hi >= 0) & (hi <= 12)).all()
            assert_lists(lists, layer.interval_block_lists(lo[None], hi[None], 12, 4, 4))
