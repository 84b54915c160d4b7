# SPDX-License-Identifier: BSD-3-Clause
"""Builds for machines that this one is not.

cuda     every .cu for sm_80 and sm_90, also against a CPU-only torch; the library is loaded, and
         every operator with a CPU kernel must have a CUDA one
aarch64  every CPU source, compiled by a cross compiler (not linked: there is no such torch here)
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# As plain files: the import of the package would load its library.
sys.path.insert(0, str(ROOT / "masked_loss_ext"))
from build import ninja, sources, toolchain  # noqa: E402

sys.path.pop(0)


def check_cuda():
    root, version, torch_cuda = toolchain.torch_about()
    if toolchain.cuda_home(root) is None:
        print("NOT DONE: no nvcc here")
        return
    os.environ |= {"MASKED_LOSS_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    tools = toolchain.find_toolchain()
    # tools/kernels.py, and with it a test, compiles the same into this folder.
    library = ninja.compile_library(tools, ROOT / "build" / "ci-cuda")

    import torch

    torch.ops.load_library(str(library))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("masked_loss_ext::")]
    on_cpu = [name for name in names if has_kernel(name, "CPU")]
    missing = [name for name in on_cpu if not has_kernel(name, "CUDA")]
    if missing or not on_cpu:
        sys.exit(f"no CUDA kernel for {missing}" if missing else "the library has no CPU kernels")
    built_for = sources.read_build_info(library)["cuda"]
    print(f"torch {version} (CUDA: {torch_cuda}): {built_for}, {len(on_cpu)} operators:")
    print("  " + "\n  ".join(on_cpu))


def check_aarch64():
    include = toolchain.torch_about()[0] / "include"
    folder = ROOT / "build" / "ci-aarch64"
    folder.mkdir(parents=True, exist_ok=True)
    common = ["aarch64-linux-gnu-g++", *sources.CXX_FLAGS, "-fPIC"]
    common += [f"-D{define}" for define in sources.DEFINES]
    common += [f"-I{ROOT / 'csrc'}", "-isystem", str(include), "-c"]

    def compile_one(source):
        target = folder / (source.replace("/", "_") + ".o")
        command = [*common, str(ROOT / "csrc" / source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        return source, done.returncode, done.stderr

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(compile_one, sources.CPU_SOURCES))
    for source, failed, said in results:
        print(f"{'FAIL' if failed else 'ok  '} {source}\n{said if failed else ''}".rstrip())
    sys.exit(any(failed for _, failed, _ in results))


if __name__ == "__main__":
    checks = {"cuda": check_cuda, "aarch64": check_aarch64}
    if len(sys.argv) != 2 or sys.argv[1] not in checks:
        sys.exit(__doc__)
    checks[sys.argv[1]]()
