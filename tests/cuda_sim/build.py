# SPDX-License-Identifier: BSD-3-Clause
"""Compile .cu files and the simulator's runtime into one library; objects are cached by content."""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tools.kernels import toolchain  # without the package, which would load its own library

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH = Path(torch.__file__).resolve().parent

RUNTIME = [
    HERE / f
    for f in (
        "accesses.cpp",
        "api.cpp",
        "cluster.cpp",
        "device_memory.cpp",
        "faults.cpp",
        "launch.cpp",
        "scheduler.cpp",
        "stream.cpp",
        "symbols.cpp",
    )
]
FLAGS = [
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-DMASKED_LOSS_EXT_CUDA_SIM",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-Wall",
    "-Wno-unknown-pragmas",
]
# Kernels alone: an index beyond an array, a misaligned vector access and integer overflow stop the
# launch. Kernels also read vectors through pointers to scalars, as nvcc lets them.
KERNEL_FLAGS = [
    "-x",
    "c++",
    "-O1",  # half the time of -O2 to compile, and none that is noticed to run
    "-fno-strict-aliasing",
    "-fsanitize-undefined-trap-on-error",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
]
# Puts a call before every access; accesses.cpp has the functions that are called.
COUNTING_FLAGS = ["-fsanitize=thread"]


def compiler():
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _cache_directory():
    directory = ROOT / "build" / "cuda_sim"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        pass
    if os.access(directory, os.W_OK):
        return directory
    directory = Path(tempfile.gettempdir()) / f"masked_loss_ext_cuda_sim_{os.getuid()}"
    directory.mkdir(exist_ok=True)
    return directory


def _digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


@functools.cache
def _included(path):
    """Every file of the project that one includes, itself too, whatever the preprocessor skips."""
    found, left = {path}, [path]
    while left:
        file = left.pop()
        for name in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', file.read_text(), re.M):
            for folder in (file.parent, ROOT / "csrc", HERE):
                header = (folder / name).resolve()
                if header.is_file() and header not in found:
                    found.add(header)
                    left.append(header)
    return sorted(found)


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _make(command, target):
    """Run a command that writes its -o file; of several test processes, the first alone. What else
    it writes (coverage does) lies beside the file, under its name."""
    if target.exists():
        return target
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.part")
            _run([*command, "-o", unfinished])
            os.replace(unfinished, target)
    return target


def link(name, units, link_flags=()):
    """The library of so many (source, flags of its own)."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("a library for tests needs a C++ compiler (g++)")
    cache = _cache_directory()
    includes = ["-I", ROOT / "csrc", "-I", HERE, "-isystem", TORCH / "include"]
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    # A compiler may be a script with flags of its own.
    common = _digest(version, torch.__version__, *toolchain.identity(cxx))

    def compile_one(unit):
        source, flags = Path(unit[0]).resolve(), unit[1]
        command = [cxx, *flags, *includes, "-c", source]
        key = _digest(common, *command, *(file.read_text() for file in _included(source)))
        return _make(command, cache / f"{source.stem}-{key}.o")

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, units))
    command = [cxx, "-shared", *objects, *link_flags, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ldl"]
    return _make(command, cache / f"{name}-{_digest(common, *command)}.so")


def build(name, sources, runtime_flags=(), kernel_flags=()):
    """Build `sources` (.cu or .cpp) with the simulator, return the path of the library."""

    def flags_of(source):
        is_kernel = Path(source).suffix == ".cu" or ROOT / "csrc" in Path(source).parents
        return [*FLAGS, *([*KERNEL_FLAGS, *kernel_flags] if is_kernel else runtime_flags)]

    return link(name, [(source, flags_of(source)) for source in [*sources, *RUNTIME]])
