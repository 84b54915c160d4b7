# SPDX-License-Identifier: BSD-3-Clause
"""What ptxas says of every CUDA kernel: nothing spills, and each fits the GPUs it is meant for."""

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
    """For both architectures where .ci/check_build.py has just done it, else for one."""
    library = kernels.FOLDER / sources.LIBRARY
    info = sources.read_build_info(library) if library.is_file() else {}
    if info.get("sources") == sources.source_fingerprint() and info["cuda"] == "sm_80 sm_90":
        return kernels.compiled()
    return kernels.compiled("9.0", kernels.ROOT / "build" / "sm_90")


@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills(compiled):
    spilling = [one for one in compiled if one.spills]
    assert not spilling, "\n".join(kernels.table(spilling))


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_is_compiled_for_each_architecture(compiled):
    architectures = {one.architecture for one in compiled}
    names = [{k.name for k in compiled if k.architecture == arch} for arch in architectures]
    assert "sm_90" in architectures and all(one == names[0] for one in names)
    assert len(names[0]) > 40


@needs_nvcc
@pytest.mark.slow
def test_two_blocks_fit_a_multiprocessor(compiled):
    # 64 Ki registers, handed out to warps in steps of 8 a thread; 100 KB on the smallest of them
    for one in compiled:
        registers = -(-one.registers // 8) * 8 * 256
        assert registers * 2 <= 65536 and (one.shared_bytes + 1024) * 2 <= 100 * 1024, one.name
