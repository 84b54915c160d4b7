# SPDX-License-Identifier: BSD-3-Clause
"""Registers, shared memory and spills of every CUDA kernel, as ptxas reports them in the build.

``python -m tools.kernels`` compiles what is not compiled yet (for TORCH_CUDA_ARCH_LIST, else sm_80
and sm_90; no GPU is needed) and prints a line per kernel; its exit status is 1 where one spills.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
# As plain files: the import of the package would load its library.
sys.path.insert(0, str(ROOT / "masked_loss_ext"))
from build import ninja, sources, toolchain  # noqa: E402

sys.path.pop(0)

ARCHITECTURES = "8.0;9.0"
FOLDER = ROOT / "build" / "ci-cuda"  # .ci/check_build.py compiles the same into it
# Compiled from one source each time it changes: the oldest and the newest that are meant to work.
OTHER_ARCHITECTURES = "7.5;10.0;12.0+PTX"
OTHER_SOURCE = "block_mask/cuda/kernels.cu"  # the one that compiles fastest
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int  # local arrays with run-time indices lie there too, not only spills
    spill_store_bytes: int
    spill_load_bytes: int

    @property
    def spills(self) -> bool:
        return self.spill_store_bytes + self.spill_load_bytes > 0


def kernels_of(log: str) -> list[Kernel]:
    """What `ptxas -v` said, kernel by kernel."""
    found = []
    pieces = ENTRY.split(log)[1:]
    for name, architecture, text in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        frame, used, shared = FRAME.search(text), USED.search(text), SHARED.search(text)
        if frame is None or used is None:
            raise ValueError(f"ptxas said nothing of {name} for {architecture}")
        stack, stores, loads = map(int, frame.groups())
        shared_bytes = int(shared[1]) if shared else 0
        found.append(Kernel(name, architecture, int(used[1]), shared_bytes, stack, stores, loads))
    return found


def readable(names: Iterable[str]) -> dict[str, str]:
    """Each mangled name as C++ has it, without the namespaces that all share."""
    names = list(dict.fromkeys(names))
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None or not names:
        return {name: name for name in names}
    done = subprocess.run([program], input="\n".join(names), capture_output=True, text=True)
    plain = [
        re.sub(r"masked_loss_ext::(cuda::)?|^void ", "", one) for one in done.stdout.split("\n")
    ]
    # Arguments of the template tell the kernels of a name apart, those of the function do not.
    return {name: one.partition("(")[0] for name, one in zip(names, plain, strict=False)}


def tools_for(architectures: str) -> toolchain.Toolchain:
    asked = {"MASKED_LOSS_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    with mock.patch.dict(os.environ, asked):
        return toolchain.find_toolchain()


def compiled(architectures: str = ARCHITECTURES, folder: Path = FOLDER) -> list[Kernel]:
    """Of every kernel of the library; compiles what is new."""
    ninja.compile_library(tools_for(architectures), folder)
    logs = [folder / f"{source}.o.log" for source in sources.CUDA_SOURCES]
    return [kernel for log in logs for kernel in kernels_of(log.read_text())]


def compiled_for_others() -> list[Kernel]:
    """Of one source, for the architectures that the library is not compiled for elsewhere."""
    tools, root = tools_for(OTHER_ARCHITECTURES), sources.csrc_dir()
    words = [tools.cuda_home / "bin/nvcc", *sources.NVCC_FLAGS, *tools.cuda_flags]
    words += [f"-D{define}" for define in sources.DEFINES]
    words += [f"-I{root}", "-isystem", tools.torch_root / "include", "-c", root / OTHER_SOURCE]
    done = subprocess.run([*map(str, words), "-o", os.devnull], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return kernels_of(done.stdout + done.stderr)


def table(kernels: Iterable[Kernel]) -> list[str]:
    kernels = sorted(kernels, key=lambda one: (one.architecture, one.name))
    names = readable(one.name for one in kernels)
    head = f"{'arch':7} {'registers':>9} {'shared':>7} {'stack':>6} {'spilled':>8}  kernel"
    return [head] + [
        f"{one.architecture:7} {one.registers:9} {one.shared_bytes:7} {one.stack_bytes:6} "
        f"{one.spill_store_bytes + one.spill_load_bytes:8}  {names[one.name]}"
        for one in kernels
    ]


def main() -> int:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    try:
        kernels = compiled(wanted, FOLDER if wanted == ARCHITECTURES else ROOT / "build/kernels")
    except toolchain.BuildError as error:
        sys.exit(f"masked_loss_ext: {error}")
    print("\n".join(table(kernels)))
    return int(any(one.spills for one in kernels))


if __name__ == "__main__":
    sys.exit(main())
