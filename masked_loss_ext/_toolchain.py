# SPDX-License-Identifier: BSD-3-Clause
"""Find what a build needs - torch, compiler, ninja, CUDA toolkit - or say what is missing.

Every failure is one sentence that says what is missing and how to get it. torch is read, not
imported: this runs in build environments and under CMake, and an import takes seconds.
"""

import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

# The GPUs of the last years that most users have; PTX lets newer ones compile at load.
DEFAULT_ARCHITECTURES = "8.0;9.0;9.0+PTX"


class BuildError(RuntimeError):
    """The library cannot be built here; the text says why and what to do."""


def say(text):
    print(f"masked_loss_ext: {text}", file=sys.stderr, flush=True)


@dataclass
class Toolchain:
    torch_root: Path
    torch_version: str
    cxx: list
    ninja: str
    cuda_home: Path | None = None
    cudart_dir: Path | None = None
    architectures: list = field(default_factory=list)  # "sm_80", ..., "compute_90" for PTX

    @property
    def cuda_flags(self):
        return [
            f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}"
            for name in self.architectures
        ]


def check_platform():
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise BuildError(
            "only Linux on x86-64 and aarch64 is supported, this is "
            f"{platform.system()} on {platform.machine()} (on Windows, WSL 2 is such a Linux)"
        )


def torch_about():
    """(folder, version, CUDA version or None) of the installed torch."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("PyTorch is missing; get it with: pip install torch")
    root = Path(next(iter(spec.submodule_search_locations)))
    about = runpy.run_path(str(root / "version.py"))
    version = about["__version__"]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 10):
        raise BuildError(
            f"PyTorch 2.10 or newer is needed, this is {version}; get it with: pip install -U torch"
        )
    return root, version, about["cuda"]


def find_cxx():
    wanted = shlex.split(os.environ.get("CXX", ""))
    names = [wanted[0]] if wanted else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        what = f"CXX={os.environ['CXX']} names no program" if wanted else "no C++ compiler is found"
        raise BuildError(
            f"{what}; one that knows C++17 is needed: apt-get install g++ "
            "(Fedora: dnf install gcc-c++; conda: conda install cxx-compiler)"
        )
    return [found, *wanted[1:]]


def find_ninja():
    # A virtual environment that was not activated has its ninja beside python, not on PATH.
    beside_python = Path(sys.executable).parent / "ninja"
    found = shutil.which("ninja") or (str(beside_python) if beside_python.is_file() else None)
    if found is None and find_spec("ninja") is not None:
        import ninja

        inside_package = Path(getattr(ninja, "BIN_DIR", "")) / "ninja"
        found = str(inside_package) if inside_package.is_file() else None
    if found is None:
        raise BuildError("ninja is missing; get it with: pip install ninja")
    return found


def cuda_home(torch_root):
    """The folder of a CUDA toolkit that has nvcc and the headers, or None."""
    nvcc = shutil.which("nvcc")
    # nvcc on PATH may be a link or a script outside the toolkit, so look for the headers too.
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places += [nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    places += sorted(torch_root.parent.glob("nvidia/cu[0-9]*"), reverse=True)
    for home in (Path(place) for place in places if place):
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            return home
    return None


def find_cuda(torch_root, torch_cuda):
    """The CUDA toolkit to build with, or None. MASKED_LOSS_EXT_CUDA = auto | 1 | 0."""
    wanted = os.environ.get("MASKED_LOSS_EXT_CUDA") or "auto"
    if wanted not in ("auto", "1", "0"):
        raise BuildError(f"MASKED_LOSS_EXT_CUDA must be auto, 1 or 0, got {wanted!r}")
    if wanted == "0" or (wanted == "auto" and torch_cuda is None):
        return None
    home = cuda_home(torch_root)
    how = "install the CUDA toolkit (developer.nvidia.com/cuda-downloads) or set CUDA_HOME"
    if home is None and wanted == "1":
        raise BuildError(f"MASKED_LOSS_EXT_CUDA=1, but nvcc is missing; {how}")
    if home is None:
        say(
            f"WARNING: PyTorch is built for CUDA {torch_cuda}, but nvcc is missing, so only the "
            f"CPU kernels are built and CUDA tensors will be refused; {how} and build again "
            "(MASKED_LOSS_EXT_CUDA=0 silences this)"
        )
    return home


def find_static_cudart(home):
    for folder in (home / "lib64", home / "lib", *home.glob("targets/*-linux/lib")):
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise BuildError(
        f"libcudart_static.a is missing in {home}; install the whole CUDA toolkit (in Debian's "
        "packages cuda-cudart-dev) or set CUDA_HOME to one that has it"
    )


def find_architectures():
    """TORCH_CUDA_ARCH_LIST, else the GPUs that are here, else the default."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or _visible_gpus() or DEFAULT_ARCHITECTURES
    names = []
    for item in re.split(r"[;,\s]+", wanted.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", item)
        if match is None:
            raise BuildError(
                "TORCH_CUDA_ARCH_LIST must list compute capabilities such as "
                f"'{DEFAULT_ARCHITECTURES}', got {item!r}"
            )
        names.append(f"sm_{match[1]}{match[2]}")
        if match[3]:
            names.append(f"compute_{match[1]}{match[2]}")
    return list(dict.fromkeys(names))


def _visible_gpus():
    # Asked of the driver's tool: torch.cuda would initialise CUDA here, which forbids a later fork.
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = sorted(set(re.findall(r"^\d+\.\d+$", answer.stdout, re.M)))
    return ";".join(found) if answer.returncode == 0 else None


def find_toolchain():
    check_platform()
    root, version, torch_cuda = torch_about()
    tools = Toolchain(root, version, find_cxx(), find_ninja(), find_cuda(root, torch_cuda))
    if tools.cuda_home:
        tools.cudart_dir = find_static_cudart(tools.cuda_home)
        tools.architectures = find_architectures()
    return tools
