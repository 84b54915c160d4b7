# SPDX-License-Identifier: BSD-3-Clause
"""What ptxas says of every CUDA kernel: nothing spills, and each fits the GPUs it is meant for."""

import hashlib
import subprocess

import pytest

from tools import kernels
from tools.kernels import sources, toolchain

LOG = """
ptxas info    : Compiling entry function '_Z1av' for 'sm_80'
ptxas info    : Function properties for _Z1av
    64 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16448 bytes smem, 488 bytes cmem[0]
ptxas info    : Compile time = 207.851 ms
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Function properties for _Z1bv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers, 416 bytes cmem[0]
"""
# Compiled from one source each time it changes: the oldest and the newest that are meant to work.
OTHER_ARCHITECTURES = "7.5;10.0;12.0+PTX"
OTHER_SOURCE = "block_mask/cuda/ops.cu"  # the one that compiles fastest

TORCH = toolchain.torch_about()[0]
needs_nvcc = pytest.mark.skipif(
    toolchain.cuda_home(TORCH) is None, reason="there is no nvcc here, so no kernel is compiled"
)


def test_the_report_of_ptxas_is_read():
    a, b = kernels.kernels_of(LOG)
    assert a == kernels.Kernel("_Z1av", "sm_80", 40, 16448, 64, 4, 8) and a.spills
    assert b == kernels.Kernel("_Z1bv", "sm_90", 18, 0, 0, 0, 0) and not b.spills
    assert [line.split()[0] for line in kernels.table([a, b])] == ["arch", "sm_80", "sm_90"]
    with pytest.raises(ValueError, match="ptxas said nothing of _Z1bv for sm_90"):
        kernels.kernels_of(LOG[: LOG.rindex("    0 bytes")])


@pytest.fixture(scope="module")
def compiled():
    return kernels.compiled()


@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills(compiled):
    spilling = [one for one in compiled if one.spills]
    assert not spilling, "\n".join(kernels.table(spilling))


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_is_compiled_for_both_architectures(compiled):
    names = {
        arch: {k.name for k in compiled if k.architecture == arch} for arch in ("sm_80", "sm_90")
    }
    assert names["sm_80"] == names["sm_90"] and len(names["sm_80"]) > 40


@needs_nvcc
@pytest.mark.slow
def test_two_blocks_fit_a_multiprocessor(compiled):
    # 64 Ki registers, handed out to warps in steps of 8 a thread; 100 KB on the smallest of them
    for one in compiled:
        registers = -(-one.registers // 8) * 8 * 256
        assert registers * 2 <= 65536 and (one.shared_bytes + 1024) * 2 <= 100 * 1024, one.name


def other_command(folder, monkeypatch):
    monkeypatch.setenv("MASKED_LOSS_EXT_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", OTHER_ARCHITECTURES)
    tools = toolchain.find_toolchain()
    words = [tools.cuda_home / "bin/nvcc", *sources.NVCC_FLAGS, *tools.cuda_flags]
    words += [f"-D{define}" for define in sources.DEFINES]
    root = sources.csrc_dir()
    words += [f"-I{root}", "-isystem", tools.torch_root / "include", "-c", root / OTHER_SOURCE]
    return [str(word) for word in words], tools.architectures


@needs_nvcc
@pytest.mark.slow
def test_other_architectures_compile(monkeypatch):
    folder = kernels.ROOT / "build" / "ci-cuda-others"
    command, architectures = other_command(folder, monkeypatch)
    assert architectures == ["sm_75", "sm_100", "sm_120", "compute_120"]
    key = repr(command) + sources.source_fingerprint()
    done = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.log"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = subprocess.run([*command, "-o", folder / "o.o"], capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        done.write_text(made.stdout + made.stderr)
    found = {one.architecture: one.spills for one in kernels.kernels_of(done.read_text())}
    assert found == {"sm_75": False, "sm_100": False, "sm_120": False}
