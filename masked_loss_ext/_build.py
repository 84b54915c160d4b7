# SPDX-License-Identifier: BSD-3-Clause
"""What to compile and how: the one list of sources and flags.

setup.py (ahead of time), _library.py (at first import), CMakeLists.txt (through ``python
masked_loss_ext/_build.py --cmake``) and the tests read it. It imports neither torch nor the rest
of the package, so it runs before either can be imported. ninja is driven directly, not through
torch.utils.cpp_extension, because that cannot build CUDA kernels against a CPU-only torch.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path

if __package__:
    from ._toolchain import BuildError, say, torch_about
else:  # run or imported as a plain file, by CMake and setup.py
    from _toolchain import BuildError, say, torch_about

PACKAGE = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(PACKAGE / "_version.py"))["__version__"]
LIBRARY = "_C.abi3.so"

# Relative to csrc/, which is the include root of all of them.
CPU_SOURCES = [  # what takes longest first: it is started first
    "cpu/masked_squared_error_avx512.cpp",
    "cpu/masked_cross_entropy_avx512.cpp",
    "cpu/cross_entropy_terms_avx512.cpp",
    "cpu/masked_squared_error_avx2.cpp",
    "cpu/masked_cross_entropy_avx2.cpp",
    "cpu/cross_entropy_terms_avx2.cpp",
    "cpu/masked_squared_error_default.cpp",
    "cpu/masked_cross_entropy_default.cpp",
    "cpu/cross_entropy_terms_default.cpp",
    "cpu/masked_squared_error.cpp",
    "cpu/masked_cross_entropy.cpp",
    "cpu/masked_cross_entropy_backward.cpp",
    "cpu/cross_entropy_terms.cpp",
    "cpu/masked_cross_entropy_gradient.cpp",
    "cpu/block_mask.cpp",
    "cpu/block_mask_lists.cpp",
    "cpu/block_mask_rows.cpp",
    "cpu/repetition.cpp",
    "cpu/capability.cpp",
    "schemas.cpp",
]
CUDA_SOURCES = [
    "cuda/masked_squared_error.cu",
    "cuda/masked_cross_entropy.cu",
    "cuda/masked_cross_entropy_backward.cu",
    "cuda/cross_entropy_terms.cu",
    "cuda/masked_cross_entropy_gradient.cu",
    "cuda/block_mask.cu",
    "cuda/repetition.cu",
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
SECONDS_PER_CPU_SOURCE, SECONDS_PER_CUDA_SOURCE = 8, 70  # rough, for the progress message alone
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
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_info_source(architectures, torch_version):
    """A C++ file that lets a library say, without being loaded, what it was built from."""
    info = {
        "version": VERSION,
        "sources": source_fingerprint(),
        "cuda": " ".join(architectures) or "none",
        "torch": torch_version,
    }
    text = INFO_MARKER + ";".join(f"{key}={value}" for key, value in info.items())
    return f'extern "C" __attribute__((used)) const char masked_loss_ext_build_info[] = "{text}";\n'


def read_build_info(library):
    """{"version", "sources", "cuda", "torch"} of a library file; {} if it is not one of ours."""
    data = Path(library).read_bytes()
    start = data.find(INFO_MARKER.encode())
    if start < 0:
        return {}
    text = data[start + len(INFO_MARKER) : data.index(b"\0", start)].decode()
    return dict(item.split("=", 1) for item in text.split(";"))


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
    # Linked beside its place and moved: a reader never meets half a library.
    link = _shell([*tools.cxx, "-shared", *LINK_FLAGS, "$in", *libraries, "-o"])
    lines += ["rule link", f"  command = {link} $out.part && mv $out.part $out"]
    lines += [f"build {_path(output)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def _write_if_changed(path, text):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@contextlib.contextmanager
def locked(folder):
    """One builder per folder; the lock goes with its process, so a killed one leaves none."""
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is compiling the kernels, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_library(tools, folder, note=""):
    """Bring folder/_C.abi3.so up to date (only what changed is compiled) and return its path."""
    folder = Path(folder).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            info = build_info_source(tools.architectures, tools.torch_version)
            _write_if_changed(folder / "build_info.cpp", info)
            _write_if_changed(folder / "build.ninja", ninja_file(tools, LIBRARY))
            _announce_and_run(tools, folder, note)
    except PermissionError as error:
        raise BuildError(
            f"no permission to write {error.filename}; "
            "set TORCH_EXTENSIONS_DIR to a folder of yours"
        ) from None
    return folder / LIBRARY


def _announce_and_run(tools, folder, note):
    command = [tools.ninja, "-C", str(folder)]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    would_do = subprocess.run([*command, "-n"], capture_output=True, text=True)
    if "no work to do" in would_do.stdout:
        return
    kinds = "the CPU kernels"
    if tools.cuda_home:
        kinds += f" and the CUDA kernels ({', '.join(tools.architectures)})"
    seconds = _estimate(would_do.stdout)
    say(f"compiling {kinds} with PyTorch {tools.torch_version}, takes about {seconds} s{note}")
    started = time.monotonic()
    _run_ninja(command, started)
    say(f"compiled in {time.monotonic() - started:.0f} s")


def _estimate(steps):
    """Seconds, roughly, for ninja's list of steps."""
    cuda = len(re.findall(r"^\[.*bin/nvcc ", steps, re.M))
    cpu = len(re.findall(r"^\[.* -c .*\.cpp ", steps, re.M)) - cuda
    cores = len(os.sched_getaffinity(0))
    longest = SECONDS_PER_CUDA_SOURCE if cuda else SECONDS_PER_CPU_SOURCE
    total = cuda * SECONDS_PER_CUDA_SOURCE + cpu * SECONDS_PER_CPU_SOURCE
    return max(total // cores, longest)


def _run_ninja(command, started):
    verbose = os.environ.get("MASKED_LOSS_EXT_VERBOSE") == "1"
    command = [*command, *(["-v"] if verbose else [])]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    output = []
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as ninja:
        for line in ninja.stdout:
            output.append(line)
            _show(line, started, verbose)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    if ninja.returncode:
        raise BuildError(_failure(output))


def _show(line, started, verbose):
    step = re.match(r"\[\d+/\d+\]", line)
    if verbose:
        print(line, end="", file=sys.stderr, flush=True)
    elif step and sys.stderr.isatty():
        seconds = time.monotonic() - started
        text = f"\rmasked_loss_ext: compiling {step[0]} {seconds:.0f} s"
        print(text, end="", file=sys.stderr, flush=True)


def _failure(output):
    """The first failed step in the compiler's own words, without the long command line."""
    start = next((i for i, line in enumerate(output) if line.startswith("FAILED:")), None)
    if start is None:
        return "ninja failed: " + "".join(output[-3:]).strip()
    words = [line for line in output[start + 2 :] if not line.startswith("ninja:")]
    return f"the compiler failed at {output[start][len('FAILED:') :].strip()}:\n" + "".join(
        words[:30]
    )


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
    print(cmake_lists(), end="")
