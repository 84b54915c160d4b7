# SPDX-License-Identifier: BSD-3-Clause
"""The CUDA simulator finds what it is there to find: memory, launches, order of execution.

Each wrong kernel stands beside a right one that passes in every order.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cuda_sim import ORDERS, compiler

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from cuda_sim.build import HERE, ROOT
from cuda_sim.probing import Probes, message_of_abort

every_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(scope="module")
def probes():
    return Probes()


@pytest.fixture(autouse=True)
def fresh_device(probes):
    yield
    probes.sim.reset()


# Device memory


@every_order
def test_right_index(probes, order):
    x = torch.randn(1000)
    assert torch.equal(probes("copy", x, 1000, n=1000, grid=4, block=256, order=order), x)


def test_wrong_index_gives_wrong_result(probes):
    x = torch.arange(64.0)
    right = x.view(8, 8).T.reshape(-1)
    assert torch.equal(probes("transpose", x, 64, n=8, block=64), right)
    assert not torch.equal(probes("transpose_wrong_index", x, 64, n=8, block=64), right)


@pytest.mark.parametrize("n", [64, 4096])
def test_read_beyond_the_end_aborts(probes, n):
    x = torch.randn(n)
    action = lambda: probes("copy_reads_beyond", x, n, n=n, grid=n // 64 + 1, block=64)  # noqa: E731
    text = message_of_abort(action)
    assert "out of bounds" in text and "0 bytes beyond the end of a" in text
    assert f"buffer of {4 * n} bytes of device memory" in text
    assert "copy_reads_beyond" in text and f"block ({n // 64},0,0), thread (0,0,0)" in text


def test_read_beyond_an_end_that_is_not_aligned_gives_nan(probes):
    y = probes("copy_reads_beyond", torch.ones(63), 64, n=63, block=64)
    assert y[0].isnan() and torch.equal(y[1:63], torch.ones(62))


def test_write_beyond_the_end_aborts(probes):
    x = torch.ones(64)
    text = message_of_abort(lambda: probes("copy_writes_beyond", x, 64, n=64, block=65))
    assert "out of bounds: " in text and "copy_writes_beyond" in text


def test_write_into_the_slack_is_found(probes):
    with pytest.raises(RuntimeError, match="just outside a buffer of 252 bytes.*writes_beyond"):
        probes("copy_writes_beyond", torch.ones(63), 63, n=63, block=64)
    with pytest.raises(RuntimeError, match="just outside a buffer.*writes_before"):
        probes("copy_writes_before", torch.ones(63), 63, n=63, block=64)


def test_write_to_an_input_aborts(probes):
    text = message_of_abort(lambda: probes("write_to_input", torch.ones(32), 32))
    assert "a read-only buffer of 128 bytes" in text and "write_to_input" in text


def test_host_access_outside_a_launch_aborts(probes):
    x = probes.sim.upload(torch.ones(32))
    assert "host access outside a launch" in message_of_abort(lambda: x.sum())
    y = torch.ops.cuda_sim_probe.empty(x, [3])
    assert "host access outside a launch" in message_of_abort(lambda: y.zero_())
    assert torch.equal(probes.sim.download(x), torch.ones(32))


def test_released_memory_stays_unreadable(probes):
    y = torch.ops.cuda_sim_probe.empty(probes.sim.upload(torch.ones(4)), [4])
    probes.sim.reset()
    assert "host access outside a launch" in message_of_abort(lambda: y.sum())
    with pytest.raises(RuntimeError, match="argument 1 is a pointer to host memory"):
        probes.launch("copy", probes.sim.upload(torch.ones(4)), y, n=1)


def test_misaligned_vector_load_aborts(probes):
    x = torch.ones(68)
    assert torch.equal(probes("load_float4", x, 32, n=4), torch.full((32,), 4.0))
    text = message_of_abort(lambda: probes("load_float4", x, 32, n=1))
    assert "undefined behaviour" in text and "load_float4" in text


def test_overflow_of_an_index_aborts(probes):
    assert probes("overflowing_index", torch.ones(1), 32, n=46340)[0] == 1
    text = message_of_abort(lambda: probes("overflowing_index", torch.ones(1), 32, n=46341))
    assert "undefined behaviour" in text and "overflowing_index" in text


def test_stack_overflow_aborts(probes):
    assert probes("deep_recursion", torch.ones(1), 1, n=10, block=1)[0] == 1
    text = message_of_abort(lambda: probes("deep_recursion", torch.ones(1), 1, n=1000, block=1))
    assert "stack overflow" in text and "deep_recursion" in text


# Shared memory


@every_order
@pytest.mark.parametrize("kernel, factor", [("static_shared", 3), ("dynamic_shared", 1)])
def test_shared_memory_is_undefined_at_the_start_of_every_block(probes, kernel, factor, order):
    x = torch.rand(64)
    y = probes(kernel, x, 192, n=-1, grid=3, block=64, smem=256, order=order)
    assert torch.equal(y.view(3, 64), (factor * x).expand(3, 64))
    y = probes(kernel, x, 192, n=1, grid=3, block=64, smem=256, order=order).view(3, 64)
    assert torch.equal(y[1], factor * x) and y[0].isnan().all() and y[2].isnan().all()


def test_index_beyond_shared_memory_is_found(probes):
    x = torch.ones(64)
    for kernel in ("static_shared_index", "dynamic_shared_index"):
        assert torch.equal(probes(kernel, x, 64, n=0, block=64, smem=256), x)
        action = lambda k=kernel: probes(k, x, 64, n=1, block=64, smem=256)  # noqa: E731
        assert kernel in message_of_abort(action)
    with pytest.raises(RuntimeError, match="just outside a buffer of 252 bytes of shared memory"):
        probes("dynamic_shared_index", x, 64, n=0, block=64, smem=252)
    assert torch.equal(probes("dynamic_shared_index", x, 64, n=0, block=64, smem=256), x)


# Launches


@pytest.mark.parametrize(
    "grid, block, smem",
    [
        (0, 32, 0),
        ((1, 0, 1), 32, 0),
        ((1, 65536, 1), 32, 0),
        ((1, 1, 65536), 32, 0),
        (2**31, 32, 0),
        (1, 0, 0),
        (1, 1025, 0),
        (1, (32, 33, 1), 0),
        (1, (1, 1, 65), 0),
        (1, 32, 99 * 1024 + 1),
    ],
)
def test_bad_configuration(probes, grid, block, smem):
    with pytest.raises(RuntimeError, match="copy: CUDA launch failed: invalid configuration"):
        probes("copy", torch.ones(1), 1, n=1, grid=grid, block=block, smem=smem)
    assert probes.sim.launches() == []


@pytest.mark.parametrize(
    "grid, block, smem",
    [((1, 65535, 1), 1, 0), (1, 1024, 0), (1, (4, 4, 64), 0), (1, 32, 99 * 1024)],
)
def test_largest_configurations(probes, grid, block, smem):
    assert probes("copy", torch.ones(1), 1, n=1, grid=grid, block=block, smem=smem)[0] == 1


def test_launches_are_listed(probes):
    probes("copy", torch.ones(1), 1, n=1, grid=(2, 3, 1), block=64, smem=16)
    (launch,) = probes.sim.launches()
    assert "copy(float const*, float*, int)" in launch
    assert launch.endswith("grid (2,3,1) block (64,1,1) shared 16")


def test_host_memory_wrong_stream_wrong_device_are_found(probes):
    x = probes.sim.upload(torch.ones(4))
    with pytest.raises(RuntimeError, match="argument 1 is a pointer to host memory.*copy"):
        probes.launch("copy", x, torch.ones(4), n=1)
    with pytest.raises(RuntimeError, match="argument 0 holds a pointer to host memory"):
        torch.ops.cuda_sim_probe.run_by_struct(x, torch.ones(4))
    y = probes.sim.upload(torch.zeros(4), writable=True)
    torch.ops.cuda_sim_probe.run_by_struct(x, y)
    assert torch.equal(probes.sim.download(y), torch.full((4,), 2.0))
    with pytest.raises(RuntimeError, match="launch outside a DeviceScope"):
        torch.ops.cuda_sim_probe.run_without_scope(x, y)
    with pytest.raises(RuntimeError, match="launch not on the current stream"):
        torch.ops.cuda_sim_probe.run_on_default_stream(x, y)


def test_exception_in_a_kernel_names_the_thread(probes):
    for order in ORDERS:
        with pytest.raises(RuntimeError, match=r"__trap\(\) was called in .*thread \(5,0,0\)"):
            probes("trap", torch.ones(1), 1, n=5, order=order)
    assert probes("copy", torch.ones(1), 1, n=1)[0] == 1  # the simulator is fit for use again


# Order of execution


def test_orders_are_as_asked(probes):
    def order_of(order):
        y = probes("execution_order", torch.ones(1), 513, n=512, grid=16, block=32, order=order)
        return y[:512].argsort().tolist()

    assert order_of("ascending") == list(range(512))
    assert order_of("descending") == list(range(511, -1, -1))
    one, two = order_of("1"), order_of("2")
    assert one == order_of("1") != two
    for order in (one, two):
        assert sorted(order) == list(range(512))
        blocks = [thread // 32 for thread in order[::32]]
        assert sorted(blocks) == list(range(16)) != blocks
    with pytest.raises(ValueError, match="order must be"):
        probes.sim.set_order("sideways")


def run_script(tmp_path, body, **environment):
    """What a fresh process prints."""
    script = tmp_path / "script.py"
    script.write_text(f"import torch\nfrom cuda_sim.probing import Probes\n{body}")
    paths = os.pathsep.join(map(str, Path(__file__).parents[1:3]))
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_order_from_the_environment(tmp_path):
    printed = run_script(
        tmp_path,
        """
p = Probes()
y = p.sim.upload(torch.zeros(33), writable=True)
p.launch("execution_order", p.sim.upload(torch.ones(1)), y, n=32)
print(p.sim.download(y)[:32].int().tolist())
""",
        MASKED_LOSS_EXT_CUDA_SIM_ORDER="descending",
    )
    assert printed == str(list(range(31, -1, -1)))


def test_missing_barrier_shows_in_some_order(probes):
    x = torch.rand(64)
    right = x[[0, *range(63)]]
    wrong = "left_neighbour_without_barrier"
    for order in ORDERS:
        y = probes("left_neighbour", x, 64, block=64, smem=256, order=order)
        assert torch.equal(y, right)
    assert torch.equal(probes(wrong, x, 64, block=64, smem=256), right)  # one order is not enough
    y = probes(wrong, x, 64, block=64, smem=256, order="descending")
    assert y[1:].isnan().all()


def test_dependence_between_blocks_shows_in_some_order(probes):
    x = torch.ones(8)
    for order in ORDERS:
        assert torch.equal(probes("prefix_per_block", x, 8, grid=8, order=order), x.cumsum(0))
    assert torch.equal(probes("prefix_over_blocks", x, 8, grid=8), x.cumsum(0))
    for order in ORDERS[1:]:
        assert not torch.equal(probes("prefix_over_blocks", x, 8, grid=8, order=order), x.cumsum(0))


def test_indices_of_three_dimensions(probes):
    y = probes("indices", torch.ones(1), 24 * 60, grid=(2, 3, 4), block=(3, 4, 5))
    assert torch.equal(y, torch.arange(24 * 60.0))


def test_nvcc_accepts_the_probes(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc here to compile the probes for a GPU")
    sources = sorted(HERE.glob("probes_*.cu"))
    assert len(sources) == 3
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-I", ROOT / "csrc", "-c", *sources]
    command += ["-odir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fibers_by_ucontext(tmp_path):
    printed = run_script(
        tmp_path,
        """
p = Probes(["-DCUDA_SIM_UCONTEXT"])
x = torch.randint(-3, 4, (3, 96 * 8)).float()
y = p("sum_of_squares", x, 3, n=8, grid=3, block=96)
print(torch.equal(y, (x * x).sum(1)))
try:
    p("divergent_barrier", x, 64, n=1, block=64)
except RuntimeError as error:
    print(error)
""",
    )
    assert printed.startswith("True\ncuda_sim: divergent barrier")


def test_speed(probes):
    x = torch.ones(1024 * 128 * 8)
    start = time.process_time()
    y = probes("sum_of_squares", x, 1024, n=8, grid=1024, block=128)
    seconds = time.process_time() - start
    assert torch.equal(y, torch.full((1024,), 1024.0))
    assert seconds < 2.0, f"{1024 * 128} threads took {seconds:.2f} s"
    print(f"{1024 * 128} threads in {seconds:.2f} s")
