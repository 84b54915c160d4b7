# SPDX-License-Identifier: BSD-3-Clause
"""Find what a build needs - torch, compiler, ninja, CUDA toolkit - or say what is missing.

Every failure is one sentence that says what is missing and how to get it. torch is read, not
imported: this runs in build environments and under CMake, and an import takes seconds.
"""

import contextlib
import itertools
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

from . import gpus

# What the package asks the environment; the first value stands for a variable that is not set.
SETTINGS = {
    "MASKED_LOSS_EXT_BUILD": ("auto", "aot", "jit"),
    "MASKED_LOSS_EXT_CPU_CAPABILITY": ("avx512", "avx2", "default"),  # read in csrc/cpu/capability
    "MASKED_LOSS_EXT_CUDA": ("auto", "1", "0"),
    "MASKED_LOSS_EXT_JIT": ("0", "1"),
    "MASKED_LOSS_EXT_VERBOSE": ("0", "1"),
}
COMPILERS = ["c++", "g++", "clang++"]
# The GPUs of the last years that most users have; PTX lets newer ones compile at load.
DEFAULT_ARCHITECTURES = "8.0;9.0;9.0+PTX"


class BuildError(RuntimeError):
    """The library cannot be built here; the text says why and what to do."""


def show(text, end="\n"):
    """On the standard error, where there is one that takes it: services close theirs."""
    if sys.stderr is None:
        return  # print would take the standard output instead
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)


def say(text):
    show(f"masked_loss_ext: {text}")


def setting(name):
    """The value of one of SETTINGS."""
    known = SETTINGS[name]
    value = os.environ.get(name) or known[0]
    if value not in known:
        listed = ", ".join(known[:-1]) + " or " + known[-1]
        raise BuildError(f"{name} must be {listed}, got {value!r}")
    return value


def check_settings():
    for name in SETTINGS:
        setting(name)


def answer_of(command, timeout=120):
    """What a program that answers at once says, whatever its encoding."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="backslashreplace",
            timeout=timeout,
            umask=0o022,  # ninja makes folders even in a dry run
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} has not answered in {timeout} s") from None


@dataclass
class Toolchain:
    torch_root: Path
    torch_version: str
    cxx: list
    ninja: str
    cuda_home: Path | None = None
    cudart_dir: Path | None = None
    toolkit: str = ""  # "13.0"
    architectures: list = field(default_factory=list)  # "sm_80", ..., "compute_90" for PTX
    remark: str = ""  # said where something is compiled

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


def _words_of_cxx():
    command = os.environ.get("CXX", "")
    try:
        return shlex.split(command)
    except ValueError as error:  # a quotation that is not closed
        raise BuildError(f"CXX must be a command line, got {command!r}: {error}") from None


def find_cxx():
    wanted = _words_of_cxx()
    names = [wanted[0]] if wanted else COMPILERS
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        what = f"CXX={os.environ['CXX']} names no program" if wanted else "no C++ compiler is found"
        raise BuildError(
            f"{what}; one that knows C++17 is needed: apt-get install g++ "
            "(Fedora: dnf install gcc-c++; conda: conda install cxx-compiler)"
        )
    return [found, *wanted[1:]]


def identity(program):
    """What changes when a program does. Not its --version: an import would wait for a process."""
    real = os.path.realpath(program)
    about = os.stat(real)
    return real, about.st_size, about.st_mtime_ns


def cxx_identity():
    """Of every program that CXX names (ccache g++), or of the compiler found; [] without one."""
    words = _words_of_cxx()
    programs = filter(None, map(shutil.which, words or COMPILERS))
    return [identity(program) for program in (programs if words else itertools.islice(programs, 1))]


def find_ninja():
    # A virtual environment that was not activated has its ninja beside python, not on PATH; where
    # a program embeds Python, there may be no python.
    folders = [Path(sys.executable).parent] if sys.executable else []
    folders.append(Path(sys.prefix, "bin"))
    beside = (str(folder / "ninja") for folder in folders if (folder / "ninja").is_file())
    found = shutil.which("ninja") or next(beside, None)
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
    return next(filter(_is_toolkit, (Path(place) for place in places if place)), None)


def _is_toolkit(home):
    return (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file()


def toolkit_version(home):
    header = home / "include/cuda_runtime_api.h"
    text = header.read_text(errors="replace") if header.is_file() else ""
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", text)
    return f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else "unknown"


def _named_architectures():
    return os.environ.get("TORCH_CUDA_ARCH_LIST")


def wants_cuda(torch_cuda, for_others=False):
    """MASKED_LOSS_EXT_CUDA = auto | 1 | 0.

    auto: PyTorch has CUDA, and somebody can run the kernels: a GPU that is here, those that
    TORCH_CUDA_ARCH_LIST names, or, `for_others`, another machine's, as of a wheel.
    """
    wanted = setting("MASKED_LOSS_EXT_CUDA")
    if wanted != "auto" or torch_cuda is None:
        return wanted == "1"
    return for_others or bool(_named_architectures() or gpus.capabilities())


def find_cuda(torch_root, torch_cuda, for_others=False):
    """The CUDA toolkit to build with, or None."""
    if not wants_cuda(torch_cuda, for_others):
        return None
    home = cuda_home(torch_root)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        named = os.environ.get(name)
        if named and not _is_toolkit(Path(named)):
            say(f"WARNING: {name}={named} has no bin/nvcc and include/cuda_runtime.h, not used")
    how = "install the CUDA toolkit (developer.nvidia.com/cuda-downloads) or set CUDA_HOME"
    if home is None and setting("MASKED_LOSS_EXT_CUDA") == "1":
        raise BuildError(f"MASKED_LOSS_EXT_CUDA=1, but nvcc is missing; {how}")
    if home is None:
        say(
            f"WARNING: PyTorch is built for CUDA {torch_cuda}, but nvcc is missing, so only the "
            f"CPU kernels are built and CUDA tensors will be refused; {how} and build again "
            "(MASKED_LOSS_EXT_CUDA=0 silences this)"
        )
    return home


def why_no_cuda(torch_cuda, for_others=False):
    """A remark for who waits for CUDA kernels, where `auto` leaves out what PyTorch could use."""
    wanted = setting("MASKED_LOSS_EXT_CUDA")
    if wanted != "auto" or torch_cuda is None or wants_cuda(torch_cuda, for_others):
        return ""
    return (
        f"PyTorch is built for CUDA {torch_cuda}, but there is no GPU here, so no CUDA kernels are "
        "compiled; MASKED_LOSS_EXT_CUDA=1 compiles them all the same"
    )


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
    wanted = _named_architectures() or gpus.capabilities() or DEFAULT_ARCHITECTURES
    names = []
    for item in re.split(r"[;,\s]+", wanted.strip("; ,\t\n")):
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


def find_toolchain(for_others=False):
    """for_others: for other machines than this, see wants_cuda."""
    check_platform()
    root, version, torch_cuda = torch_about()
    cxx, ninja = find_cxx(), find_ninja()
    tools = Toolchain(root, version, cxx, ninja, find_cuda(root, torch_cuda, for_others))
    tools.remark = why_no_cuda(torch_cuda, for_others)
    if tools.cuda_home:
        tools.cudart_dir = find_static_cudart(tools.cuda_home)
        tools.toolkit = toolkit_version(tools.cuda_home)
        tools.architectures = find_architectures()
    return tools
