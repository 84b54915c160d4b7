# SPDX-License-Identifier: BSD-3-Clause
"""The one list of sources and flags, and what a library says it was built from."""

import hashlib
import mmap
import os
import platform
import re
import runpy
from pathlib import Path
from typing import NamedTuple

from .toolchain import BuildError, torch_about

PACKAGE = Path(__file__).resolve().parents[1]
VERSION = runpy.run_path(str(PACKAGE / "_version.py"))["__version__"]
LIBRARY = "_C.abi3.so"

# Relative to csrc/, which is the include root of all of them; what takes longest first.
LEVEL_SOURCES = [  # compiled once per level
    "elementwise/cpu/kernels.cpp",
    "cross_entropy_terms/cpu/kernels.cpp",
    "cross_entropy/cpu/kernels.cpp",
]
CPU_SOURCES = [
    "cross_entropy/cpu/ops.cpp",
    "linear_cross_entropy/cpu/ops.cpp",
    "linear_cross_entropy/cpu/products.cpp",
    "cross_entropy_terms/cpu/ops.cpp",
    "block_mask/cpu/ops.cpp",
    "elementwise/cpu/ops.cpp",
    "repetition/cpu/ops.cpp",
    "schemas.cpp",
    "common/cpu/capability.cpp",
]
# Kernels and their launches. No PyTorch header in them: see csrc/common/cuda/host.h.
CUDA_SOURCES = [
    "cross_entropy/cuda/sweep.cu",
    "cross_entropy_terms/cuda/kernels.cu",
    "elementwise/cuda/kernels.cu",
    "cross_entropy/cuda/forward.cu",
    "cross_entropy/cuda/backward.cu",
    "linear_cross_entropy/cuda/kernels.cu",
    "block_mask/cuda/kernels.cu",
    "repetition/cuda/kernels.cu",
]
# The operators over them, by the C++ compiler.
CUDA_HOST_SOURCES = [
    "linear_cross_entropy/cuda/ops.cpp",
    "cross_entropy/cuda/ops.cpp",
    "cross_entropy_terms/cuda/ops.cpp",
    "block_mask/cuda/ops.cpp",
    "elementwise/cuda/ops.cpp",
    "repetition/cuda/ops.cpp",
    "common/cuda/device.cpp",
]

# 2.10 is the oldest torch whose stable ABI has all that the sources use: the library loads in it
# and in every later one, whichever torch it was compiled with.
DEFINES = ["TORCH_TARGET_VERSION=0x020a000000000000", f'MASKED_LOSS_EXT_VERSION="{VERSION}"']
CXX_FLAGS = [
    "-O2",  # as fast as -O3 here, in half the time and code: what must be vectors says so
    "-std=c++17",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",  # gcc vectorises few of the loops without it
    "-ffp-contract=fast",  # as gcc does; clang 13 would make no fused products at all
    "-g0",
]
# The instruction-set levels of common/cpu/capability.h. A header's function that one of their
# sources emits for all to share would be compiled for that level too: the tests look for it.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mbmi2"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2_FLAGS]
LEVELS = {
    "avx512": [*AVX512_FLAGS, "-mprefer-vector-width=512", "-DMASKED_LOSS_EXT_LEVEL=kAvx512"],
    "avx2": [*AVX2_FLAGS, "-DMASKED_LOSS_EXT_LEVEL=kAvx2"],
    "default": ["-DMASKED_LOSS_EXT_LEVEL=kDefault"],
}
# Two architectures at a time; ptxas says what each kernel uses (python -m tools.kernels).
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads=2", "-Xptxas=-v"]
LINK_FLAGS = ["-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]  # cudart's symbols stay inside
CUDA_LIBRARIES = ["cudart_static", "dl", "rt", "pthread"]
INFO_MARKER = "masked_loss_ext build info:"


class Unit(NamedTuple):
    """One run of the compiler: what it makes, of which source, with which flags of its own."""

    object: str
    source: str
    flags: list


def units(machine=None):
    """Those of the CPU library for a machine (by default this one)."""
    on_x86 = (machine or platform.machine()) == "x86_64"
    levels = LEVELS if on_x86 else {"default": LEVELS["default"]}
    found = [
        Unit(f"{source}.{level}.o", source, flags)
        for source in LEVEL_SOURCES
        for level, flags in levels.items()
    ]
    return found + [Unit(f"{source}.o", source, []) for source in CPU_SOURCES]


def csrc_dir():
    """csrc/ inside the installed package, or beside the package in the source tree."""
    for place in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if place.is_dir():
            return place
    raise BuildError("the csrc folder is missing, so there is nothing to compile: reinstall")


def source_fingerprint():
    """Hash of the sources and flags, by content: clones and copies do not keep file times."""
    root = csrc_dir()
    flags = [units(), CUDA_SOURCES, CUDA_HOST_SOURCES, DEFINES, CXX_FLAGS, NVCC_FLAGS, LINK_FLAGS]
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted(root.rglob("*")):
        if path.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh"):
            digest.update(os.fsencode(path.relative_to(root)) + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_info(architectures, torch_version, toolkit=""):
    """What a library is built from; it can say so without being loaded."""
    return {
        "version": VERSION,
        "sources": source_fingerprint(),
        "cuda": " ".join(architectures) or "none",
        "toolkit": toolkit or "none",
        "torch": torch_version,
    }


# Which compiler made it, the compiler says itself; it is no part of what is asked for.
COMPILER = """\
#if defined(__clang__)
#define COMPILER "clang " __clang_version__
#else
#define COMPILER "gcc " __VERSION__
#endif
"""


def build_info_source(info):
    """The C++ file that puts it there."""
    text = INFO_MARKER + ";".join(f"{key}={value}" for key, value in info.items())
    name = 'extern "C" __attribute__((used)) const char masked_loss_ext_build_info[]'
    return f'{COMPILER}{name} = "{text};compiler=" COMPILER;\n'


def read_build_info(library):
    """What build_info gave for a library file, and its compiler; {} if it is not one of ours."""
    with open(library, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return {}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.rfind(INFO_MARKER.encode())  # constants lie behind the code
            text = data[start : start + 1000] if start >= 0 else b""
    words = text[len(INFO_MARKER) :].partition(b"\0")[0].decode("ascii", "replace")
    return dict(re.findall(r"(\w+)=([^;]*)", words))


def cmake_lists():
    """The same lists as CMake code, for include()."""
    try:
        torch_root = torch_about()[0]
    except BuildError:  # CMake has another way to be told where it is
        torch_root = ""
    lists = {
        "VERSION": [VERSION],
        "CPU_SOURCES": CPU_SOURCES,
        "LEVEL_SOURCES": LEVEL_SOURCES,
        "CUDA_SOURCES": CUDA_SOURCES + CUDA_HOST_SOURCES,
        "DEFINES": DEFINES,
        # The language standards are CMake's own properties there.
        "CXX_FLAGS": [flag for flag in CXX_FLAGS if not flag.startswith("-std")],
        "LINK_FLAGS": LINK_FLAGS,
        "TORCH_ROOT": [torch_root],
        "LEVELS": list(LEVELS),
        **{f"FLAGS_{level}": flags for level, flags in LEVELS.items()},
    }
    lines = []
    for name, items in lists.items():
        quoted = (str(item).replace('"', '\\"') for item in items)
        lines.append(f"set(MASKED_LOSS_EXT_{name} " + " ".join(f'"{q}"' for q in quoted) + ")\n")
    return "".join(lines)
