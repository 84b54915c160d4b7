# SPDX-License-Identifier: BSD-3-Clause
"""Every .cu for sm_80 and sm_90, also against a CPU-only torch: the library is loaded, and every
operator with a CPU kernel must have a CUDA one. One .cu for other architectures.
"""

import sys
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


if __name__ == "__main__":
    if sys.argv[1:] != ["cuda"]:
        sys.exit("usage: python .ci/check_build.py cuda")
    check_cuda()
