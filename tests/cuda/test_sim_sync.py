# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA simulator's barriers and warp functions, and the transfer of tensors to its memory."""

import resource
from pathlib import Path

import pytest
import torch
from cuda_sim import ORDERS, compiler, mirror_schemas

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from cuda_sim.probing import Probes

every_order = pytest.mark.parametrize("order", ORDERS)
WIDTHS = (1, 2, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def probes():
    return Probes()


@pytest.fixture(autouse=True)
def fresh_device(probes):
    yield
    probes.sim.reset()


# Block barriers


def test_barriers_at_different_lines_are_found(probes):
    x = torch.rand(64)
    for n in (0, 64):  # all at one of them
        assert torch.equal(probes("divergent_barrier", x, 64, n=n, block=64), x)
    for order in ORDERS:
        with pytest.raises(RuntimeError, match="divergent barrier.*different places"):
            probes("divergent_barrier", x, 64, n=1, block=64, order=order)


@every_order
def test_exited_threads_do_not_hold_a_barrier(probes, order):
    x = torch.rand(64)
    y = probes("barrier_after_exit", x, 64, n=40, block=64, smem=256, order=order)
    assert torch.equal(y[:40], x[:40].flip(0)) and not y[40:].any()


def test_deadlock_names_both_places(probes):
    for order in ORDERS:
        with pytest.raises(RuntimeError, match=r"deadlock: .*at the block barrier .*\.cu:\d+, .*"):
            probes("deadlock", torch.ones(32), 32, order=order)


@every_order
def test_barrier_votes(probes, order):
    for n in (0, 20, 63, 64):
        expected = 4 * n + 2 * (n < 64) + (n == 64)
        y = probes("barrier_votes", torch.ones(1), 64, n=n, block=64, order=order)
        assert torch.equal(y, torch.full((64,), float(expected)))


@every_order
def test_last_block_and_atomics(probes, order):
    x = torch.arange(128.0)
    y = probes("last_block_sums", x, 4, n=5, grid=4, block=32, order=order).view(torch.int32)
    assert y.tolist() == [8128, 0, 8133, 3]


# Warp functions


@every_order
@pytest.mark.parametrize("threads", [32, 64, 50, 7])
def test_shuffles_honour_width_in_whole_and_partial_warps(probes, threads, order):
    x = torch.arange(float(threads))
    lane = torch.arange(threads) % 32
    warp = torch.arange(threads) - lane
    for width in WIDTHS:
        first = lane // width * width
        last = first + width - 1
        sources = {
            "shuffle_index": first + (1 if width > 1 else 0),
            "shuffle_up": torch.where(lane > first, lane - 1, lane),
            "shuffle_down": torch.where(lane < last, lane + 1, lane),
            "shuffle_xor": lane ^ (width // 2),
        }
        for kernel, source in sources.items():
            if (warp + source >= threads).any():
                with pytest.raises(RuntimeError, match="which is not in the mask"):
                    probes(kernel, x, threads, n=width, block=threads, order=order)
                continue
            y = probes(kernel, x, threads, n=width, block=threads, order=order)
            assert torch.equal(y, (warp + source).float()), (kernel, width)


def test_xor_beyond_the_segment(probes):
    lane = torch.arange(32)
    for width in (1, 2, 4, 8, 16):
        source = lane ^ width
        expected = torch.where(source > lane, lane, source)  # earlier segments answer, later do not
        y = probes("shuffle_xor_beyond", lane.float(), 32, n=width)
        assert torch.equal(y, expected.float()), width


def test_width_that_is_not_a_power_of_two(probes):
    for width in (0, 3, 64, -32):
        with pytest.raises(RuntimeError, match=r"width is not a power of two.*warp.cu:\d+"):
            probes("shuffle_up", torch.ones(32), 32, n=width)


@every_order
@pytest.mark.parametrize("width", WIDTHS)
def test_groups_of_lanes_meet_on_their_own(probes, width, order):
    x = torch.arange(64.0)
    y = probes("sum_by_groups", x, 64, n=width, block=64, order=order)
    assert torch.equal(y, x.view(-1, width).sum(1, keepdim=True).expand(-1, width).reshape(-1))


def test_missing_warp_sync_is_found(probes):
    x = torch.rand(64)
    right = x.view(-1, 2).flip(1).reshape(-1)
    for order in ORDERS:
        y = probes("exchange_in_warp", x, 64, block=64, smem=256, order=order)
        assert torch.equal(y, right)
        y = probes("exchange_in_warp_without_sync", x, 64, block=64, smem=256, order=order)
        assert y.isnan().sum() == 32


@pytest.mark.parametrize(
    "kernel, n, threads, message",
    [
        ("full_mask_after_exit", 31, 32, "names lane 31, which has exited, at .*probes_warp.cu"),
        ("full_mask_after_exit", 20, 20, "names lane 20, which the block does not have, at"),
        ("shuffle_from_outside_mask", 16, 32, "reads lane 16, which is not in the mask, at"),
        ("caller_outside_mask", 0x7FFFFFFF, 32, "a lane calls a warp function whose mask lacks it"),
        ("masks_that_overlap", 0, 32, "different masks that overlap"),
        ("different_calls", 5, 32, "lanes of one mask are in warp functions at different places"),
    ],
)
def test_wrong_masks_are_found(probes, kernel, n, threads, message):
    for order in ORDERS:
        with pytest.raises(RuntimeError, match=f"(?s){message}.*{kernel}"):
            probes(kernel, torch.ones(threads), threads, n=n, block=threads, order=order)


@pytest.mark.parametrize(
    "kernel, n",
    [
        ("full_mask_after_exit", 32),
        ("shuffle_from_outside_mask", 15),
        ("caller_outside_mask", -1),
        ("different_calls", 32),
    ],
)
@every_order
def test_right_masks_pass(probes, kernel, n, order):
    x = torch.full((32,), 3.0)
    y = probes(kernel, x, 32, n=n, order=order)
    assert torch.equal(y[:16], x[:16])


@every_order
def test_warp_votes(probes, order):
    for n in (0, 5, 32):
        y = probes("votes", torch.ones(1), 32, n=n, order=order)
        assert torch.equal(y, torch.full((32,), float(4 * n + 2 * (n < 32) + (n == 32))))


@every_order
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_reduction_of_a_block(probes, threads, order):
    x = torch.randint(-3, 4, (5, threads * 8)).float()  # sums of integers are exact in any order
    y = probes("sum_of_squares", x, 5, n=8, grid=5, block=threads, order=order)
    assert torch.equal(y, (x * x).sum(1))


def test_device_mathematics(probes):
    v = torch.tensor(2.5)
    y = probes("mathematics", v.view(1), 13, block=1)
    expected = [v.exp(), v.log(), v / 4, 1 / v, v.rsqrt(), 1, 1, 4, 4, 31, 2, v, 1]
    assert torch.allclose(y, torch.tensor([float(e) for e in expected]), rtol=3e-7, atol=0)


# Tensors in device memory


def test_upload_keeps_strides_offset_and_type(probes):
    base = torch.arange(60).view(3, 4, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        for view in (
            base,
            base.transpose(0, 2),
            base[1:, ::2],
            base[:, 1:3, 1:].permute(1, 0, 2),
            base[:, :1].expand(3, 6, 5),
            base[2, 3, 4],
            base[:0],
            torch.arange(0),
        ):
            view = (
                view.to(dtype)
                if view.is_contiguous()
                else base.to(dtype).as_strided(view.shape, view.stride(), view.storage_offset())
            )
            device = probes.sim.upload(view)
            assert device.stride() == view.stride() and device.dtype == dtype
            assert view.numel() == 0 or probes.sim.holds(device)
            assert view.numel() == 0 or device.storage_offset() == view.storage_offset()
            copy = probes.sim.download(device)
            assert torch.equal(copy, view) and copy.stride() == view.stride()
            assert copy.numel() == 0 or not probes.sim.holds(copy)


def test_fresh_device_memory_is_nan(probes):
    like = probes.sim.upload(torch.ones(2, dtype=torch.bfloat16))
    fresh = torch.ops.cuda_sim_probe.empty(like, [3, 5, 7])
    assert fresh.shape == (3, 5, 7) and fresh.is_contiguous() and fresh.dtype == torch.bfloat16
    assert probes.sim.holds(fresh) and probes.sim.download(fresh).isnan().all()
    assert torch.ops.cuda_sim_probe.empty(like, [4, 0]).shape == (4, 0)
    assert probes.sim.download(torch.ops.cuda_sim_probe.empty(like, [])).shape == ()


def test_memory_is_released_with_its_tensor(probes):
    tensor = torch.zeros(4 << 20)

    def resident_after_upload():
        probes.sim.upload(tensor)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before = resident_after_upload()
    assert max(resident_after_upload() for _ in range(6)) - before < 2 * (16 << 20)


def test_schemas_are_mirrored(probes):
    kept = mirror_schemas("cuda_sim_probe", "cuda_sim_probe_mirror")
    for name in ("run", "empty"):
        original = getattr(torch.ops.cuda_sim_probe, name).default._schema
        mirrored = getattr(torch.ops.cuda_sim_probe_mirror, name).default._schema
        assert str(mirrored) == str(original).replace("cuda_sim_probe", "cuda_sim_probe_mirror")
    del kept
