# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA repetition operators under the simulator, and on a GPU: the same bits as on CPU."""

import random

import pytest
import torch
from cases import MASK_DTYPES, stored_as
from cuda_sim import ORDERS
from cuda_sim.build import compiler
from gpu_device import DEVICES, device_named
from repetition_cases import both, colliding, periodic, random_case, same

if compiler() is None:
    pytest.skip("the CUDA simulator needs a C++ compiler", allow_module_level=True)

from simulated_block_mask import simulated_block_mask as simulated_operators  # noqa: E402

THREADS = 256  # of the block that works on a row


@pytest.fixture(scope="module", params=DEVICES)
def op(request):
    return simulated_operators(device_named(request.param))


@pytest.fixture(autouse=True)
def fresh_memory(op):
    op.sim.reset()


def simulated(op, *args, order=ORDERS[0]):
    return [
        result
        for name in ("repetition_counts", "repetition_links")
        for result in op(name, *args, order=order)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_random_rows(op, seed):
    arguments = random_case(random.Random(seed))
    order = ORDERS[seed % len(ORDERS)]
    same(simulated(op, *arguments, order=order), both(*arguments))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [THREADS - 1, THREADS, THREADS + 1, 3 * THREADS + 5])
def test_rows_longer_than_a_block_of_threads(op, size, order):
    few = torch.randint(2, (1, size))
    sparse = torch.arange(size)[None] * (torch.arange(size) % 100 > 0)
    for tokens in (few, few * 0, sparse, periodic(size, 200)):
        valid = torch.rand(1, size) < 0.98
        for arguments in ((tokens, None, 3), (tokens, valid, 1), (tokens, valid, 7)):
            same(simulated(op, *arguments, order=order), both(*arguments))


@pytest.mark.parametrize("length", [65534, 65535])
def test_rows_at_the_border_of_short_names(op, length):
    tokens = torch.arange(length)[None]
    tokens[0, -4:] = tokens[0, :4]
    same(simulated(op, tokens, None, 4), both(tokens, None, 4))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("first", [0, 31, 32, THREADS - 1, THREADS, THREADS + 33])
def test_runs_across_warps_and_tiles(op, first, order):
    for length in (1, 2, 33, THREADS, 2 * THREADS + 1):
        tokens = torch.arange(4 * THREADS)[None] + 1
        tokens[:, first : first + length] = 0
        counts = op("repetition_counts", tokens, None, 1, order=order)
        assert counts[3].tolist() == [length]


@pytest.mark.parametrize("order", ORDERS[:2])
def test_scratch_in_global_memory(op, order):
    # 2048 tokens are counted, and 1024 linked, in shared memory
    for size in (1024, 1025, 2048, 2050):
        arguments = (torch.randint(5, (2, size)), torch.rand(2, size) < 0.99, 3)
        same(simulated(op, *arguments, order=order), both(*arguments))


def test_more_rows_than_blocks(op):
    arguments = (torch.randint(2, (1027, 4)), None, 2)
    same(simulated(op, *arguments), both(*arguments))


@pytest.mark.parametrize("order", ORDERS)
def test_tokens_of_one_hash(op, order):
    tokens = torch.tensor([colliding(40)]).repeat(2, 2)
    same(simulated(op, tokens, None, 2, order=order), both(tokens, None, 2))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("n", [1, 2, 2**40])
def test_empty_and_windows_that_do_not_fit(op, shape, n):
    tokens = torch.zeros(shape, dtype=torch.int64)
    same(simulated(op, tokens, None, n), both(tokens, None, n))


@pytest.mark.parametrize("n", [299, 300, 301])
def test_windows_of_a_whole_row(op, n):
    same(simulated(op, periodic(300, 1), None, n), both(periodic(300, 1), None, n))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "misaligned"])
def test_token_dtypes(op, dtype, layout):
    tokens = torch.randint(100, (2, 9)).clamp(97).to(dtype)
    same(simulated(op, stored_as(tokens, layout), None, 2), both(tokens, None, 2))


@pytest.mark.parametrize("dtype", MASK_DTYPES)
def test_valid_dtypes(op, dtype):
    tokens, valid = torch.randint(2, (2, 40)), torch.rand(2, 40) < 0.8
    stored = stored_as(valid.to(dtype), "transposed")
    same(simulated(op, tokens, stored, 2), both(tokens, valid, 2))
