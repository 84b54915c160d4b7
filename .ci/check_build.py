# SPDX-License-Identifier: BSD-3-Clause
"""Builds for machines that this one is not.

cuda     every .cu for sm_80 and sm_90, also against a CPU-only torch; the library is loaded, and
         every operator with a CPU kernel must have a CUDA one; one .cu for other architectures
aarch64  every CPU source, compiled by a cross compiler (not optimised, and not linked: there is no
         such torch here)
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools import kernels  # noqa: E402
from tools.kernels import ninja, sources, toolchain  # noqa: E402

sys.path.pop(0)


def check_cuda():
    root, version, torch_cuda = toolchain.torch_about()
    if toolchain.cuda_home(root) is None:
        print("NOT DONE: no nvcc here")
        return
    # tests/cuda/test_resources.py reads what ptxas said of it.
    tools = kernels.tools_for(kernels.ARCHITECTURES)
    library = ninja.compile_library(tools, kernels.FOLDER)

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
    others = kernels.compiled_for_others()
    spilling = [one for one in others if one.spills]
    found = sorted({one.architecture for one in others})
    if spilling or found != ["sm_100", "sm_120", "sm_75"]:
        sys.exit("\n".join(kernels.table(spilling or others)))
    print(f"{kernels.OTHER_SOURCE} for {', '.join(found)}: ok")


def check_aarch64():
    include = toolchain.torch_about()[0] / "include"
    folder = ROOT / "build" / "ci-aarch64"
    folder.mkdir(parents=True, exist_ok=True)
    common = ["aarch64-linux-gnu-g++", *sources.CXX_FLAGS, "-fPIC", "-O0"]
    common += [f"-D{define}" for define in sources.DEFINES]
    common += [f"-I{ROOT / 'csrc'}", "-isystem", str(include), "-c"]

    def compile_one(unit):
        target = folder / unit.object.replace("/", "_")
        command = [*common, *unit.flags, str(ROOT / "csrc" / unit.source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        return unit.source, done.returncode, done.stderr

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(compile_one, sources.units("aarch64")))
    for source, failed, said in results:
        print(f"{'FAIL' if failed else 'ok  '} {source}\n{said if failed else ''}".rstrip())
    sys.exit(any(failed for _, failed, _ in results))


if __name__ == "__main__":
    checks = {"cuda": check_cuda, "aarch64": check_aarch64}
    if len(sys.argv) != 2 or sys.argv[1] not in checks:
        sys.exit(__doc__)
    checks[sys.argv[1]]()
