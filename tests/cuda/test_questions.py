# SPDX-License-Identifier: BSD-3-Clause
"""What only a GPU can answer: streams, capture in a graph, a second device, a launch that fails.

Capture is the proof that a call waits for nothing: a graph cannot hold what the host has to see.
"""

import subprocess

import pytest
import torch
from cuda_sim import Simulator, build, compiler
from device_calls import CALLS, hidden_rows, on_device
from gpu_device import need_gpu

import masked_loss_ext as mle
from masked_loss_ext.build import sources, toolchain

PROBE = [
    sources.csrc_dir().parent / "tests" / "cuda_probe" / "failing_launch.cu",
    sources.csrc_dir() / "common" / "cuda" / "device.cpp",
]
SLEEP = 50_000_000  # cycles: some 25 ms, in which a call on a wrong stream has long run

every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


def assert_same(results, expected, what=""):
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted), what


@every_call
def test_runs_on_the_current_stream(call):
    need_gpu()
    inputs, others = (on_device(call.make("small"), "cuda") for _ in range(2))
    expected = call.run(*others)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        for one, other in zip(inputs, others, strict=True):
            if one.numel():
                one.copy_(other)
        results = call.run(*inputs)
    stream.synchronize()
    assert_same(results, expected)


@every_call
@pytest.mark.parametrize("size", ["small", "wide", "many"])
def test_graph_capture(call, size):
    need_gpu()
    inputs, others = (on_device(call.make(size), "cuda") for _ in range(2))
    expected = call.run(*others)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(*inputs)
    for one, other in zip(inputs, others, strict=True):
        if one.numel():
            one.copy_(other)
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert_same(results, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_capture_where_the_number_of_rows_is_not_given(dtype, reduction):
    """Then all rows are multiplied, those that do not count as zeros."""
    need_gpu()
    floats = [x.cuda().to(dtype) for x in hidden_rows("many")[:3]]
    integers = on_device(hidden_rows("many")[3:], "cuda")
    floats[0][~integers[1]] = float("nan")

    def run():
        leaves = [x.detach().requires_grad_(True) for x in floats]
        loss = mle.masked_linear_cross_entropy(
            *leaves[:2], *integers, bias=leaves[2], reduction=reduction, chunk_rows=900
        )
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    graph.replay()
    torch.cuda.synchronize()
    rtol = 0.02 if dtype == torch.bfloat16 else 1e-4
    for actual, wanted in zip(results, expected, strict=True):
        size = wanted.abs().max().item()
        torch.testing.assert_close(actual, wanted, rtol=rtol, atol=rtol * size / 10)


@every_call
def test_torch_waits_for_nothing(call):
    need_gpu()
    inputs = on_device(call.make("small"), "cuda")
    call.run(*inputs)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@every_call
def test_the_same_bits_in_every_run(call):
    need_gpu()
    for size in ("wide", "many"):
        inputs = on_device(call.make(size), "cuda")
        first = [one.clone() for one in call.run(*inputs)]
        for _ in range(4):
            assert_same(call.run(*inputs), first, size)


@every_call
def test_second_device(call):
    need_gpu()
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU here")
    inputs = call.make("many")
    expected = call.run(*on_device(inputs, "cuda:0"))
    with torch.cuda.device(0):
        results = call.run(*on_device(inputs, "cuda:1"))
        assert torch.cuda.current_device() == 0
    assert all(one.device == torch.device("cuda", 1) for one in results)
    assert_same([one.cpu() for one in results], [one.cpu() for one in expected])


# --- a launch that fails -------------------------------------------------------------------------

# Of a block that is too large; a GPU says either.
FAILED = "number: CUDA launch failed: invalid (configuration )?argument"


def check_failing_launch(number, upload, download):
    like = upload(torch.zeros(5))
    for _ in range(2):  # the error does not stay: what comes after it works
        with pytest.raises(RuntimeError, match=FAILED):
            number(like, 2048)
        assert download(number(like, 32)).tolist() == [0, 1, 2, 3, 4]


def compile_probe(folder):
    """The operator of cuda_probe for the GPUs that are here, else for the default ones."""
    tools = toolchain.find_toolchain()
    if tools.cuda_home is None:
        pytest.skip("there is no nvcc here, or MASKED_LOSS_EXT_CUDA does not ask for it")
    library = folder / "probe.so"
    command = [tools.cuda_home / "bin/nvcc", "-std=c++17", "-shared", *tools.cuda_flags]
    command += [f"-D{define}" for define in sources.DEFINES if define.startswith("TORCH")]
    command += [f"-I{sources.csrc_dir()}", "-isystem", tools.torch_root / "include"]
    command += ["-Xcompiler=-fPIC", *PROBE, f"-L{tools.torch_root / 'lib'}", "-ltorch_cpu"]
    command += [f"-L{tools.cudart_dir}", "-cudart=static", "-o", library]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


def test_failing_launch(tmp_path):
    need_gpu()
    torch.ops.load_library(compile_probe(tmp_path))
    number = torch.ops.masked_loss_ext_probe.number
    check_failing_launch(number, lambda one: one.cuda(), lambda one: one.cpu())


@pytest.mark.skipif(compiler() is None, reason="the CUDA simulator needs g++, and there is none")
def test_failing_launch_under_the_simulator():
    sim = Simulator(build("failing_launch", PROBE))
    number = torch.ops.masked_loss_ext_probe_sim.number
    check_failing_launch(number, sim.upload, sim.download)
    sim.reset()
