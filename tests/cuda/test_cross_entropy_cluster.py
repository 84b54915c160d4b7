# SPDX-License-Identifier: BSD-3-Clause
"""Which blocks have a row in the sweep that makes loss and gradient, and rows of a whole cluster.

The simulated device has 99 KB of shared memory, for blocks and multiprocessors alike. On one with
clusters a row that two blocks per multiprocessor cannot hold goes to 2, 4 or 8 blocks.
"""

import contextlib

import pytest
import torch
from accuracy import assert_same_bits
from cuda_sim import ORDERS, compiler

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from simulated_cross_entropy import check_sweep, simulated_sweep

from tests.cuda.test_cross_entropy import OPTIONS, columns, filled, make
from tests.cuda.test_cross_entropy_memory import in_pieces, message_of_abort

# packs that half and the whole of shared memory hold; the head of a slot is as long as 6
HALF, WHOLE = (99 * 512 - 3072) // 16 - 6, (99 * 1024 - 3072) // 16 - 6
BLOCKS = {HALF + 1: 2, 2 * HALF: 2, 2 * HALF + 1: 4, 4 * HALF: 4, 4 * HALF + 1: 8, 8 * HALF: 8}
BLOCKS |= {8 * HALF + 1: 8, 8 * WHOLE: 8}


@pytest.fixture(scope="module")
def sweep():
    return simulated_sweep()


@pytest.fixture(autouse=True)
def fresh_device(sweep):
    yield
    sweep.sim.reset()


def slot(packs):
    return 96 + 16 * packs


def launch(sweep, length, rows=3, clusters=1):
    """(row is kept, blocks, threads, shared bytes, blocks of a cluster) of the sweep."""
    sweep.sim.reset()
    logits, target, mask = make((rows, columns(length, torch.float32)))
    with sweep.sim.clusters(clusters):
        sweep(logits, target.fill_(-100), mask)  # nothing is read
    (line,) = [line for line in sweep.sim.launches() if "cross_entropy_sweep_kernel" in line]
    kernel, _, rest = line.partition(" grid (")
    grid, _, rest = rest.partition(",1,1) block (")
    block, _, rest = rest.partition(",1,1) shared ")
    shared, _, cluster = rest.partition(" cluster ")
    kept = kernel.partition("(")[0].endswith("true>")
    return kept, int(grid), int(block), int(shared), int(cluster or 1)


def test_launches_without_clusters(sweep):
    assert launch(sweep, (256, 0)) == (True, 1, 256, 8 * slot(256), 1)
    assert launch(sweep, (1, 0), rows=65) == (True, 2, 256, 64 * slot(1), 1)
    assert launch(sweep, (256, 1)) == (True, 3, 128, slot(257), 1)
    assert launch(sweep, (512, 0)) == (True, 3, 128, slot(512), 1)
    assert launch(sweep, (512, 1)) == (True, 3, 256, slot(513), 1)
    assert launch(sweep, (HALF, 0)) == (True, 3, 256, slot(HALF), 1)
    assert launch(sweep, (HALF, 1)) == (True, 3, 512, slot(HALF + 1), 1)
    assert launch(sweep, (WHOLE, 0)) == (True, 3, 512, slot(WHOLE), 1)
    assert launch(sweep, (WHOLE, 1)) == (False, 3, 256, 64, 1)


def test_launches_with_clusters(sweep):
    assert launch(sweep, (256, 0), clusters=8) == (True, 1, 256, 8 * slot(256), 1)
    assert launch(sweep, (HALF, 0), clusters=8) == (True, 3, 256, slot(HALF), 1)
    for packs, blocks in BLOCKS.items():
        part = -(-packs // blocks)
        threads = 256 if part <= HALF else 512
        expected = (True, 3 * blocks, threads, slot(part), blocks)
        assert launch(sweep, (packs, 0), clusters=8) == expected, packs
    assert launch(sweep, (8 * WHOLE, 1), clusters=8) == (False, 3, 256, 64, 1)
    assert launch(sweep, (4 * HALF, 1), clusters=4) == (True, 12, 512, slot(HALF + 1), 4)


@pytest.mark.parametrize("packs", BLOCKS)
def test_both_sides_of_every_border(sweep, packs):
    dtype = (torch.float32, torch.bfloat16)[list(BLOCKS).index(packs) % 2]
    order = ORDERS[list(BLOCKS).index(packs) % len(ORDERS)]
    logits, target, mask = make((3, columns((packs, 0), dtype)), dtype)
    target[0], target[1] = 0, logits.shape[1] - 1  # in the first and in the last block
    mask[:2], mask[2] = True, False
    with sweep.sim.clusters():
        for name in ("everything", "plain"):
            options = filled(OPTIONS[name], logits) | {"shift": 0}
            check_sweep(sweep, logits, target, mask, order=order, **options)
    assert any(f"cluster {BLOCKS[packs]}" in line for line in sweep.sim.launches())


def test_every_order_gives_the_same_bits(sweep):
    inputs = make((4, columns((4 * HALF + 9, 1), torch.float32)))
    options = filled(OPTIONS["everything"], inputs[0]) | {"shift": 0}
    with sweep.sim.clusters():
        expected = [sweep.sim.download(t) for t in sweep(*inputs, **options)]
        for order in ORDERS[1:]:
            for in_place in (False, True):
                results = sweep(*inputs, order=order, in_place=in_place, **options)
                for ours, first in zip(results, expected, strict=True):
                    assert_same_bits(sweep.sim.download(ours), first)


def test_rows_that_do_not_count_are_never_touched(sweep):
    logits, target, _ = make((5, columns((2 * HALF + 5, 1), torch.bfloat16)), torch.bfloat16)
    mask = torch.tensor([1, 0, 0, 1, 0])
    with sweep.sim.clusters():
        whole = sweep(in_pieces(sweep, logits, [1] * 5), target, mask)
        pieces = sweep(in_pieces(sweep, logits, mask), target, mask, order=ORDERS[2])
    for ours, expected in zip(pieces, whole, strict=True):
        assert_same_bits(sweep.sim.download(ours), sweep.sim.download(expected))
    assert (sweep.sim.download(pieces[1])[mask == 0] == 0).all()


def test_reading_one_of_them_ends_the_process(sweep):
    # the same without a mask: shows that the test above can fail
    logits, target, _ = make((3, columns((2 * HALF + 5, 1), torch.float32)))
    pieces = in_pieces(sweep, logits, [1, 0, 1])

    def run():
        with sweep.sim.clusters():
            sweep(pieces, target)

    text = message_of_abort(run)
    assert "out of bounds: read" in text and "cross_entropy_sweep_kernel" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_in_one_block_shows_in_all(sweep, value):
    length = columns((2 * HALF + 5, 0), torch.float32)
    for place in (0, length - 1):
        logits, target, _ = make((3, length))
        logits[1, place] = value
        with sweep.sim.clusters():
            loss, gradient = map(sweep.sim.download, sweep(logits, target))
        assert loss.isnan() and gradient.isfinite().all(-1).tolist() == [True, False, True]
        if value != value:
            assert gradient[1].isnan().all()


def test_a_bad_label_in_a_cluster(sweep):
    logits, target, _ = make((3, columns((HALF, 9), torch.float32)))
    target[1] = -7
    with sweep.sim.clusters():
        loss, gradient = map(sweep.sim.download, sweep(logits, target))
    assert loss.isnan() and gradient.isnan().all(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("launchable, blocks", [(8, 8), (7, 4), (4, 4), (3, 1), (2, 1), (1, 1)])
def test_clusters_that_the_device_cannot_launch_are_smaller(sweep, launchable, blocks):
    """As on a slice of a GPU; where no cluster can have the row, a block reads it twice."""
    inputs = make((2, columns((5 * HALF, 3), torch.float32)))
    with sweep.sim.clusters(8, launchable):
        check_sweep(sweep, *inputs)
    (line, *_) = [line for line in sweep.sim.launches() if "cross_entropy_sweep_kernel" in line]
    assert (
        line.endswith(f"cluster {blocks}")
        if blocks > 1
        else "cluster" not in line.split("shared")[1]
    )
    kept = line.partition("(")[0].endswith("true>")
    assert kept == (blocks > 1)  # 2 blocks cannot hold it


def test_a_device_without_clusters_is_asked_for_none(sweep):
    inputs = make((2, columns((2 * HALF, 9), torch.float32)))
    for limit in (1, 2):
        with sweep.sim.clusters(limit) if limit > 1 else contextlib.nullcontext():
            check_sweep(sweep, *inputs)
