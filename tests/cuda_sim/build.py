# SPDX-License-Identifier: BSD-3-Clause
"""Compile .cu files and the simulator's runtime into one library; objects are cached by content."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

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


def _headers_digest(directory):
    files = [f for f in sorted(directory.rglob("*")) if f.suffix in (".h", ".cuh", ".inc")]
    return _digest(*(f.read_text() for f in files))


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _make(command, target):
    """Run a command that writes its -o file, in a way that survives two test processes at once."""
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        _run([*command, "-o", output])
        os.replace(output, target)
    return target


def build(name, sources, runtime_flags=(), kernel_flags=()):
    """Build `sources` (.cu or .cpp) with the simulator, return the path of the library."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("the CUDA simulator needs a C++ compiler (g++)")
    cache = _cache_directory()
    includes = ["-I", ROOT / "csrc", "-I", HERE, "-isystem", TORCH / "include"]
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout
    common = _digest(version, torch.__version__, _headers_digest(HERE))
    csrc_headers = _headers_digest(ROOT / "csrc")

    def compile_one(source):
        source = Path(source).resolve()
        if source in RUNTIME:
            headers, extra = "", runtime_flags
        else:
            is_kernel = source.suffix == ".cu"
            headers, extra = csrc_headers, [*KERNEL_FLAGS, *kernel_flags] if is_kernel else []
        command = [cxx, *FLAGS, *extra, *includes, "-c", source]
        key = _digest(common, headers, *command, source.read_text())
        return _make(command, cache / f"{source.stem}-{key}.o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sources, *RUNTIME]))
    command = [cxx, "-shared", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ldl"]
    return _make(command, cache / f"{name}-{_digest(common, *command)}.so")
