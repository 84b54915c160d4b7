# SPDX-License-Identifier: BSD-3-Clause
"""What to compile and how: the one list of sources and flags.

setup.py (ahead of time), _library.py (at first import), CMakeLists.txt (through ``python
masked_loss_ext/_build.py --cmake``) and the tests read it. It imports neither torch nor the rest
of the package, so it runs before either can be imported. ninja is driven directly, not through
torch.utils.cpp_extension, because that cannot build CUDA kernels against a CPU-only torch.
"""

import filecmp
import hashlib
import mmap
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

if __package__:
    from ._files import (
        copy_whole,
        is_whole,
        make_folder,
        told_in_a_sentence,
        workshop,
        write_if_changed,
    )
    from ._ninja import Ninja
    from ._toolchain import BuildError, torch_about
else:  # run or imported as a plain file, by CMake and setup.py
    from _files import (
        copy_whole,
        is_whole,
        make_folder,
        told_in_a_sentence,
        workshop,
        write_if_changed,
    )
    from _ninja import Ninja
    from _toolchain import BuildError, torch_about

PACKAGE = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(PACKAGE / "_version.py"))["__version__"]
LIBRARY = "_C.abi3.so"
LINKED = "linked.so"  # what ninja makes, and what becomes the library once it is found whole

# Relative to csrc/, which is the include root of all of them.
CPU_SOURCES = [  # what takes longest first: it is started first
    "elementwise/cpu/kernels_avx512.cpp",
    "cross_entropy/cpu/kernels_avx512.cpp",
    "cross_entropy_terms/cpu/kernels_avx512.cpp",
    "elementwise/cpu/kernels_avx2.cpp",
    "cross_entropy/cpu/kernels_avx2.cpp",
    "cross_entropy_terms/cpu/kernels_avx2.cpp",
    "elementwise/cpu/kernels_default.cpp",
    "cross_entropy/cpu/kernels_default.cpp",
    "cross_entropy_terms/cpu/kernels_default.cpp",
    "elementwise/cpu/ops.cpp",
    "cross_entropy/cpu/ops.cpp",
    "cross_entropy_terms/cpu/ops.cpp",
    "block_mask/cpu/ops.cpp",
    "block_mask/cpu/lists.cpp",
    "block_mask/cpu/rows.cpp",
    "repetition/cpu/ops.cpp",
    "common/cpu/capability.cpp",
    "schemas.cpp",
]
CUDA_SOURCES = [
    "elementwise/cuda/ops.cu",
    "cross_entropy/cuda/forward.cu",
    "cross_entropy/cuda/backward.cu",
    "cross_entropy_terms/cuda/ops.cu",
    "cross_entropy/cuda/sweep.cu",
    "block_mask/cuda/ops.cu",
    "repetition/cuda/ops.cu",
]

# 2.10 is the oldest torch whose stable ABI has all that the sources use: the library loads in it
# and in every later one, whichever torch it was compiled with.
DEFINES = ["TORCH_TARGET_VERSION=0x020a000000000000", f'MASKED_LOSS_EXT_VERSION="{VERSION}"']
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",  # gcc vectorises few of the loops without it
    "-g0",
]
# Two architectures at a time; ptxas says what each kernel uses (python -m tools.kernels).
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads=2", "-Xptxas=-v"]
LINK_FLAGS = ["-Wl,--exclude-libs,ALL", "-Wl,-z,defs"]  # cudart's symbols stay inside
CUDA_LIBRARIES = ["cudart_static", "dl", "rt", "pthread"]
INFO_MARKER = "masked_loss_ext build info:"


def csrc_dir():
    """csrc/ inside the installed package, or beside the package in the source tree."""
    for place in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if place.is_dir():
            return place
    raise BuildError("the csrc folder is missing, so there is nothing to compile: reinstall")


def source_fingerprint():
    """Hash of the sources and flags, by content: clones and copies do not keep file times."""
    root = csrc_dir()
    flags = [CPU_SOURCES, CUDA_SOURCES, DEFINES, CXX_FLAGS, NVCC_FLAGS, LINK_FLAGS]
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted(root.rglob("*")):
        if path.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh"):
            digest.update(os.fsencode(path.relative_to(root)) + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_info(architectures, torch_version):
    """What a library is built from; it can say so without being loaded."""
    return {
        "version": VERSION,
        "sources": source_fingerprint(),
        "cuda": " ".join(architectures) or "none",
        "torch": torch_version,
    }


def build_info_source(info):
    """The C++ file that puts it there."""
    text = INFO_MARKER + ";".join(f"{key}={value}" for key, value in info.items())
    return f'extern "C" __attribute__((used)) const char masked_loss_ext_build_info[] = "{text}";\n'


def read_build_info(library):
    """What build_info gave for a library file; {} if it is not one of ours."""
    with open(library, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return {}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.rfind(INFO_MARKER.encode())  # constants lie behind the code
            text = data[start : start + 1000] if start >= 0 else b""
    words = text[len(INFO_MARKER) :].partition(b"\0")[0].decode("ascii", "replace")
    return dict(re.findall(r"(\w+)=([^;]*)", words))


def _shell(words):
    """A command line for a ninja file; $in and $out stay ninja's."""
    quote = lambda word: shlex.quote(str(word)).replace("$", "$$")  # noqa: E731
    return " ".join(w if str(w) in ("$in", "$out", "$out.d") else quote(w) for w in words)


def _path(path):
    return re.sub(r"([$ :])", r"$\1", str(path))


def _compile_rules(tools, root):
    common = [f"-D{define}" for define in DEFINES]
    common += [f"-I{root}", "-isystem", tools.torch_root / "include"]
    files = ["-MF", "$out.d", "-c", "$in", "-o", "$out"]
    rules = {"cxx": [*tools.cxx, *CXX_FLAGS, "-fPIC", *common, "-MMD", *files]}
    if tools.cuda_home:
        nvcc = [tools.cuda_home / "bin/nvcc", *NVCC_FLAGS, *tools.cuda_flags, *common]
        rules["nvcc"] = [*nvcc, "-Xcompiler=-fPIC,-fvisibility=hidden", "-MD", *files]
    return rules


def ninja_file(tools, output):
    root = csrc_dir()
    libraries = [f"-L{tools.torch_root / 'lib'}", "-ltorch_cpu"]
    sources = [root / name for name in CPU_SOURCES] + [Path("build_info.cpp")]
    if tools.cuda_home:
        # First, because it takes longest.
        sources = [root / name for name in CUDA_SOURCES] + sources
        libraries += [f"-L{tools.cudart_dir}", *(f"-l{name}" for name in CUDA_LIBRARIES)]
    lines = []
    for name, words in _compile_rules(tools, root).items():
        command = _shell(words)
        if name == "nvcc":  # what it says is kept, and said
            command += " > $out.log 2>&1; status=$$?; cat $out.log; exit $$status"
        lines += [f"rule {name}", f"  command = {command}"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
    objects = []
    for source in sources:
        relative = source.relative_to(root) if source.is_absolute() else source
        objects.append(_path(f"{relative}.o"))
        rule = "nvcc" if source.suffix == ".cu" else "cxx"
        lines.append(f"build {objects[-1]}: {rule} {_path(source)}")
    # Under a name of its own, the shell's number: a linker may outlive a builder that was killed.
    link = _shell([*tools.cxx, "-shared", *LINK_FLAGS, "$in", *libraries, "-o"])
    partial = "$out.$$$$.part"
    lines += ["rule link", f"  command = {link} {partial} && mv {partial} $out"]
    lines += [f"build {_path(output)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def is_ours(library, info):
    """Is this file whole, and built from what `info` says?"""
    return is_whole(library) and read_build_info(library) == info


def compile_library(tools, folder, note="", advice="it must be a folder that can be written to"):
    """Bring folder/_C.abi3.so up to date (only what changed is compiled) and return its path.

    `note` follows the announcement, `advice` an error about the folder.
    """
    folder = Path(folder).absolute()
    library = folder / LIBRARY
    with told_in_a_sentence(folder, advice):
        make_folder(folder)
        with workshop(folder) as (place, lock):
            info = build_info(tools.architectures, tools.torch_version)
            write_if_changed(place / "build_info.cpp", build_info_source(info))
            write_if_changed(place / "build.ninja", ninja_file(tools, LINKED))
            linked = _linked(Ninja(tools, place, lock, advice), info, note)
            if not library.is_file() or not filecmp.cmp(linked, library, shallow=False):
                copy_whole(linked, library)
    return library


def _linked(ninja, info, note):
    linked = ninja.folder / LINKED
    for _ in range(2):  # again where a crash or a full disk once cut short what is there
        ninja.bring_up_to_date(note)
        if is_ours(linked, info):
            return linked
        linked.unlink()
    raise BuildError(f"the linker has made no whole library in {ninja.folder}; {ninja.advice}")


def cmake_lists():
    """The same lists as CMake code, for include()."""
    try:
        torch_root = torch_about()[0]
    except BuildError:  # CMake has another way to be told where it is
        torch_root = ""
    # The language standards are CMake's own properties there.
    flags = [flag for flag in CXX_FLAGS if not flag.startswith("-std")]
    lists = {
        "VERSION": [VERSION],
        "CPU_SOURCES": CPU_SOURCES,
        "CUDA_SOURCES": CUDA_SOURCES,
        "DEFINES": DEFINES,
        "CXX_FLAGS": flags,
        "LINK_FLAGS": LINK_FLAGS,
        "TORCH_ROOT": [torch_root],
    }
    lines = []
    for name, items in lists.items():
        quoted = (str(item).replace('"', '\\"') for item in items)
        lines.append(f"set(MASKED_LOSS_EXT_{name} " + " ".join(f'"{q}"' for q in quoted) + ")\n")
    return "".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] != ["--cmake"]:
        sys.exit("usage: python masked_loss_ext/_build.py --cmake")
    sys.stdout.buffer.write(os.fsencode(cmake_lists()))  # paths need not be UTF-8
